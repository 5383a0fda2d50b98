"""Coefficients of power series: by Cauchy's formula where f is analytic, by Neville's otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from reference.arrays import Array

POINTS = 32


class Taylor(NamedTuple):
    """The first coefficients of f(t) = sum_k c_k t^k, and max |f| on the circle behind them."""

    coefficients: Array  # (count, ...)
    radius: float
    largest: float

    def scale(self, order: int) -> float:
        """max |f| / radius^order: what the terms of the mean behind c_order amount to."""
        return self.largest / self.radius**order


def taylor(f: Callable[[complex], Array], radius: float, count: int) -> Taylor:
    """c_k = 1/N sum_j f(r w^j) (r w^j)^-k with w = exp(2 pi i / N): Cauchy's integral, N = 32.

    The trapezoidal rule adds c_(k+N) r^N alone, which is 4^-32 < 1e-19 of the terms if f is
    analytic up to four radii. No difference is taken: c_k is known to eps max|f| / r^k.
    """
    points = radius * np.exp(2j * np.pi * np.arange(POINTS) / POINTS)
    values = np.stack([np.asarray(f(t)) for t in points])
    powers = points[None, :] ** -np.arange(count)[:, None]
    coefficients = np.real(np.tensordot(powers, values, axes=1)) / POINTS
    flat = values.reshape(POINTS, -1)
    return Taylor(coefficients, radius, float(np.linalg.norm(flat, axis=1).max()))


class Limit(NamedTuple):
    """lim c(h) for h -> 0, and the larger of the last two changes along Neville's last row."""

    value: Array
    uncertainty: float


def neville(values: Sequence[Array]) -> Limit:
    """The limit of c(h) = c + c_1 h + c_2 h^2 + ... from c(h), c(h/2), c(h/4), ..., at least four.

    Column j of the tableau has lost the first j powers of h, so along its last row the error falls
    faster than the members differ, and the last change bounds the last error. One change may be
    small by chance, where a c_j vanishes: the larger of two is taken. Rounding errors of the
    values are amplified by less than `AMPLIFICATION`.
    """
    column, last_row = list(values), [values[-1]]
    for j in range(1, len(values)):
        column = [fine + (fine - coarse) / (2.0**j - 1.0) for coarse, fine in pairwise(column)]
        last_row.append(column[-1])
    changes = [float(np.linalg.norm(later - earlier)) for earlier, later in pairwise(last_row)]
    return Limit(last_row[-1], max(changes[-2:]))


AMPLIFICATION = 8.3
"""prod_j (2^j + 1) / (2^j - 1), by which Neville's tableau amplifies errors of its values."""
