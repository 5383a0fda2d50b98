"""Independent random streams from one seed, one for each purpose."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch

Purpose = Literal["initialization", "loss", "discrepancy", "curvature", "task"]
"""What a stream draws: the initial weights, the mini-batches B, B' and the examples of a curvature
estimate, the task itself where it is synthetic."""


def generator(seed: int, purpose: Purpose) -> torch.Generator:
    """A CPU generator whose draws are independent of those of the same seed's other purposes.

    Because each purpose has its own, an optimizer that also draws B' sees the same mini-batches B
    as one that does not: runs with one seed are paired.

    Raises:
        ValueError: `seed` is negative.
    """
    if seed < 0:
        raise ValueError(f"`seed` must be non-negative, got {seed}.")
    sequence = np.random.SeedSequence(seed, spawn_key=(get_args(Purpose).index(purpose),))
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
