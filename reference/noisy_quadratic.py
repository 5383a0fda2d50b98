"""The noisy quadratic: f(x) = a x^T H x, of which SGD sees f~(x) = a (x - c)^T H (x - c).

| symbol | here | shape |
|---|---|---|
| H | diag(h), h > 0 | (n,) |
| a | 1/2, or 1 as P18 prints it; the Hessian is 2 a H | scalar |
| c | the noise, c_i ~ N(0, v_i), drawn afresh for each mini-batch; v = 1/h in P18 | (n,) |
| g | the gradient of f~ at x, 2 a h (x - c) | (n,) |
| mu, m | E[x] and E[x^2] | (n,) |
| eta | learning rate: x <- x - eta g | scalar |
| lambda | `wsd_weight`, of lambda/2 ||x' - x||^2 (P18's lambda is half of it) | >= 0 |

The moments of x follow exactly from those of the step before, as long as eta does not depend on
this step's c: mu <- (1 - s h) mu and m <- (1 - s h)^2 m + (s h)^2 v, with s = 2 a eta.

One mini-batch c gives the step. P22 eq. 12 measures the loss after it on the same c, eq. 13 on
another. What each prefers differs by the noise's share in the gradient alone:

    eta_12 = E||g||^2 / (E[g^T 2aH g] + lambda E||g||^2),  eta_13 = eta_12 E||grad f||^2 / E||g||^2
"""

from typing import Any, NamedTuple, final

import numpy as np

from reference.arrays import Array, finite_array, non_negative


class Moments(NamedTuple):
    """First and second moments of every coordinate, (n,) each."""

    mean: Array
    second: Array


@final
class NoisyQuadratic:
    """f(x) = a sum_i h_i x_i^2, its noisy twin f~, and what SGD on f~ does to the moments of x.

    Args:
        h: the diagonal of H, positive, (n,).
        v: the variances of c, non-negative, (n,); 1/h if None.
        half: a = 1/2; False gives a = 1, as printed.

    Source: P18 appendix F.

    Raises:
        ValueError: a shape is wrong, an h is not positive, or a v is negative.
    """

    def __init__(self, h: Any, v: Any = None, half: bool = True) -> None:
        self.h = finite_array("h", h, ("n",))
        if self.h.min() <= 0.0:
            raise ValueError(
                f"`h` must be positive, got smallest entry {self.h.min()}; leave flat "
                "directions out."
            )
        self.v = 1.0 / self.h if v is None else finite_array("v", v, self.h.shape)
        if self.v.min() < 0.0:
            raise ValueError(
                f"`v` must be non-negative, got smallest entry {self.v.min()}; give variances."
            )
        self.a = 0.5 if half else 1.0
        self.curvature = 2.0 * self.a * self.h  # the Hessian's diagonal, (n,)

    def noisy_value(self, x: Any, c: Any) -> Any:
        """f~(x) = a sum_i h_i (x_i - c_i)^2, over the last axis; f(x) for c = 0."""
        return self.a * np.sum(self.h * (np.asarray(x) - c) ** 2, axis=-1)

    def noisy_gradient(self, x: Any, c: Any) -> Array:
        """g = 2 a h (x - c), (..., n)."""
        return self.curvature * (np.asarray(x) - c)

    def expected_loss(self, second: Any) -> Any:
        """E f(x) = a sum_i h_i m_i."""
        return self.a * (self.h @ second)

    def start(self, x: Any) -> Moments:
        """The moments of a known x, (n,)."""
        x = finite_array("x", x, self.h.shape)
        return Moments(x, x**2)

    def step(self, moments: Moments, eta: Any) -> Moments:
        """The moments after x <- x - eta g, for an eta that does not depend on this g."""
        sh = eta * self.curvature
        return Moments((1.0 - sh) * moments.mean, (1.0 - sh) ** 2 * moments.second + sh**2 * self.v)

    def power(self, second: Any) -> Any:
        """E||g||^2 = sum_i (2 a h_i)^2 (m_i + v_i)."""
        return self.curvature**2 @ (second + self.v)

    def signal(self, second: Any) -> Any:
        """E||grad f||^2 = sum_i (2 a h_i)^2 m_i: the part of the power that is no noise."""
        return self.curvature**2 @ second

    def bend(self, second: Any) -> Any:
        """E[g^T 2aH g] = sum_i (2 a h_i)^3 (m_i + v_i)."""
        return (self.curvature * self.curvature**2) @ (second + self.v)


def evenly_spaced(
    n: int = 1000, low: float = 0.01, high: float = 1.0, half: bool = True
) -> NoisyQuadratic:
    """The problem of P18 table 2: n eigenvalues evenly in [low, high], both ends among them.

    Source: P18 appendix F.
    """
    return NoisyQuadratic(np.linspace(low, high, n), half=half)


def same_batch_rate(problem: NoisyQuadratic, second: Any, wsd_weight: float = 0.0) -> Any:
    """eta_12 = arg min E[f~_c(x - eta g_c) + lambda/2 eta^2 ||g_c||^2], one rate for every c.

    1 / (2 a h_max + lambda) <= eta_12 <= 1 / (2 a h_min + lambda), whatever the moments are.

    Source: P22 eq. 12 with lambda_FSD = 0; P18 appendix F.
    """
    power = problem.power(second)
    return power / (problem.bend(second) + non_negative("wsd_weight", wsd_weight) * power)


def other_batch_rate(problem: NoisyQuadratic, second: Any, wsd_weight: float = 0.0) -> Any:
    """eta_13 = arg min E[f~_c'(x - eta g_c) + lambda/2 eta^2 ||g_c||^2] with c' independent of c.

    eta_13 = eta_12 * signal / power: it vanishes in proportion to the signal's share.

    Source: P22 eq. 13 with lambda_FSD = 0; the greedy rate of Wu et al. (2018) for lambda = 0.
    """
    share = problem.signal(second) / problem.power(second)
    return share * same_batch_rate(problem, second, wsd_weight)


def sample_rate(problem: NoisyQuadratic, x: Any, c: Any, wsd_weight: float = 0.0) -> Any:
    """arg min_eta f~_c(x - eta g) + lambda/2 eta^2 ||g||^2 = g^T g / (g^T 2aH g + lambda g^T g).

    Unlike `same_batch_rate`, for this one x and c; over the last axis.
    """
    g = problem.noisy_gradient(x, c)
    power = np.sum(g**2, axis=-1)
    bend = np.sum(problem.curvature * g**2, axis=-1)
    return power / (bend + non_negative("wsd_weight", wsd_weight) * power)
