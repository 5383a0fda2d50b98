"""Broad cases reach every region of the space, each with a stated frequency, and shrink to a point.

What a case is an instance of is read off its arrays, not off the choice that made it.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import find

import apo_core as apo
from apo_core import discrepancies as engine_discrepancies
from reference import discrepancies as oracle_discrepancies
from reference.arrays import Array
from reference.convolution import ConvNet
from reference.networks import MLP, Linear
from verification import bridge
from verification.l1_values import structures
from verification.meta_tests.test_strategies import drawn
from verification.strategies import (
    ALL_DISCREPANCIES,
    DISCREPANCIES,
    FORMS,
    MetaCase,
    conv_nets,
    meta_cases,
    spd_matrices,
)
from verification.strategies.batches import inputs_of

DRAWS = 500
DECADES = ("0", "1e-6 to 1e-4", "1e-4 to 1e-2", "1e-2 to 1", "1 to 1e2", "1e2 to 1e4", "1e4 to 1e6")

# The least share of the draws that must be an instance of each.
LEAST: dict[str, float] = {
    **{f"{hidden} hidden layers": 0.02 for hidden in range(5)},
    **{f"a layer of {width}": 0.05 for width in range(1, 13)},
    **dict.fromkeys(("tanh", "sigmoid", "softplus", "relu"), 0.03),
    **dict.fromkeys(("bias", "no bias", "fixed heads"), 0.15),
    **dict.fromkeys(("squared error", "cross-entropy"), 0.3),
    **dict.fromkeys(("one example", "repeated examples", "redundant features"), 0.05),
    **dict.fromkeys(("tiny inputs", "huge inputs", "inputs of the order of 1"), 0.1),
    **dict.fromkeys(("θ = 0", "batches of different form"), 0.01),
    **{f"λ_{name} {decade}": 0.01 for name in ("FSD", "WSD") for decade in DECADES},
    **dict.fromkeys(DISCREPANCIES, 0.03),
}


def decade(weight: float) -> str:
    """The one of `DECADES` that λ lies in."""
    if weight == 0.0:
        return DECADES[0]
    return DECADES[1 + min(5, int((np.log10(weight) + 6.0) // 2))]


def form_of(X: Array) -> set[str]:
    """What inputs (N, d) are an instance of; d = 1 has no redundant, N = 1 no repeated ones."""
    largest = float(np.abs(X).max())
    found = {"one example"} if len(X) == 1 else set()
    if len(X) > 1 and X.shape[1] > 1 and np.linalg.matrix_rank(X) == 1:
        found.add("repeated examples" if np.ptp(X, axis=0).max() == 0 else "redundant features")
    size = "tiny inputs" if largest < 1e-4 else "huge inputs" if largest > 30 else None
    return found | {size or "inputs of the order of 1"}


def regions(case: MetaCase) -> set[str]:
    """All of `LEAST` that a case is an instance of."""
    network = case.problem.network
    found = form_of(case.batch.inputs)
    if form_of(case.other.inputs) != found:
        found.add("batches of different form")
    if isinstance(network, MLP | Linear):
        found |= {f"{len(network.layers) - 1} hidden layers"}
        found.add("bias" if network.layers[0].bias is not None else "no bias")
    else:
        found.add("fixed heads")
    if isinstance(network, MLP):
        found.add(network.activation)
    if not case.theta.any():
        found.add("θ = 0")
    found |= {f"a layer of {layer.shape[0]}" for layer in network.layers}
    kind = type(case.problem.loss).__name__
    found.add({"SquaredError": "squared error", "CrossEntropy": "cross-entropy"}[kind])
    found |= {f"λ_FSD {decade(case.weights.fsd)}", f"λ_WSD {decade(case.weights.wsd)}"}
    return found | {name for name, rho in DISCREPANCIES.items() if rho is case.discrepancy}


def shares(found: Iterable[set[str]]) -> dict[str, float]:
    """The share of the draws that each is in."""
    counted = list(found)
    counts = Counter(region for one in counted for region in one)
    return {region: count / len(counted) for region, count in counts.items()}


def test_every_region_is_reached_as_often_as_stated() -> None:
    reached = shares(map(regions, drawn(meta_cases(broad=True), DRAWS)))
    rare = {r: reached.get(r, 0.0) for r, least in LEAST.items() if reached.get(r, 0.0) < least}
    assert rare == {}


def test_usual_cases_have_degenerate_inputs_too() -> None:
    reached = shares(map(regions, drawn(meta_cases())))
    for form in ("one example", "repeated examples", "redundant features"):
        assert reached[form] >= 0.05, form
    assert "huge inputs" not in reached


@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_of_their_form(form: str) -> None:
    X = inputs_of(form, 4, 3, np.random.default_rng(0))
    generic = "inputs of the order of 1"
    assert form_of(X) == {
        "generic": {generic},
        "redundant features": {generic, "redundant features"},
        "repeated examples": {generic, "repeated examples"},
    }.get(form, {form})


def geometry(net: ConvNet) -> set[str]:
    """What a convolutional network is; padding enlarges the grid, a stride halves it."""
    first, second = net.images[:2]
    taps = net.selections[0].shape[1] // first.channels
    grown = np.sign(second.height - first.height)
    return {
        f"{len(net.layers) - 1} convolutions",
        f"{taps} pixels a patch",
        f"{net.output_size} outputs",
        net.activation,
        {-1: "a smaller grid", 0: "the same grid", 1: "a larger grid"}[int(grown)],
        "square" if first.height == first.width else "oblong",
        "bias" if net.layers[0].bias is not None else "no bias",
    }


def test_convolutions_are_of_every_geometry() -> None:
    reached = shares(map(geometry, drawn(conv_nets())))
    wanted = {f"{n} {what}" for n in (1, 2) for what in ("convolutions", "outputs")}
    wanted |= {"1 pixels a patch", "4 pixels a patch", "square", "oblong", "bias", "no bias"}
    wanted |= {"tanh", "sigmoid", "softplus", "identity"}
    wanted |= {"a smaller grid", "the same grid", "a larger grid"}
    assert set(reached) == wanted
    assert min(reached.values()) >= 0.1, reached


def test_condition_numbers_reach_1e8() -> None:
    conditions = np.array([spd.condition for spd in drawn(spd_matrices())])
    assert np.mean(conditions > 1e7) >= 0.1
    assert np.mean(conditions < 10.0) >= 0.05
    assert conditions.max() <= 1e8 * (1 + 1e-9)


def concrete(module: Any, of: type) -> set[type]:
    """The classes of that kind that the module defines or exports and that can be built."""
    found = (value for value in vars(module).values() if inspect.isclass(value))
    return {one for one in found if issubclass(one, of) and not inspect.isabstract(one)} - {of}


def test_every_discrepancy_has_a_name() -> None:
    """Of the oracle, and through it of the engine, in every order and with every potential."""
    oracle = {type(rho) for rho in ALL_DISCREPANCIES.values()}
    assert oracle == concrete(oracle_discrepancies, oracle_discrepancies.Discrepancy)
    engine = {type(bridge.discrepancy(rho)) for rho in ALL_DISCREPANCIES.values()}
    assert engine == concrete(engine_discrepancies, engine_discrepancies.Discrepancy)
    options = Counter(
        (type(rho), value) for rho in ALL_DISCREPANCIES.values() for value in vars(rho).values()
    )
    assert max(options.values()) == 1
    for kind in ("CategoricalKL", "BernoulliKL", "GaussianKL"):
        orders = {value for one, value in options if one.__name__ == kind}
        assert {"lookahead_current", "current_lookahead"} <= orders


def test_every_structure_is_held_to_the_oracle() -> None:
    """By its formula in `structures`, or by the oracle's own one in l1_values' other tests."""
    tabled = {type(structures.build(name, (3, 2))) for name in structures.CASES}
    oracles_own = {apo.Dense, apo.Diagonal, apo.EKFAC}
    assert tabled | oracles_own == concrete(apo, apo.Preconditioner)


Property = Callable[[MetaCase], bool]
PLANTED: dict[str, tuple[Property, Property]] = {
    "deep": (
        lambda case: len(case.problem.network.layers) == 4,
        lambda case: set(getattr(case.problem.network, "widths", ())) == {1},
    ),
    "wide": (
        lambda case: case.problem.network.output_size > 9,
        lambda case: case.problem.network.size == 10,
    ),
    "huge inputs": (
        lambda case: float(np.abs(case.batch.inputs).max()) > 30,
        lambda case: case.batch.inputs.shape == (1, 1),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_failure_shrinks_to_what_it_is_about(name: str) -> None:
    """One example, θ = 0 and the smallest network that still fails."""
    fails, is_small = PLANTED[name]
    case = find(meta_cases(broad=True), fails)
    assert is_small(case), case
    assert not case.theta.any()
    assert len(case.batch.inputs) == len(case.other.inputs) == 1
    assert len(repr(case)) < 900


def test_an_ill_conditioned_matrix_shrinks_to_two_by_two_and_diagonal() -> None:
    spd = find(spd_matrices(), lambda spd: spd.condition > 1e7)
    assert len(spd.eigenvalues) == 2
    assert spd.eigenvalues[0] == 1.0
    assert np.array_equal(spd.matrix, np.diag(spd.eigenvalues))
