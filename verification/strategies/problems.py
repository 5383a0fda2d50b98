"""Whole meta-objectives: a problem, θ, two mini-batches, a discrepancy and the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from hypothesis import strategies as st

from reference.arrays import Array
from reference.discrepancies import Discrepancy
from reference.losses import CrossEntropy, GaussianNLL, Loss, SquaredError
from reference.meta_objective import MetaObjective
from reference.problem import Batch, Problem
from verification.strategies.batches import DEGENERATE, FORMS, GENERIC, batches
from verification.strategies.discrepancies import discrepancies
from verification.strategies.networks import NETWORK_KINDS, SMOOTH, networks, parameters
from verification.strategies.readable import show
from verification.strategies.weights import ProximityWeights, proximity_weights

LOSSES: dict[str, Loss] = {"squared_error": SquaredError(), "cross_entropy": CrossEntropy()}


@final
@dataclass(frozen=True, repr=False)
class MetaCase:
    """What Q(φ) is made of, but for the update rule.

    Attributes:
        problem: network and loss.
        theta: (n,).
        batch: B, of the gradient and of the loss term.
        other: B', of the FSD term; its targets are not used.
        discrepancy: ρ.
        weights: λ_FSD and λ_WSD.
    """

    problem: Problem
    theta: Array
    batch: Batch
    other: Batch
    discrepancy: Discrepancy
    weights: ProximityWeights

    @property
    def gradient(self) -> Array:
        """g = ∇J_B(θ), (n,)."""
        return self.problem.gradient(self.theta, *self.batch)

    def objective(self, loss: str = "exact", fsd: str = "exact") -> MetaObjective:
        """The oracle's Q, or Q̂ with loss="linear" and fsd="quadratic"."""
        return MetaObjective(self.problem, self.discrepancy, *self.weights, loss, fsd)

    def __repr__(self) -> str:
        return (
            f"MetaCase({show(self.problem.network)}, {show(self.problem.loss)},\n"
            f"  theta={show(self.theta)},\n  batch={show(self.batch.inputs)} -> "
            f"{show(np.asarray(self.batch.targets))},\n  other={show(self.other.inputs)},\n"
            f"  {show(self.discrepancy)}, {self.weights})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What Hypothesis prints of a falsifying example."""
        printer.text(repr(self))


@st.composite
def meta_cases(
    draw: st.DrawFn,
    *,
    kinds: Sequence[str] = NETWORK_KINDS,
    smooth: bool = False,
    pairs: st.SearchStrategy[ProximityWeights] | None = None,
    losses: Mapping[str, Loss] = LOSSES,
    rhos: st.SearchStrategy[Discrepancy] | None = None,
    small: bool = False,
    broad: bool = False,
) -> MetaCase:
    """A problem with everything that Q needs.

    Usually at most two hidden layers and three units in each, inputs of the order of 1, and λ from
    1e-4 to 1e2.

    Args:
        draw: given by Hypothesis.
        kinds: of `NETWORK_KINDS`.
        smooth: leave ReLU out, for finite differences.
        pairs: of λ_FSD and λ_WSD.
        losses: to choose from; those that the engine has by default.
        rhos: the discrepancies; those that suit every network and loss by default.
        small: at most one hidden layer and two units in each, for what costs n² gradients.
        broad: up to four hidden layers and twelve units in each, tiny and huge inputs, and λ from
            1e-6 to 1e6.
    """
    loss = losses[draw(st.sampled_from(list(losses)), label="loss")]
    activations = SMOOTH if smooth else (*SMOOTH, "relu")
    even = isinstance(loss, GaussianNLL)
    sizes = {"max_width": 2, "max_hidden": 1} if small else {}
    sizes = {"max_width": 12, "max_hidden": 4} if broad else sizes
    forms = FORMS if broad else (*GENERIC, *DEGENERATE)
    if pairs is None:
        pairs = proximity_weights(decades=(-6.0, 6.0) if broad else (-4.0, 2.0))
    network = draw(
        networks(kinds=kinds, activations=activations, even=even, **sizes), label="network"
    )
    return MetaCase(
        problem=Problem(network, loss),
        theta=draw(parameters(network), label="θ"),
        batch=draw(batches(network, loss, forms=forms), label="B"),
        other=draw(batches(network, loss, forms=forms), label="B'"),
        discrepancy=draw(discrepancies() if rhos is None else rhos, label="discrepancy"),
        weights=draw(pairs, label="weights"),
    )
