"""Mini-batches of inputs and targets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from reference.arrays import Array
from reference.losses import Loss
from reference.networks import Network
from reference.problem import Batch
from verification.strategies.outputs import targets
from verification.strategies.readable import SEEDS_UP_TO

GENERIC = ("generic",)
DEGENERATE = ("redundant features", "repeated examples")
"""All features are multiples of the first, or all examples the first: curvature of lower rank."""

SCALED = ("tiny inputs", "huge inputs")
"""A millionth of a standard normal, and a thousandfold of it: activations linear and saturated."""

FORMS = (*GENERIC, *DEGENERATE, *SCALED)


def inputs_of(form: str, examples: int, features: int, rng: np.random.Generator) -> Array:
    """X of one of `FORMS`, (examples, features)."""
    X = rng.standard_normal((examples, features))
    if form == "redundant features":
        return X[:, :1] * rng.standard_normal(features)
    if form == "repeated examples":
        return np.repeat(X[:1], examples, axis=0)
    return X * {"tiny inputs": 1e-6, "huge inputs": 1e3}.get(form, 1.0)


@st.composite
def batches(
    draw: st.DrawFn,
    network: Network,
    loss: Loss,
    *,
    min_size: int = 1,
    max_size: int = 5,
    forms: Sequence[str] = GENERIC,
) -> Batch:
    """Inputs of one form, with the targets that the loss is defined for.

    Args:
        draw: given by Hypothesis.
        network: gives the sizes of inputs and outputs.
        loss: gives the kind of the targets.
        min_size: the fewest examples.
        max_size: the most examples.
        forms: of `FORMS`.
    """
    examples = draw(st.integers(min_size, max_size), label="examples")
    form = draw(st.sampled_from(list(forms)), label="form of the inputs")
    rng = np.random.default_rng(draw(st.integers(0, SEEDS_UP_TO), label="batch seed"))
    inputs = inputs_of(form, examples, network.input_size, rng)
    return Batch(inputs, targets(loss, (examples, network.output_size), rng))
