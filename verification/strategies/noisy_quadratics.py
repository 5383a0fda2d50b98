"""Small noisy quadratics with the moments of a point, and the finite noise that stands for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import final

import numpy as np
from hypothesis import strategies as st

from reference.arrays import Array
from reference.noisy_quadratic import Moments, NoisyQuadratic
from verification.strategies.readable import SEEDS_UP_TO


@final
@dataclass(frozen=True)
class QuadraticCase:
    """A problem and the distribution of x.

    Attributes:
        h: eigenvalues, (n,).
        v: variances of the noise, (n,).
        half: whether f has its 1/2.
        mean: E[x], (n,).
        spread: the standard deviations of x, (n,).
    """

    h: tuple[float, ...]
    v: tuple[float, ...]
    half: bool
    mean: tuple[float, ...]
    spread: tuple[float, ...]

    @property
    def problem(self) -> NoisyQuadratic:
        """The noisy quadratic."""
        return NoisyQuadratic(np.array(self.h), np.array(self.v), self.half)

    @property
    def moments(self) -> Moments:
        """E[x] and E[x^2], (n,) each."""
        mean = np.array(self.mean)
        return Moments(mean, mean**2 + np.array(self.spread) ** 2)

    def points(self) -> Iterator[Array]:
        """2^n equally likely x with these moments."""
        for signs in product((-1.0, 1.0), repeat=len(self.h)):
            yield np.array(self.mean) + np.array(signs) * np.array(self.spread)

    def noise(self) -> Iterator[Array]:
        """2^n equally likely c: independent coordinates of mean 0 and variance v."""
        for signs in product((-1.0, 1.0), repeat=len(self.h)):
            yield np.array(signs) * np.sqrt(np.array(self.v))


@st.composite
def quadratic_cases(
    draw: st.DrawFn, *, max_size: int = 3, max_condition: float = 1e2, start: bool = False
) -> QuadraticCase:
    """Eigenvalues up to 10, noise from far below to far above the signal.

    Args:
        draw: given by Hypothesis.
        max_size: the largest n.
        max_condition: the largest ratio of two eigenvalues.
        start: x is known, as before the first step.
    """
    n = draw(st.integers(1, max_size), label="n")
    top = 10.0 ** draw(st.floats(-1.0, 1.0), label="log10 of the largest h")
    noise = 10.0 ** draw(st.floats(-2.0, 2.0), label="log10 of the noise")
    source = np.random.default_rng(draw(st.integers(0, SEEDS_UP_TO), label="seed"))
    h = top * np.append(1.0, max_condition ** -source.uniform(size=n - 1))
    v = noise * 10.0 ** source.uniform(-0.5, 0.5, size=n)
    mean = source.standard_normal(n)
    spread = np.zeros(n) if start else source.uniform(size=n)
    half = draw(st.booleans(), label="half")
    return QuadraticCase(
        tuple(h.tolist()), tuple(v.tolist()), half, tuple(mean.tolist()), tuple(spread.tolist())
    )
