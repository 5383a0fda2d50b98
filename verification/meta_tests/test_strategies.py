"""The strategies reach the whole space that they promise, discard nothing, and read well."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st
from hypothesis.statistics import collector
from scipy.linalg import block_diag

from reference.curvature import fsd_hessian, kfac_factors
from reference.losses import CrossEntropy, SquaredError
from reference.networks import MLP, FixedHead, Linear
from verification.strategies import (
    FORMS,
    SPD,
    KFACCase,
    MetaCase,
    batches,
    conv_nets,
    ekfac_blocks,
    kfac_cases,
    meta_cases,
    networks,
    proximity_weights,
    scaled_normals,
    spd_matrices,
    weights,
)
from verification.strategies.readable import show
from verification.tolerances import ROUNDING, SOLVE, assert_close

LINEAR = Linear(2, 3)

STRATEGIES: dict[str, st.SearchStrategy[Any]] = {
    "batches": batches(LINEAR, SquaredError(), forms=FORMS),
    "conv_nets": conv_nets(),
    "ekfac_blocks": ekfac_blocks(),
    "kfac_cases-kl": kfac_cases(divergence="kl"),
    "kfac_cases-squared_error": kfac_cases(divergence="squared_error"),
    "meta_cases": meta_cases(),
    "meta_cases-broad": meta_cases(broad=True),
    "networks": networks(),
    "proximity_weights": proximity_weights(),
    "scaled_normals": scaled_normals(),
    "spd_matrices": spd_matrices(),
    "weights": weights(),
}


def drawn(strategy: st.SearchStrategy[Any], count: int = 300) -> list[Any]:
    """`count` values, always the same ones."""
    values: list[Any] = []

    @settings(max_examples=count, derandomize=True, database=None)
    @given(value=strategy)
    def draw(value: Any) -> None:
        values.append(value)

    draw()
    return values


@pytest.mark.parametrize("name", STRATEGIES)
def test_at_most_one_in_twenty_is_discarded(name: str) -> None:
    """What a filter or `assume` rejects is "invalid"; "overrun" is Hypothesis' own size cap."""
    reports: list[dict[str, Any]] = []
    with collector.with_value(reports.append):  # pyright: ignore[reportArgumentType]
        drawn(STRATEGIES[name])
    statuses = [case["status"] for case in reports[0]["generate-phase"]["test-cases"]]
    assert statuses.count("valid") >= 100
    assert statuses.count("invalid") <= 0.05 * len(statuses)


def features(case: MetaCase) -> set[str]:
    """What a case is an instance of."""
    network = case.problem.network
    found = {
        type(network).__name__,
        type(case.problem.loss).__name__,
        f"{type(case.discrepancy).__name__} {vars(case.discrepancy).get('order', '')}".strip(),
        f"{len(network.layers)} layers",
        "bias" if any(layer.bias is not None for layer in network.layers) else "no bias",
        "θ = 0" if not case.theta.any() else "θ ≠ 0",
        "one example" if len(case.batch.inputs) == 1 else "several examples",
        "one output" if network.output_size == 1 else "several outputs",
        "λ_FSD = 0" if case.weights.fsd == 0 else "λ_FSD > 0",
        "λ_WSD = 0" if case.weights.wsd == 0 else "λ_WSD > 0",
    }
    if isinstance(network, MLP):
        found.add(network.activation)
    if case.weights == (0.0, 0.0):
        found.add("no proximity")
    if len(case.batch.inputs) != len(case.other.inputs):
        found.add("batches of different size")
    return found


EVERY_FEATURE = {
    *("Linear", "MLP", "FixedHead", "SquaredError", "CrossEntropy"),
    *("tanh", "sigmoid", "relu", "softplus", "bias", "no bias"),
    *("SquaredEuclidean", "Bregman"),
    *("CategoricalKL lookahead_current", "CategoricalKL current_lookahead"),
    *("1 layers", "2 layers", "3 layers", "θ = 0", "θ ≠ 0"),
    *("one example", "several examples", "one output", "several outputs"),
    *("λ_FSD = 0", "λ_FSD > 0", "λ_WSD = 0", "λ_WSD > 0", "no proximity"),
    "batches of different size",
}


def test_cases_cover_every_feature() -> None:
    cases = drawn(meta_cases())
    counts = {f: sum(f in features(case) for case in cases) for f in EVERY_FEATURE}
    assert min(counts.values()) >= 3, counts


def test_smooth_cases_have_no_kinks() -> None:
    assert all("relu" not in features(case) for case in drawn(meta_cases(smooth=True)))


def test_weights_reach_over_their_decades() -> None:
    """Every decade holds its share, and the bounds are neared."""
    values = np.array(drawn(weights(min_decade=-4, max_decade=2)))
    assert (values == 0.0).any()
    decades = np.log10(values[values > 0])
    assert -4.0 <= decades.min() < -3.9
    assert 1.9 < decades.max() <= 2.0
    counts, _ = np.histogram(decades, bins=6, range=(-4, 2))
    assert counts.min() >= 0.05 * len(decades), counts


