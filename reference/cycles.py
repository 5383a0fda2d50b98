"""Manifolds and losses on which P18 Theorem 1 fails as printed: the step enters a two-cycle.

Each `Cycle` meets the printed condition lambda >= max(C G, L / 4), has a non-zero effective
gradient at both of its points, and returns to its start after two steps. The left side of eq. 15
then stays where it is while the right side falls as 1 / T.

| symbol | meaning |
|---|---|
| r | lambda / L |
| s, c | sine and cosine of the angle between the loss's steep direction and the normal of M |
| w | half the distance between two branches of M |
| h | where the loss turns from quadratic to linear, which bounds its gradient |
"""

from typing import NamedTuple

import numpy as np

from reference.arrays import Array
from reference.manifolds import Affine, Manifold, Parametrized, Sphere
from reference.output_space import OutputLoss


class Cycle(NamedTuple):
    """A manifold, a loss and a start, with the constants that Theorem 1 asks for."""

    manifold: Manifold
    loss: OutputLoss
    start: Array
    weight: float  # lambda
    L: float
    C: float
    G: float  # bounds ||grad L|| on M; infinite where C = 0 does without it
    lowest: float  # a lower bound of the loss on M


def line_cycle() -> Cycle:
    """M = R, loss Z^2 / 2, lambda = L / 4: Z_{k+1} = Z_k - 2 Z_k = -Z_k. The smallest of all."""
    line = Affine(np.zeros(1), np.eye(1))
    loss = OutputLoss(lambda Z: float(0.5 * Z @ Z), lambda Z: Z, lambda Z: np.eye(1))
    return Cycle(line, loss, np.ones(1), 0.25, 1.0, 0.0, np.inf, 0.0)


def circle_cycle(ratio: float, bend: float) -> Cycle:
    """A circle of curvature C = bend with a loss that pulls outwards: r < (1 + C G / L) / 4 cycles.

    Around the stationary point (1/C, 0) the loss along the circle has curvature L - C G, the model
    2 lambda - C G: one step multiplies the distance from it by (2 lambda - L) / (2 lambda - C G).

    Args:
        ratio: r, with C G <= lambda.
        bend: C G / L with G = L = 1.
    """
    h = 0.05
    pull = np.sqrt(1.0 - h * h)
    radius = 1.0 / bend

    def gradient(Z: Array) -> Array:
        return np.array([pull, np.clip(Z[1], -h, h)])

    loss = OutputLoss(
        lambda Z: float(pull * Z[0] + _huber(Z[1], h)),
        gradient,
        lambda Z: np.diag([0.0, float(abs(Z[1]) < h)]),
    )
    angle = 0.5 * h / radius
    start = radius * np.array([np.cos(angle), np.sin(angle)])
    return Cycle(Sphere(np.zeros(2), radius), loss, start, ratio, 1.0, bend, 1.0, -pull * radius)


def helix_cycle(ratio: float, radius: float = 500.0) -> Cycle:
    """Two turns of a helix, nearly straight and parallel near the origin: every r < 1/2 cycles.

    The loss is L/2 (s y + c z)^2 with s^2 = 1 - 2 r, which is below the bound 2 - 4 r up to which
    the nearest point to the step's target lies on the other turn. On straight lines z = +-w the
    cycle's points are +-(y, w) with y = s c w / (6 r - 1).

    Args:
        ratio: r in (1/6, 1/2); L = 1.
        radius: of the helix with w = 1; C G is about 2 / radius.
    """
    if not 1.0 / 6.0 < ratio < 0.5:
        raise ValueError(f"`ratio` must lie in (1/6, 1/2), got {ratio}; outside no cycle exists.")
    rise = 1.0 / np.pi  # two neighbouring turns pass the origin at z = +-1
    s, c = np.sqrt(1.0 - 2.0 * ratio), np.sqrt(2.0 * ratio)
    steep = np.array([0.0, s, c])
    y = s * c / (6.0 * ratio - 1.0)
    h = 1.5 * (s * y + c)  # beyond both points of the cycle

    def point(t: Array) -> Array:
        return np.array([radius * (1.0 + np.cos(t[0])), radius * np.sin(t[0]), rise * t[0]])

    def jacobian(t: Array) -> Array:
        return np.array([[-radius * np.sin(t[0])], [radius * np.cos(t[0])], [rise]])

    # Four turns, as far along each as a step's target can lie; the rest of the helix is farther.
    near = np.linspace(-6.0, 6.0, 241) / radius
    grid = np.concatenate([turn * np.pi + near for turn in (-3, -1, 1, 3)])[:, None]
    curvature = radius / (radius**2 + rise**2)
    loss = OutputLoss(
        lambda Z: _huber(float(steep @ Z), h),
        lambda Z: np.clip(steep @ Z, -h, h) * steep,
        lambda Z: float(abs(steep @ Z) < h) * np.outer(steep, steep),
    )
    start = point(np.array([np.pi - y / radius]))
    helix = Parametrized(point, jacobian, grid, curvature)
    return Cycle(helix, loss, start, ratio, 1.0, curvature, h, 0.0)


def failing_horizon(cycle: Cycle, gradient_norm: float) -> int:
    """The least T at which eq. 15 as printed fails if ||g_k|| >= `gradient_norm` for all k < T."""
    gap = cycle.loss.value(cycle.start) - cycle.lowest
    return int(np.floor(16.0 * cycle.weight * gap / gradient_norm**2)) + 1


def _huber(u: float, h: float) -> float:
    """u^2 / 2 up to |u| = h, then the straight line of slope h."""
    return float(0.5 * u * u if abs(u) <= h else h * (abs(u) - 0.5 * h))
