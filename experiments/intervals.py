"""Means and intervals over seeds; a diverged run counts as infinite and is never dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: of the paired differences, or the geometric mean of the paired ratios.
        low: lower end; -inf or 0 where fewer than two pairs leave it open.
        high: upper end; inf where fewer than two pairs leave it open.
        n: number of pairs.
    """

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        mean, low, high = (round(value, 12) + 0.0 for value in (self.mean, self.low, self.high))
        return f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def difference_interval(
    ours: Sequence[float], theirs: Sequence[float], confidence: float = 0.95
) -> Interval:
    """Student's t interval of ours − theirs, paired by position: runs of one seed stand together.

    Infinite values leave no interval: the mean is then infinite (or NaN, where both diverge).

    Raises:
        ValueError: the two are not equally long, or empty.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(
            "`ours` and `theirs` must be paired and not empty, got lengths "
            f"{len(ours)} and {len(theirs)}; compare the seeds that both have."
        )
    n = len(ours)
    with np.errstate(invalid="ignore"):
        differences = np.subtract(ours, theirs, dtype=float)
        mean = float(differences.mean())
    if n < 2 or not np.isfinite(differences).all():
        return Interval(mean, -math.inf, math.inf, n)
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * differences.std(ddof=1) / math.sqrt(n)
    return Interval(mean, mean - float(half), mean + float(half), n)


def ratio_interval(
    ours: Sequence[float], theirs: Sequence[float], confidence: float = 0.95
) -> Interval:
    """The same of ours / theirs, by their logarithms: for losses, which span decades."""
    with np.errstate(divide="ignore"):
        logs = difference_interval(
            list(np.log(np.asarray(ours, dtype=float))),
            list(np.log(np.asarray(theirs, dtype=float))),
            confidence,
        )
    mean, low, high = np.exp([logs.mean, logs.low, logs.high]).tolist()
    return Interval(mean, low, high, logs.n)


def summary(values: Sequence[float], form: str = ".2g") -> str:
    """Mean ± sd (min … max); ∞ with the count of diverged runs where there are any."""
    diverged = sum(not math.isfinite(v) for v in values)
    if diverged:
        finite = [v for v in values if math.isfinite(v)]
        rest = f"; the others {summary(finite, form)}" if finite else ""
        return f"∞ ({diverged} of {len(values)} diverged{rest})"
    if len(values) == 1:
        return f"{values[0]:{form}}"
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    return f"{mean:{form}} ± {deviation:{form}} ({min(values):{form}} … {max(values):{form}})"
