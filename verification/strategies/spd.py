"""Symmetric positive definite matrices of a chosen spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
from hypothesis import strategies as st

from reference.arrays import Array
from verification.strategies.readable import SEEDS_UP_TO


def rotation(n: int, seed: int) -> Array:
    """A random orthogonal matrix, (n, n), uniform over the group; seed 0 is the identity."""
    if seed == 0:
        return np.eye(n)
    Q, R = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return Q * np.sign(np.diag(R))


@final
@dataclass(frozen=True)
class SPD:
    """Q diag(eigenvalues) Qᵀ with Q = rotation(seed).

    Attributes:
        eigenvalues: positive; the first is the scale, none is below scale / condition.
        seed: of the rotation; 0 gives a diagonal matrix.
    """

    eigenvalues: tuple[float, ...]
    seed: int

    @cached_property
    def matrix(self) -> Array:
        """The matrix, (n, n), symmetric to the last bit."""
        Q = rotation(len(self.eigenvalues), self.seed)
        M = Q * np.array(self.eigenvalues) @ Q.T
        return 0.5 * (M + M.T)

    @property
    def condition(self) -> float:
        """Largest over smallest eigenvalue."""
        return max(self.eigenvalues) / min(self.eigenvalues)


@st.composite
def spd_matrices(
    draw: st.DrawFn,
    *,
    min_size: int = 1,
    max_size: int = 6,
    max_condition: float = 1e8,
    max_log_scale: float = 2.0,
) -> SPD:
    """Matrices with a log-uniform spectrum of condition number at most `max_condition`.

    Args:
        draw: given by Hypothesis.
        min_size: the smallest n.
        max_size: the largest n.
        max_condition: what the condition number is at most; it is reached.
        max_log_scale: the largest eigenvalue lies in [10^-max_log_scale, 10^max_log_scale].
    """
    n = draw(st.integers(min_size, max_size), label="n")
    scale = 10.0 ** draw(st.floats(-max_log_scale, max_log_scale), label="log10 scale")
    decades = st.floats(0.0, float(np.log10(max_condition)))
    fall = draw(st.lists(decades, min_size=n - 1, max_size=n - 1), label="decades below the scale")
    seed = draw(st.integers(0, SEEDS_UP_TO), label="rotation seed")
    return SPD((scale, *(scale * 10.0**-d for d in fall)), seed)
