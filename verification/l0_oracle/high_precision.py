"""The meta-objective once more, in scalar mpmath with 50 digits: an oracle of the oracle.

Nothing here comes from `reference`: plain loops over lists. Derivatives are central differences
with h = 1e-15, whose truncation (1e-30) is far below float64's rounding, and whose cancellation
costs 15, or 30, of the 50 digits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import numpy as np

Vector = list[Any]
Function = Callable[[Vector], Any]

DIGITS = 50
STEP = mpmath.mpf(10) ** -15


def context() -> Any:
    """Fifty digits inside the `with` block."""
    return mpmath.workdps(DIGITS)


def numbers(values: Any) -> Vector:
    """A flat list of mpmath numbers, each the float's exact value."""
    return [mpmath.mpf(float(v)) for v in np.ravel(values)]


def gradient(function: Function, point: Vector) -> np.ndarray:
    """Central differences of a scalar function, as float64, (n,)."""
    with context():
        slopes = [
            (function(_moved(point, {k: STEP})) - function(_moved(point, {k: -STEP}))) / (2 * STEP)
            for k in range(len(point))
        ]
        return np.array([float(slope) for slope in slopes])


def hessian(function: Function, point: Vector) -> np.ndarray:
    """Second central differences of a scalar function, as float64, (n, n)."""
    n = len(point)
    result = np.empty((n, n))
    with context():
        for i in range(n):
            for j in range(i + 1):
                corners = mpmath.mpf(0)
                for a in (1, -1):
                    for b in (1, -1):
                        # += so that i = j moves one coordinate twice
                        step: dict[int, Any] = {i: a * STEP}
                        step[j] = step.get(j, 0) + b * STEP
                        corners += a * b * function(_moved(point, step))
                result[i, j] = result[j, i] = float(corners / (4 * STEP**2))
    return result


def mlp(
    theta: Vector, x: Sequence[Any], widths: Sequence[int], activation: str, bias: bool
) -> Vector:
    """Outputs of a multi-layer perceptron for one input; weights lie column by column."""
    sigma: dict[str, Callable[[Any], Any]] = {
        "tanh": mpmath.tanh,
        "sigmoid": lambda s: 1 / (1 + mpmath.exp(-s)),
        "softplus": lambda s: mpmath.log(1 + mpmath.exp(s)),
    }
    a, at = list(x), 0
    for index in range(len(widths) - 1):
        in_, out = widths[index], widths[index + 1]
        s = [sum(theta[at + i * out + o] * a[i] for i in range(in_)) for o in range(out)]
        at += in_ * out
        if bias:
            s = [s[o] + theta[at + o] for o in range(out)]
            at += out
        a = s if index == len(widths) - 2 else [sigma[activation](v) for v in s]
    return a


def squared_error(z: Vector, t: Vector) -> Any:
    """Half the squared distance."""
    return sum((a - b) ** 2 for a, b in zip(z, t, strict=True)) / 2


def probabilities(z: Vector) -> Vector:
    """exp(z) over its sum."""
    weights = [mpmath.exp(v) for v in z]
    return [w / sum(weights) for w in weights]


def cross_entropy(z: Vector, label: int) -> Any:
    """Minus the log probability of the label."""
    return -mpmath.log(probabilities(z)[label])


def kl(first: Vector, second: Vector) -> Any:
    """KL between the categorical distributions of two logit vectors, in the order given."""
    pairs = zip(probabilities(first), probabilities(second), strict=True)
    return sum(p * mpmath.log(p / q) for p, q in pairs)


DIVERGENCES: dict[str, Callable[[Vector, Vector], Any]] = {
    "squared-error": squared_error,
    "squared-error-without-half": lambda z, z0: 2 * squared_error(z, z0),
    "kl-lookahead-current": kl,
    "kl-current-lookahead": lambda z, z0: kl(z0, z),
    "bregman-squared-error": squared_error,
    "bregman-cross-entropy": lambda z, z0: (
        mpmath.log(sum(mpmath.exp(v) for v in z))
        - mpmath.log(sum(mpmath.exp(v) for v in z0))
        - sum(p * (a - b) for p, a, b in zip(probabilities(z0), z, z0, strict=True))
    ),
}


def _moved(point: Vector, steps: dict[int, Any]) -> Vector:
    return [value + steps.get(k, 0) for k, value in enumerate(point)]
