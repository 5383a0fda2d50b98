"""How far Algorithm 1 may be from P* after T meta-steps: a bound that holds at any T.

symbol   shape    meaning
ĝ_t      (K,)     the meta-gradient of step t, on the random B_t and B'_t
μ_t      (K,)     E[ĝ_t | φ_t], the mean over all pairs of mini-batches: an exact sum
N        (K,)     Σ_t (ĝ_t − μ_t), what the draws of mini-batches did
H        (K, K)   the Hessian of Q̂ in φ at φ*; μ(φ) = H (φ − φ*) + r(φ)
h        (D, K)   directions in which N is judged
δ                 the rate of false alarms of one run
α                 the learning rate of SGD as the meta-optimizer

With SGD Σ ĝ_t = (φ_0 − φ_T) / α, so that the averaged iterate φ̄ = Σ φ_t / T has

    φ̄ − φ* = H⁻¹ (φ_0 − φ_T) / (αT) − H⁻¹ Σ r(φ_t) / T − H⁻¹ N / T.

The first two parts, what is left of the start and the curvature of Q̂, are known from the path. N is
a martingale: with λ > 0 fixed before, E exp(λ hᵀN − Σ_t log E[exp(λ hᵀ(ĝ_t − μ_t)) | φ_t]) = 1, and
by Markov's inequality, with probability at least 1 − δ for all D directions and both signs,

    λ hᵀN ≤ log(2D/δ) + Σ_t log E[exp(λ hᵀ(ĝ_t − μ_t)) | φ_t].

The expectations are sums over the pairs too, so nothing is assumed Gaussian, stationary or small:
the false-alarm rate is at most δ, also where θ moves or another meta-optimizer moves φ. The best λ
for a variance v a step is √(2 log(2D/δ) / (Tv)); then the bound is near √(2 log(2D/δ) Tv), that is
5.4 standard deviations for δ = 1e-6 and D = 1, where a Gaussian's own quantile is 4.9.
"""

from __future__ import annotations

import math
from typing import NamedTuple, final

import numpy as np

from reference.arrays import Array
from verification.l3_statistics.populations import Structure

FALSE_ALARM = 1e-6


def pair_gradients(family: Structure, phi: Array, gradients: Array, M: Array) -> Array:
    """ĝ_ij of every pair: −p'(φ) (P_k g_i)ᵀ q_ij with q_ij = g_i − M_ij P g_i.

    Args:
        family: gives the P_k.
        phi: (K,).
        gradients: g_i, (m, n).
        M: M_ij, (m, m, n, n).

    Returns:
        One row for each pair, (m·m, K).
    """
    steps = np.einsum("kab,ib->ika", family.basis, gradients)
    moves = gradients @ family.preconditioner(phi).T
    q = gradients[:, None] - np.einsum("ijab,ib->ija", M, moves)
    by_p = -np.einsum("ika,ija->ijk", steps, q)
    return (family.coordinates.slope(phi) * by_p).reshape(-1, len(phi))


class Optimum(NamedTuple):
    """Where E ĝ vanishes.

    Attributes:
        phi: φ*, (K,).
        H: the Hessian of Q̂ there, (K, K).
        S: the covariance of ĝ there, (K, K).
        scale: p* / p'(φ*): along it ĝ says whether all of P is too large, (K,).
    """

    phi: Array
    H: Array
    S: Array
    scale: Array


def optimum(family: Structure, gradients: Array, M: Array) -> Optimum:
    """H_p p* = b with H_p = E[gᵀP_kᵀ M P_l g] and b = E[gᵀP_k g], in the coordinates of φ."""
    steps = np.einsum("kab,ib->ika", family.basis, gradients)
    H = np.einsum("ika,iab,ilb->kl", steps, M.mean(1), steps, optimize=True) / len(gradients)
    b = np.einsum("ika,ia->k", steps, gradients) / len(gradients)
    p = np.linalg.solve(H, b)
    phi = family.coordinates.inverse(p)
    assert np.all(np.isfinite(phi)), f"the population promises p* that has a φ, got {p}"
    slope = family.coordinates.slope(phi)
    pairs = pair_gradients(family, phi, gradients, M)
    S = (pairs - pairs.mean(0)).T @ (pairs - pairs.mean(0)) / len(pairs)
    return Optimum(phi, slope[:, None] * H * slope, S, p / slope)


@final
class Confidence:
    """The bounds of hᵀN over the steps that were added.

    Args:
        directions: h, (D, K), chosen before the run.
        S: about the covariance of ĝ, (K, K): how tight the bounds are, not whether they hold.
        steps: T.
        false_alarm: δ.

    Attributes:
        expected: Σ_t μ_t, (K,).
        directions: as given.
    """

    def __init__(
        self, directions: Array, S: Array, steps: int, false_alarm: float = FALSE_ALARM
    ) -> None:
        self.directions = directions
        self.expected = np.zeros(directions.shape[1])
        self._threshold = math.log(2 * len(directions) / false_alarm)
        variances = np.einsum("dk,kl,dl->d", directions, S, directions)
        self._tilts = np.sqrt(2 * self._threshold / (steps * variances))
        self._above = np.zeros(len(directions))
        self._below = np.zeros(len(directions))

    def add(self, pairs: Array, times: int = 1) -> Array:
        """`times` steps whose meta-gradient is any row of `pairs` (m·m, K); returns their μ_t."""
        mu = pairs.mean(0)
        exponents = (pairs - mu) @ self.directions.T * self._tilts
        self._above += times * np.log(np.exp(exponents).mean(0))
        self._below += times * np.log(np.exp(-exponents).mean(0))
        self.expected += times * mu
        return mu

    @property
    def upper(self) -> Array:
        """What hᵀN may reach, (D,)."""
        return (self._threshold + self._above) / self._tilts

    @property
    def lower(self) -> Array:
        """What −hᵀN may reach, with its sign, (D,)."""
        return -(self._threshold + self._below) / self._tilts

    def alarm(self, total: Array) -> float:
        """Above 1 where Σ ĝ_t = `total` (K,) is not explained: the worst hᵀN over its bound."""
        noise = self.directions @ (total - self.expected)
        return float(np.max(np.maximum(noise / self.upper, noise / self.lower)))

    def half_widths(self) -> Array:
        """The larger of both bounds, (D,)."""
        return np.maximum(self.upper, -self.lower)
