"""Mini-batches of inputs and targets."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from reference.losses import Loss
from reference.networks import Network
from reference.problem import Batch
from verification.strategies.outputs import targets
from verification.strategies.readable import SEEDS_UP_TO


@st.composite
def batches(
    draw: st.DrawFn, network: Network, loss: Loss, *, min_size: int = 1, max_size: int = 5
) -> Batch:
    """Normal inputs, with the targets that the loss is defined for.

    Args:
        draw: given by Hypothesis.
        network: gives the sizes of inputs and outputs.
        loss: gives the kind of the targets.
        min_size: the fewest examples.
        max_size: the most examples.
    """
    examples = draw(st.integers(min_size, max_size), label="examples")
    rng = np.random.default_rng(draw(st.integers(0, SEEDS_UP_TO), label="batch seed"))
    inputs = rng.standard_normal((examples, network.input_size))
    return Batch(inputs, targets(loss, (examples, network.output_size), rng))