@pytest.mark.parametrize(
    ("options", "forbidden"),
    [
        ({"fsd_zero": False}, lambda w: w.fsd == 0),
        ({"wsd_zero": False}, lambda w: w.wsd == 0),
        ({"both_zero": False}, lambda w: w == (0.0, 0.0)),
    ],
    ids=["λ_FSD > 0", "λ_WSD > 0", "not both 0"],
)
def test_weights_keep_their_promises(
    options: dict[str, Any], forbidden: Callable[[tuple[float, float]], bool]
) -> None:
    assert not any(forbidden(w) for w in drawn(proximity_weights(**options)))


@given(spd=spd_matrices(max_condition=1e6))
def test_spd_matrices_have_their_spectrum(spd: SPD) -> None:
    spectrum = np.sort(spd.eigenvalues)
    assert spd.condition <= 1e6 * (1 + 1e-9)
    assert np.array_equal(spd.matrix, spd.matrix.T)
    assert_close(
        np.linalg.eigvalsh(spd.matrix),
        spectrum,
        SOLVE,
        scale=float(np.linalg.norm(spectrum)),
        what="eigenvalues",
    )


def test_spd_matrices_reach_their_condition_number_and_the_identity() -> None:
    matrices = drawn(spd_matrices(max_condition=1e6))
    assert max(spd.condition for spd in matrices) > 1e5
    assert any(spd.condition == 1.0 for spd in matrices)
    assert {len(spd.eigenvalues) for spd in matrices} == set(range(1, 7))
    off_diagonal = [np.abs(s.matrix - np.diag(np.diag(s.matrix))).max() for s in matrices]
    assert max(off_diagonal) > 0


@pytest.mark.parametrize("divergence", ["squared_error", "kl"])
@given(data=st.data())
def test_the_kfac_assumptions_hold_exactly(divergence: str, data: st.DataObject) -> None:
    """G is blockdiag(A_l ⊗ B_l) with the factors of the recipe, which are KFAC's."""
    case: KFACCase = data.draw(kfac_cases(divergence=divergence), label="case")  # pyright: ignore[reportArgumentType]
    network, theta, X = case.problem().network, case.theta(), case.inputs()
    blocks = np.asarray(block_diag(*[np.kron(A, B) for A, B in case.kfac()]))
    G = fsd_hessian(network, case.discrepancy, theta, X)
    # Heads are whitened by H_ρ, whose smallest eigenvalue is above min p over C: their entries,
    # squared, are what is added up to give the entries of G.
    assert isinstance(network, FixedHead)
    heads = sum(float(np.linalg.norm(head)) ** 2 for head in network.heads)
    scale = float(np.linalg.norm(blocks)) + heads * float(np.mean(X**2) * X.size)
    assert_close(G, blocks, ROUNDING, iterations=4, size=len(X) + len(G), scale=scale, what="G")
    for (A, B), (A_l, B_l) in zip(
        case.kfac(), kfac_factors(network, case.discrepancy, theta, X), strict=True
    ):
        assert_close(A_l, np.asarray(A), ROUNDING, iterations=4, size=len(X), scale=scale, what="A")
        assert_close(B_l, np.asarray(B), ROUNDING, iterations=4, size=len(X), scale=scale, what="B")
    assert case.condition() <= 1e2 * (1 + 1e-9)


def test_kfac_cases_cover_layers_and_condition_numbers() -> None:
    cases = drawn(kfac_cases(divergence="kl", max_condition=1e2))
    assert {len(case.factors) for case in cases} == {1, 2}
    assert max(case.condition() for case in cases) > 50
    assert {len(A.eigenvalues) for case in cases for A, _ in case.factors} == {1, 2}


def test_batches_hold_targets_of_the_losss_kind() -> None:
    for loss, kind in [(SquaredError(), "f"), (CrossEntropy(), "i")]:
        for batch in drawn(batches(LINEAR, loss), 50):
            targets = np.asarray(batch.targets)
            assert targets.dtype.kind == kind
            assert len(targets) == len(batch.inputs)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_seed_gives_the_same_values(name: str) -> None:
    first, second = ([show(value) for value in drawn(STRATEGIES[name], 20)] for _ in range(2))
    assert first == second


def test_cases_read_as_what_builds_them() -> None:
    for case in drawn(meta_cases(), 50):
        assert " at 0x" not in repr(case)
        assert repr(case).startswith("MetaCase(")


def test_cases_shrink_to_the_simplest_one() -> None:
    """One linear layer without bias, one example in each batch, θ = 0, no proximity."""
    case = find(meta_cases(), lambda _: True)
    network = case.problem.network
    assert isinstance(network, Linear)
    assert (network.size, len(case.batch.inputs), len(case.other.inputs)) == (1, 1, 1)
    assert not case.theta.any()
    assert case.weights == (0.0, 0.0)
    blocks = find(ekfac_blocks(), lambda _: True)
    assert [block.tolist() for block in blocks] == [[[1.0]], [[1.0]], [[1.0]]]
