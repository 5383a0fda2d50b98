"""Images as P22 appendix B.4 has them: standardized by channel, cropped and flipped at random."""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from experiments.data import Split
from experiments.problems import Batch, Problem, Stream, Wrapped
from experiments.seeds import generator

PADDING = 4  # pixels on each side
AUGMENTATION = 1 << 20  # added to the seed: crops are independent of the order of the examples


def standardized_images(train: Split, *others: Split) -> list[tuple[Tensor, Tensor]]:
    """(images, labels) of every part: zero mean and unit variance by channel on the first alone.

    Args:
        train: images (N, channels, height, width), labels (N,).
        others: parts that are shifted and scaled alike.
    """
    axes = (0, 2, 3)
    mean, scale = (
        moment(train.inputs, axis=axes, keepdims=True, dtype=np.float64).astype(np.float32)
        for moment in (np.mean, np.std)
    )
    return [
        (
            torch.tensor((part.inputs - mean) / scale, dtype=torch.float32),
            torch.tensor(part.targets, dtype=torch.int64),
        )
        for part in (train, *others)
    ]


def cropped_and_flipped(images: Tensor, source: torch.Generator) -> Tensor:
    """A crop of each image, padded by 4 zero pixels, of its own size; flipped with probability ½.

    Args:
        images: (N, channels, height, width).
        source: a CPU generator: two offsets, then one coin, an image.
    """
    count, channels, height, width = images.shape
    offsets = torch.randint(0, 2 * PADDING + 1, (2, count, 1), generator=source)
    flipped = torch.rand(count, generator=source) < 0.5
    rows = offsets[0] + torch.arange(height)  # (N, height)
    columns = offsets[1] + torch.arange(width)
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    return pad(images, (PADDING,) * 4)[
        torch.arange(count)[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


@final
class Augmented(Wrapped):
    """Another problem whose mini-batches are cropped and flipped at random; judged as it is.

    Source: P22 appendix B.4, after Zagoruyko and Komodakis (2016).

    Args:
        problem: with batches (images, ...).
        seed: of the crops; each stream has its own.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem)
        streams: tuple[Stream, ...] = ("loss", "discrepancy", "curvature")
        self._sources = {name: generator(seed + AUGMENTATION, name) for name in streams}

    def batch(self, stream: Stream) -> Batch:
        """The next mini-batch of the stream, its images cropped and flipped."""
        images, *others = self.problem.batch(stream)
        return cropped_and_flipped(images, self._sources[stream]), *others
