"""Theorem 1 in the engine: the dense P that minimizes Q̂ is (λ_FSD G + λ_WSD I)⁻¹."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import apo_core as apo
from reference.curvature import fsd_hessian
from reference.discrepancies import CategoricalKL
from reference.losses import CrossEntropy
from reference.networks import MLP
from reference.problem import Problem
from verification import bridge
from verification.l2_optima.solving import condition_of, gradient_sets, solve
from verification.profiles import share
from verification.strategies.fixed_heads import Divergence, kfac_cases
from verification.tolerances import MINIMIZER, assert_close


@share(0.5)
@given(
    data=st.data(),
    divergence=st.sampled_from(["squared_error", "kl"]),
    fsd_weight=st.floats(0.1, 10.0),
    damping=st.sampled_from([0.0, 0.01, 1.0]),
)
def test_dense_reaches_the_damped_inverse(
    data: st.DataObject, divergence: Divergence, fsd_weight: float, damping: float
) -> None:
    """From P = I, on problems whose G has condition up to 1e2; λ_WSD = damping · λ_FSD."""
    case = data.draw(kfac_cases(divergence=divergence), label="problem")
    problem, inputs, theta = case.problem(), case.inputs(), case.theta()
    n = problem.network.size
    gradients = data.draw(gradient_sets(n), label="gradients")
    G = fsd_hessian(problem.network, case.discrepancy, theta, inputs)
    M = fsd_weight * G + damping * fsd_weight * np.eye(n)

    module = bridge.twin(problem.network, theta)
    rule = apo.rules.Preconditioned(module, apo.Dense)
    objective = apo.ProximalObjective(
        bridge.discrepancy(case.discrepancy),
        fsd_weight,
        damping * fsd_weight,
        loss="linear",
        fsd="quadratic",
    )
    solve(rule, module, problem, objective, gradients, inputs)
    P = bridge.to_oracle_matrix(rule.dense(), problem.network)
    expected = np.linalg.inv(M)
    C = gradients.T @ gradients / n
    condition = condition_of(C, M)
    assert_close(P, expected, MINIMIZER, condition=condition, size=n * n, what="P*")
    error = float(np.linalg.norm(P - expected) / np.linalg.norm(expected))
    assert error <= 1e-6, f"relative error {error:.2g} of P*"


@share(0.5)
@given(data=st.data(), seed=st.integers(0, 2**16), decade=st.floats(-1.5, 0.5))
def test_dense_reaches_the_damped_inverse_of_a_network(
    data: st.DataObject, seed: int, decade: float
) -> None:
    """The same where G has no structure: a tanh network with biases and the KL, λ_WSD > 0."""
    rng = np.random.default_rng(seed)
    problem = Problem(MLP([1, 1, 2], "tanh"), CrossEntropy())
    n, wsd_weight = problem.network.size, 10.0**decade
    theta, inputs = rng.standard_normal(n), rng.standard_normal((5, 1))
    gradients = data.draw(gradient_sets(n), label="gradients")
    M = fsd_hessian(problem.network, CategoricalKL(), theta, inputs) + wsd_weight * np.eye(n)

    module = bridge.twin(problem.network, theta)
    rule = apo.rules.Preconditioned(module, apo.Dense)
    objective = apo.ProximalObjective("kl", 1.0, wsd_weight, loss="linear", fsd="quadratic")
    solve(rule, module, problem, objective, gradients, inputs)
    P = bridge.to_oracle_matrix(rule.dense(), problem.network)
    C = gradients.T @ gradients / n
    condition = condition_of(C, M)
    assert_close(P, np.linalg.inv(M), MINIMIZER, condition=condition, size=n * n, what="P*")
