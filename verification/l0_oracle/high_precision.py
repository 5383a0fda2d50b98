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
        "identity": lambda s: s,
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


def bit_probability(z: Any, bit: int) -> Any:
    """p(bit) for the logit z, each from its own formula: 1 - p would lose a small one's digits."""
    return 1 / (1 + mpmath.exp(-z if bit else z))


def binary_cross_entropy(z: Vector, t: Vector) -> Any:
    """Minus the log probability of independent bits."""
    return -sum(mpmath.log(bit_probability(a, int(b))) for a, b in zip(z, t, strict=True))


def poisson_loss(z: Vector, t: Vector) -> Any:
    """Minus the log probability of independent counts, without the factorials."""
    rates = [mpmath.exp(v) for v in z]
    masses = [mpmath.exp(-r) * r**b for r, b in zip(rates, t, strict=True)]
    return -sum(mpmath.log(mass) for mass in masses)


def gaussian_nll(z: Vector, t: Vector) -> Any:
    """Minus the log density of independent Gaussians, without the root of 2 pi."""
    half = len(z) // 2
    triples = zip(z[:half], z[half:], t, strict=True)
    return -sum(mpmath.log(mpmath.sqrt(2 * mpmath.pi) * density(y, m, s)) for m, s, y in triples)


def density(y: Any, mean: Any, log_sigma: Any) -> Any:
    """The normal density at y."""
    sigma = mpmath.exp(log_sigma)
    return mpmath.exp(-(((y - mean) / sigma) ** 2) / 2) / (sigma * mpmath.sqrt(2 * mpmath.pi))


LOSSES: dict[str, Callable[[Vector, Any], Any]] = {
    "squared_error": squared_error,
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "poisson": poisson_loss,
    "gaussian_nll": gaussian_nll,
}


def target(name: str, t: Any) -> Any:
    """One example's target as the losses above take it: a label, or a list of numbers."""
    return int(t) if name == "cross_entropy" else numbers(t)


def kl(first: Vector, second: Vector) -> Any:
    """KL between the categorical distributions of two logit vectors, in the order given."""
    pairs = zip(probabilities(first), probabilities(second), strict=True)
    return sum(p * mpmath.log(p / q) for p, q in pairs)


def bernoulli_kl(first: Vector, second: Vector) -> Any:
    """KL between independent bits: the sum over both values of each."""
    total = mpmath.mpf(0)
    for a, b in zip(first, second, strict=True):
        for bit in (0, 1):
            p, q = bit_probability(a, bit), bit_probability(b, bit)
            total += p * mpmath.log(p / q)
    return total


def gaussian_kl(first: Vector, second: Vector) -> Any:
    """KL between independent Gaussians: the integral of p log(p / q), by the trapezoidal rule.

    On the analytic integrand, a polynomial times exp(-e^2 / 2), the rule with step h errs by
    exp(-2 pi^2 / h^2) (Trefethen, Weideman 2014), 1e-34 for h = 1/2; beyond 16 lies 1e-56.
    """
    half, total = len(first) // 2, mpmath.mpf(0)
    for d in range(half):
        m, s = first[d], first[half + d]
        for k in range(-32, 33):
            y = m + mpmath.exp(s) * k / 2
            p, q = density(y, m, s), density(y, second[d], second[half + d])
            total += mpmath.exp(s) / 2 * p * mpmath.log(p / q)
    return total


def poisson_kl(first: Vector, second: Vector, counts: int) -> Any:
    """KL between independent counts with given log rates: p log(p / q) summed from 0 on."""
    total = mpmath.mpf(0)
    for a, b in zip(first, second, strict=True):
        p, q = mpmath.exp(-mpmath.exp(a)), mpmath.exp(-mpmath.exp(b))
        for k in range(counts):
            total += p * mpmath.log(p / q)
            p, q = p * mpmath.exp(a) / (k + 1), q * mpmath.exp(b) / (k + 1)
    return total


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
    "bernoulli-kl-lookahead-current": bernoulli_kl,
    "bernoulli-kl-current-lookahead": lambda z, z0: bernoulli_kl(z0, z),
    "gaussian-kl-lookahead-current": gaussian_kl,
    "gaussian-kl-current-lookahead": lambda z, z0: gaussian_kl(z0, z),
    "bregman-binary-cross-entropy": lambda z, z0: bernoulli_kl(z0, z),
    "bregman-poisson": lambda z, z0: sum(
        mpmath.exp(a) - mpmath.exp(b) - mpmath.exp(b) * (a - b) for a, b in zip(z, z0, strict=True)
    ),
}


def _moved(point: Vector, steps: dict[int, Any]) -> Vector:
    return [value + steps.get(k, 0) for k, value in enumerate(point)]
