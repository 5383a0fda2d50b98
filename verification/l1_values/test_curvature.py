"""The G that the engine's quadratic FSD stands for: the oracle's GGN, and the exact Fisher."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from reference.arrays import Array
from reference.curvature import exact_fisher, fsd_hessian
from reference.losses import GaussianNLL
from reference.problem import Batch, Problem
from verification import bridge
from verification.l0_oracle.rounding import pass_errors
from verification.l1_values.scales import output_curvature_error
from verification.l1_values.twins import Shift, engine, meta_backward
from verification.profiles import share
from verification.strategies import (
    ALL_DISCREPANCIES,
    CONVEX_LOSSES,
    DISCREPANCIES,
    MetaCase,
    ProximityWeights,
    meta_cases,
)
from verification.strategies.outputs import exponentiated
from verification.tolerances import PROPAGATED, assert_close

# The divergence of the model's predictive distribution: G is then the Fisher.
OWN_DIVERGENCE = [
    ("squared_error", "squared-error"),
    ("squared_error", "bregman-squared-error"),
    ("cross_entropy", "kl-lookahead-current"),
    ("cross_entropy", "kl-current-lookahead"),
    ("cross_entropy", "bregman-cross-entropy"),
    ("binary_cross_entropy", "bernoulli-kl-lookahead-current"),
    ("binary_cross_entropy", "bernoulli-kl-current-lookahead"),
    ("binary_cross_entropy", "bregman-binary-cross-entropy"),
]


def engine_curvature(case: MetaCase) -> Array:
    """G, (n, n): q at the lookahead θ + e_k is g + G e_k for Q̂ with λ_FSD = 1, λ_WSD = 0."""
    network = case.problem.network
    columns = []
    for step in np.eye(network.size):

        def rule(_: object, step: Array = step) -> Shift:
            return Shift(bridge.to_tensors(step, network))

        optimizer = engine(case, rule, "linear", "quadratic")
        bridge.set_gradients(optimizer.model, np.zeros(network.size), network)
        meta_backward(optimizer, case)
        grads = [bridge.tensor(bridge.phi_gradient(p)) for p in optimizer.rule.parameters()]
        columns.append(bridge.to_vector(grads, network))
    return np.stack(columns, axis=1)


def curvature_error(case: MetaCase) -> float:
    """Rounding bound of Jᵀ H J in units of u: errors of J on both sides, of H, of the sums."""
    passes = pass_errors(case.problem.network, case.theta, case.other.inputs)
    H = np.abs(case.discrepancy.output_hessian(passes.z))
    e_H = float(output_curvature_error(H, passes.e_z.max()).max())
    J, e_J = np.abs(passes.J), passes.e_J
    n, outputs = J.shape[2], H.shape[1]
    terms = 2.0 * np.einsum("nci,ncd,ndj->ij", e_J + (n + outputs + len(J) + 4) * J, H, J)
    terms += e_H * np.einsum("nci,ndj->ij", J, J)
    return float(np.linalg.norm(terms)) / len(J)


def fisher_error(case: MetaCase) -> float:
    """The same for E_y[score scoreᵀ].

    A class y adds p_y |p − e_y||p − e_y|ᵀ, in all at most 3 |H_ρ|. A Gaussian target z ± √C e_c
    is rounded by |z| + √C, and so is its score, of length √C. The product of two independent bits'
    scores is at most ¼ in the mean, within what such a target is given.
    """
    passes = pass_errors(case.problem.network, case.theta, case.other.inputs)
    root, J = np.sqrt(passes.z.shape[1]), np.abs(passes.J)
    e_scores = 2.0 * root * (np.abs(passes.z).max() + root)
    rounded = float(np.linalg.norm(np.einsum("nci,ndj->ij", J, J))) / len(J)
    return 3.0 * curvature_error(case) + float(e_scores) * rounded


def with_unit_fsd(case: MetaCase) -> MetaCase:
    """The same case with λ_FSD = 1, λ_WSD = 0."""
    return replace(case, weights=ProximityWeights(1.0, 0.0))


def assert_is_the_ggn(case: MetaCase) -> None:
    """The engine's G, by products of unit vectors, is the oracle's."""
    assert_close(
        engine_curvature(case),
        fsd_hessian(case.problem.network, case.discrepancy, case.theta, case.other.inputs),
        PROPAGATED,
        size=1,
        scale=curvature_error(case),
        what="G",
    )


@given(case=meta_cases())
@share(0.5)
def test_the_quadratic_fsd_is_the_ggn(case: MetaCase) -> None:
    assert_is_the_ggn(with_unit_fsd(case))


@pytest.mark.parametrize("name", [name for name in ALL_DISCREPANCIES if exponentiated(name)])
@given(case=meta_cases(losses={"gaussian_nll": GaussianNLL()}))
@share(0.25)
def test_the_quadratic_fsd_of_exponentials_is_the_ggn(name: str, case: MetaCase) -> None:
    """On two outputs: a mean and a log σ, or two log rates."""
    case = replace(with_unit_fsd(case), discrepancy=ALL_DISCREPANCIES[name])
    assert_is_the_ggn(case)


@pytest.mark.parametrize(("loss", "rho"), OWN_DIVERGENCE)
@given(case=meta_cases())
@share(0.5)
def test_with_its_own_divergence_it_is_the_exact_fisher(
    loss: str, rho: str, case: MetaCase
) -> None:
    """F takes its labels from the model, never from the data: B has no part in it."""
    problem = Problem(case.problem.network, CONVEX_LOSSES[loss])
    case = replace(
        with_unit_fsd(case),
        problem=problem,
        discrepancy=DISCREPANCIES[rho],
        batch=_batch_for(loss, case),
    )
    assert_close(
        engine_curvature(case),
        exact_fisher(problem, case.theta, case.other.inputs),
        PROPAGATED,
        size=1,
        scale=fisher_error(case),
        what="F",
    )


def _batch_for(loss: str, case: MetaCase) -> Batch:
    """B with targets of the loss's kind; the values do not matter here."""
    count, outputs = len(case.batch.inputs), case.problem.network.output_size
    labels = loss == "cross_entropy"
    targets = np.zeros(count, dtype=int) if labels else np.zeros((count, outputs))
    return case.batch._replace(targets=targets)
