"""φ of every update rule, in the oracle's coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from hypothesis import strategies as st

from reference.arrays import Array
from reference.networks import Layer
from reference.update_rules import EKFACBlocks
from verification.strategies.readable import SEEDS_UP_TO


def rates(*, min_decade: float = -4.0, max_decade: float = 0.0) -> st.SearchStrategy[float]:
    """Learning rates η = 10^decade."""
    return st.floats(min_decade, max_decade).map(lambda decade: 10.0**decade)


@final
@dataclass(frozen=True)
class ScaledNormal:
    """Arrays center + scale · normal(seed): a readable recipe for φ of any shape."""

    scale: float
    seed: int

    def around(self, center: Array) -> Array:
        """One array of the shape of `center`."""
        return center + self.scale * np.random.default_rng(self.seed).standard_normal(center.shape)

    def blocks(self, layers: Sequence[Layer]) -> list[EKFACBlocks]:
        """A around I, B around I and S around 1, for each layer; entries of S may be negative."""
        rng = np.random.default_rng(self.seed)
        return [
            EKFACBlocks(
                np.eye(in_) + self.scale * rng.standard_normal((in_, in_)),
                np.eye(out) + self.scale * rng.standard_normal((out, out)),
                1.0 + self.scale * rng.standard_normal((out, in_)),
            )
            for out, in_ in (layer.shape for layer in layers)
        ]


@st.composite
def scaled_normals(draw: st.DrawFn, *, max_scale: float = 1.0) -> ScaledNormal:
    """A `ScaledNormal`; scale 0 is the center itself."""
    scale = draw(st.floats(0.0, max_scale), label="scale")
    return ScaledNormal(scale, draw(st.integers(0, SEEDS_UP_TO), label="seed"))


@st.composite
def ekfac_blocks(draw: st.DrawFn, *, max_size: int = 4, max_scale: float = 1.0) -> EKFACBlocks:
    """(A, B, S) of one weight of any shape up to `max_size`; shrinks to the identity."""
    out = draw(st.integers(1, max_size), label="out")
    in_ = draw(st.integers(1, max_size), label="in")
    recipe = draw(scaled_normals(max_scale=max_scale), label="A, B, S")
    layer = Layer(slice(0, out * in_), None, (out, in_))
    return recipe.blocks([layer])[0]
