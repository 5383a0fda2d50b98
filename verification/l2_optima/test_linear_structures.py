"""The other structures reach the linear-in-φ oracle: a learning rate, one a layer, a diagonal."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import apo_core as apo
from reference.curvature import fsd_hessian
from reference.discrepancies import SquaredEuclidean
from reference.losses import SquaredError
from reference.meta_objective import proximity_matrix
from reference.networks import MLP
from reference.optimal_preconditioners import diagonal, per_layer, scalar
from reference.problem import Problem
from verification import bridge
from verification.l2_optima.solving import nearly_white_gradient_sets, solve
from verification.profiles import share
from verification.tolerances import MINIMIZER, assert_close

WIDTHS = [2, 2, 1]


@pytest.mark.parametrize("structure", ["scalar", "per layer", "diagonal"])
@share(0.5)
@given(data=st.data(), seed=st.integers(0, 2**16), fsd_weight=st.floats(0.0, 3.0))
def test_structures_linear_in_phi(
    data: st.DataObject, structure: str, seed: int, fsd_weight: float
) -> None:
    rng = np.random.default_rng(seed)
    problem = Problem(MLP(WIDTHS, "tanh"), SquaredError())
    n = problem.network.size
    theta, inputs = rng.standard_normal(n), rng.standard_normal((4, WIDTHS[0]))
    gradients = data.draw(nearly_white_gradient_sets(n), label="gradients")
    G = fsd_hessian(problem.network, SquaredEuclidean(), theta, inputs)
    M = proximity_matrix(fsd_weight * G, 1.0, 1.0)

    module = bridge.twin(problem.network, theta)
    if structure == "diagonal":
        optimum = diagonal(gradients, M)
        rule: apo.UpdateRule = apo.rules.Preconditioned(module, apo.Diagonal)
    elif structure == "scalar":
        optimum = scalar(gradients, M)
        rule = apo.rules.SGD(module, 1.0)
    else:
        optimum = per_layer(gradients, M, problem.network.layers)
        rule = apo.rules.SGD(module, 1.0, per_layer=True)
    assert optimum.phi.min() > 0, f"the construction promises positive entries, got {optimum.phi}"

    objective = apo.ProximalObjective(
        "squared_error", fsd_weight, 1.0, loss="linear", fsd="quadratic"
    )
    value = solve(rule, module, problem, objective, gradients, inputs)
    if isinstance(rule, apo.rules.SGD):
        phi = bridge.array(rule.lr).reshape(-1)
    else:
        assert isinstance(rule, apo.rules.Preconditioned)
        phi = np.diag(bridge.to_oracle_matrix(rule.dense(), problem.network)).copy()
    steepness = np.linalg.eigvalsh(optimum.H)[0] * float(optimum.phi @ optimum.phi)
    assert_close(
        phi,
        optimum.phi,
        MINIMIZER,
        condition=max(1.0, abs(value) / steepness),
        size=n * n,
        what=structure,
    )
