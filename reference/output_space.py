"""Idealized APO in output space: the proximal step solved exactly over a manifold M of outputs.

| symbol | meaning | shape |
|---|---|---|
| Z_k | outputs on all training examples at iteration k | (d,) |
| L(Z) | total loss; `gradient` and `hessian` are its derivatives at Z | (d,), (d, d) |
| g_k | effective gradient: the projection of grad L(Z_k) onto T_Z M | (d,) |
| lambda | weight of the dissimilarity, without a half | > 0 |
| L | Lipschitz constant of grad L (P18 A1) | >= 0 |
| C, G | bounds on the curvature of M and on ||grad L|| | >= 0 |
| gamma | 1 / (2 lambda) in the model of the step | > 0 |
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from reference.arrays import Array, non_negative
from reference.manifolds import Manifold, OutputSet


class OutputLoss(NamedTuple):
    """L(Z) of all outputs with its derivatives."""

    value: Callable[[Array], float]
    gradient: Callable[[Array], Array]  # (d,)
    hessian: Callable[[Array], Array]  # (d, d)


def effective_gradient(manifold: Manifold, Z: Array, gradient: Array) -> Array:
    """g = U U^T grad L with U a basis of T_Z M, (d,): zero at a stationary point of the network.

    Source: P18 section 3.1.
    """
    U = manifold.tangent(Z)
    return U @ (U.T @ gradient)


def projected_gradient_step(manifold: OutputSet, Z: Array, gradient: Array, weight: float) -> Array:
    """arg min over M of <grad L, Z' - Z> + lambda ||Z' - Z||^2, (d,).

    Completing the square makes it the projection of Z - grad L / (2 lambda).

    Args:
        manifold: M.
        Z: (d,).
        gradient: grad L(Z), (d,).
        weight: lambda > 0.

    Source: P18 eq. 13 with eq. 4 and eq. 7; as a projection eq. 14.
    """
    weight = _positive("weight", weight)
    return manifold.project(Z - gradient / (2.0 * weight))


def proximal_newton_step(manifold: OutputSet, Z: Array, gradient: Array, hessian: Array) -> Array:
    """arg min over M of <grad L, Z' - Z> + 1/2 (Z' - Z)^T H (Z' - Z), (d,).

    Source: P18 eq. 17.
    """
    return manifold.minimize(hessian, gradient - hessian @ Z)


def model_change(Z: Array, new: Array, gradient: Array, gamma: float) -> float:
    """<grad L(Z), Z' - Z> + ||Z' - Z||^2 / (2 gamma): what the step minimizes, at Z'.

    Source: P18 Lemma 1, left-hand side.
    """
    d = new - Z
    return float(gradient @ d + d @ d / (2.0 * gamma))


def lemma_1_point(
    manifold: Manifold, Z: Array, gradient: Array, gamma: float, fraction: float = 1.0
) -> Array:
    """v(fraction * gamma ||g||) on the geodesic that leaves Z along -g, (d,).

    With fraction = 1 the point of Lemma 1's proof; with 1/2 it serves up to gamma = 1 / (C G).

    Differs from the paper: its proof writes v'(0) = +g / ||g||, which climbs.

    Source: P18 Lemma 1.
    """
    g = effective_gradient(manifold, Z, gradient)
    norm = float(np.linalg.norm(g))
    return Z if norm == 0.0 else manifold.geodesic(Z, -g / norm, fraction * gamma * norm)


class Trajectory(NamedTuple):
    """Iterates Z_0 ... Z_T with their losses and effective gradients."""

    Z: Array  # (T + 1, d)
    loss: Array  # (T + 1,)
    gradient_norm: Array  # ||g_k||, (T + 1,)


def projected_gradient_descent(
    manifold: Manifold, loss: OutputLoss, start: Array, weight: float, steps: int
) -> Trajectory:
    """Z_0, then `steps` times the projected gradient step.

    Source: P18 eq. 14.
    """
    points = [start]
    for _ in range(steps):
        Z = points[-1]
        points.append(projected_gradient_step(manifold, Z, loss.gradient(Z), weight))
    norms = [np.linalg.norm(effective_gradient(manifold, Z, loss.gradient(Z))) for Z in points]
    return Trajectory(np.array(points), np.array([loss.value(Z) for Z in points]), np.array(norms))


def proximal_newton(manifold: OutputSet, loss: OutputLoss, start: Array, steps: int) -> Array:
    """Z_0, then `steps` times the proximal Newton step, (steps + 1, d).

    Source: P18 eq. 17.
    """
    points = [start]
    for _ in range(steps):
        Z = points[-1]
        points.append(proximal_newton_step(manifold, Z, loss.gradient(Z), loss.hessian(Z)))
    return np.array(points)


def printed_weight(L: float, C: float, G: float) -> float:
    """max(C G, L / 4): the least lambda of P18 Theorem 1 as printed. It does not suffice."""
    return max(C * G, L / 4.0)


def sufficient_weight(L: float, C: float, G: float) -> float:
    """max(C G, L) / 2: the least lambda with which Theorem 1 holds, and with 8 in place of 16.

    The step minimizes the model with lambda, hence lambda >= L / 2 is needed for the loss to fall
    as the model does:

        L(Z_{k+1}) <= L(Z_k) + <grad L, d> + L/2 ||d||^2 <= L(Z_k) + min over M of the model.

    By Lemma 1 with gamma = 1 / (2 lambda), which holds up to gamma = 1 / (C G), the last term is
    at most -gamma/4 ||g_k||^2 = -||g_k||^2 / (8 lambda). The paper's proof bounds the decrease at
    the minimizer for lambda by the model with 2 lambda, which another point minimizes.

    For Lemma 1, let the geodesic go s = gamma ||g|| / 2 along -g. Its direction turns by at most
    C s, so it advances at least s - C^2 s^3 / 6 along -g, strays at most C s^2 / 2 across, and its
    chord is at most s. With y = gamma C G <= 1 and u = ||g|| / G the model is then at most

        gamma ||g||^2 (-1/2 + 1/8 + y^2 u^2 / 48 + y sqrt(1 - u^2) / 8) <= -gamma/4 ||g||^2.

    Source: P18 Theorem 1, corrected.
    """
    return max(C * G, L) / 2.0


def rate_bound(weight: float, steps: int, gap: float, constant: float = 16.0) -> float:
    """constant * lambda / T * (L(Z_0) - L*): bounds the least ||g_k||^2 of the first T iterations.

    Args:
        weight: lambda.
        steps: T >= 1.
        gap: L(Z_0) - L*.
        constant: 16 as printed, 8 with `sufficient_weight`.

    Source: P18 eq. 15, which bounds the square: the norm itself falls as O(1 / sqrt(T)).
    """
    return constant * weight * gap / steps


def curvature_free_bound(weight: float, L: float, steps: int, gap: float) -> float:
    """(L + 2 lambda)^2 / (lambda - L/2) / T * (L(Z_0) - L*), for any M and lambda > L/2.

    Bounds the least ||g_k||^2 of iterations 1 ... T, with no bound on curvature or gradient: the
    new point is stationary for the model, so ||g_{k+1}|| <= (L + 2 lambda) ||d||, and the model is
    not above 0, so the loss falls by at least (lambda - L/2) ||d||^2.

    Raises:
        ValueError: lambda <= L/2.
    """
    if not weight > L / 2.0:
        raise ValueError(f"`weight` must exceed L / 2 = {L / 2.0}, got {weight}; raise it.")
    return (L + 2.0 * weight) ** 2 / (weight - L / 2.0) * gap / steps


def _positive(name: str, value: float) -> float:
    if not non_negative(name, value) > 0.0:
        raise ValueError(f"`{name}` must be positive, got {value}; the step would be unbounded.")
    return float(value)
