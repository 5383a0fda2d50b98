"""Scalar, one-sided, block-diagonal and Kronecker P reach the analytic optimum of their structure.

The first three are linear in P's free entries, so that the linear-in-φ oracle has their optimum;
φ is a root of P, which reaches it where it is positive semidefinite. With E[ggᵀ] = I it is: a
block's optimum is the inverse of M's block, and a side's the inverse of a mean of M's blocks.
"""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import apo_core as apo
from apo_core.preconditioners import Structure
from reference.arrays import Array
from reference.curvature import fsd_hessian
from reference.discrepancies import SquaredEuclidean
from reference.losses import SquaredError
from reference.meta_objective import proximity_matrix
from reference.networks import MLP, Network
from reference.optimal_preconditioners import kronecker, linear_in_phi
from reference.problem import Problem
from verification import bridge
from verification.l2_optima.solving import (
    condition_of,
    gradient_sets,
    nearly_white_gradient_sets,
    solve,
)
from verification.profiles import share
from verification.strategies.fixed_heads import Divergence, kfac_cases
from verification.tolerances import MINIMIZER, assert_close

WIDTHS, BLOCK = [2, 2, 1], 3

STRUCTURES: dict[str, Structure] = {
    "scalar": apo.Scalar,
    "block-diagonal": partial(apo.BlockDiagonal, block=BLOCK),
    "one-sided, input": apo.OneSided,
    "one-sided, output": partial(apo.OneSided, side="output"),
}


def parameters(network: Network) -> list[tuple[Array, tuple[int, ...]]]:
    """Of each parameter its places in the oracle's vector, row-major, and its shape."""
    pieces: list[tuple[Array, tuple[int, ...]]] = []
    for layer in network.layers:
        weight = layer.weight_matrix(np.arange(network.size))
        pieces.append((weight.reshape(-1), weight.shape))
        if layer.bias is not None:
            bias = np.arange(layer.bias.start, layer.bias.stop)
            pieces.append((bias, bias.shape))
    return pieces


def units(n: int) -> list[Array]:
    """E_ij, (n, n) each."""
    return list(np.eye(n * n).reshape(n * n, n, n))


def blocks_of(name: str, shape: tuple[int, ...]) -> list[Array]:
    """The basis of one parameter's P on its row-major entries."""
    n = int(np.prod(shape))
    if name == "scalar":
        return [np.eye(n)]
    if name == "block-diagonal":  # all E_ij of a block, and no others
        count = -(-n // BLOCK)
        size = -(-n // count)
        same = np.equal.outer(np.arange(n) // size, np.arange(n) // size)
        return [E for E in units(n) if np.any(E * same)]
    if len(shape) == 1:
        return [np.diag(row) for row in np.eye(n)]
    out, in_ = shape
    if name == "one-sided, input":
        return [np.kron(np.eye(out), E) for E in units(in_)]
    return [np.kron(E, np.eye(in_)) for E in units(out)]


def basis_of(name: str, network: Network) -> Array:
    """P_k of the whole model on the oracle's vector, (K, n, n)."""
    basis = []
    for places, shape in parameters(network):
        for block in blocks_of(name, shape):
            P = np.zeros((network.size, network.size))
            P[np.ix_(places, places)] = block
            basis.append(P)
    return np.array(basis)


@pytest.mark.parametrize("name", STRUCTURES)
@share(0.25)
@given(data=st.data(), seed=st.integers(0, 2**16), fsd_weight=st.floats(0.0, 3.0))
def test_structures_reach_their_optimum(
    data: st.DataObject, name: str, seed: int, fsd_weight: float
) -> None:
    """From P = I, on tanh networks with biases; λ_WSD = 1."""
    rng = np.random.default_rng(seed)
    problem = Problem(MLP(WIDTHS, "tanh"), SquaredError())
    n = problem.network.size
    theta, inputs = rng.standard_normal(n), rng.standard_normal((4, WIDTHS[0]))
    if name == "scalar":
        gradients = data.draw(nearly_white_gradient_sets(n), label="gradients")
    else:
        gradients = data.draw(gradient_sets(n, max_condition=1.0), label="gradients")
    G = fsd_hessian(problem.network, SquaredEuclidean(), theta, inputs)
    M = proximity_matrix(fsd_weight * G, 1.0, 1.0)
    optimum = linear_in_phi(basis_of(name, problem.network), gradients, M)
    lowest = float(np.linalg.eigvalsh(0.5 * (optimum.P + optimum.P.T))[0])
    assert lowest > 0, f"the construction promises a positive definite P*, got {lowest}"

    module = bridge.twin(problem.network, theta)
    rule = apo.rules.Preconditioned(module, STRUCTURES[name])
    objective = apo.ProximalObjective(
        "squared_error", fsd_weight, 1.0, loss="linear", fsd="quadratic"
    )
    value = solve(rule, module, problem, objective, gradients, inputs)
    curvature = np.linalg.eigvalsh(M)[0] * np.linalg.eigvalsh(gradients.T @ gradients / n)[0]
    assert_close(
        bridge.to_oracle_matrix(rule.dense(), problem.network),
        optimum.P,
        MINIMIZER,
        condition=max(1.0, abs(value) / (curvature * float(np.linalg.norm(optimum.P)) ** 2)),
        size=n * n,
        what=f"P* of {name}",
    )


@share(0.25)
@given(
    data=st.data(),
    divergence=st.sampled_from(["kl", "squared_error"]),
    fsd_weight=st.floats(0.3, 3.0),
)
def test_kronecker_reaches_undamped_kfac(
    data: st.DataObject, divergence: Divergence, fsd_weight: float
) -> None:
    """λ_WSD = 0, one and two layers: AAᵀ ⊗ BBᵀ = A_l⁻¹ ⊗ B_l⁻¹ / λ_FSD, from P = I."""
    case = data.draw(kfac_cases(divergence=divergence), label="problem")
    problem = case.problem()
    n = problem.network.size
    gradients = data.draw(gradient_sets(n), label="gradients")
    expected = kronecker(case.kfac(), fsd_weight)

    module = bridge.twin(problem.network, case.theta())
    rule = apo.rules.Preconditioned(module, apo.Kronecker)
    objective = apo.ProximalObjective(
        bridge.discrepancy(case.discrepancy), fsd_weight, 0.0, loss="linear", fsd="quadratic"
    )
    solve(rule, module, problem, objective, gradients, case.inputs())
    condition = condition_of(gradients.T @ gradients / n, np.linalg.inv(expected))
    P = bridge.to_oracle_matrix(rule.dense(), problem.network)
    assert_close(P, expected, MINIMIZER, condition=condition, size=n * n, what="A ⊗ B")
