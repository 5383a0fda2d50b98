"""What every loader returns, and what the tabular sets share: the split, the standardization."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Split:
    """Examples and their targets.

    Attributes:
        inputs: (N, features) float64 for tabular sets; (N, channels, height, width) float32 in
            [0, 1] for images.
        targets: (N,) int64 class labels, or (N, outputs) float64 for regression.
    """

    inputs: NDArray[np.floating]
    targets: NDArray[np.generic]

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set with its held-out part.

    Attributes:
        name: The name that `load` takes.
        train: What is trained on.
        test: What is held out.
        classes: Number of classes, 0 for regression.
        note: What a reader of its results must know: source, terms, choices made here.
    """

    name: str
    train: Split
    test: Split
    classes: int
    note: str


def held_out(examples: int, fraction: float, seed: int) -> tuple[NDArray, NDArray]:
    """Indices of the training part and of a random `fraction` held out, drawn by `seed`."""
    order = np.random.default_rng(seed).permutation(examples)
    cut = round(examples * fraction)
    return order[cut:], order[:cut]


def standardized(
    train: NDArray[np.float64], test: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both parts, shifted and scaled to zero mean and unit variance on the training part alone.

    A column that is constant on the training part becomes zero there. Source: P22 appendix B.2.
    """
    mean, scale = train.mean(axis=0), train.std(axis=0)
    # The mean of equal numbers is off by rounding, so that their deviation may not be exactly 0.
    scale = np.where(np.ptp(train, axis=0) == 0, 1.0, scale)
    return (train - mean) / scale, (test - mean) / scale


def first(part: Split, examples: int, start: int = 0) -> Split:
    """The first examples of a split from `start` on, in the source's order.

    Raises:
        ValueError: Fewer than one are asked for, or more than there are.
    """
    if not 1 <= examples <= len(part) - start:
        raise ValueError(
            f"`examples` must lie in [1, {len(part) - start}], got {examples}; a preset must not "
            "ask for more than the data set has."
        )
    return Split(part.inputs[start : start + examples], part.targets[start : start + examples])
