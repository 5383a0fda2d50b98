"""Output-space divergences rho(z, z0): how far the outputs z at theta' lie from z0 at theta.

| symbol | meaning | shape |
|---|---|---|
| z, z0 | outputs at theta' and at theta | (N, C) |
| rho | the divergence of each example; D_F is its mean over B' (P22 eq. 3) | (N,) |
| H_rho | d^2 rho / dz^2 at z = z0 (P22 eq. 34) | (N, C, C) |
| p, p0 | softmax(z), softmax(z0); sigmoid of them for independent bits | (N, C) |
| mu, s | the halves of z for Gaussians: mean and log sigma (at theta: mu0, s0) | (N, C/2) |
| psi | a convex potential of the outputs | (N,) |
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, final

import numpy as np

from reference.analytic import log_softmax, logsumexp, sigmoid, softmax, softplus
from reference.arrays import Array, one_of
from reference.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    Loss,
    PoissonLoss,
    SquaredError,
    bernoulli_covariance,
    categorical_covariance,
    diagonal_matrices,
    gaussian_fisher,
    mean_and_log_sigma,
)

ORDERS = ("lookahead_current", "current_lookahead")


class Discrepancy(ABC):
    """A divergence rho(z, z0) >= 0 of each example, zero at z = z0."""

    @abstractmethod
    def value(self, z: Array, z0: Array) -> Array:
        """rho(z, z0), (N,)."""

    @abstractmethod
    def gradient(self, z: Array, z0: Array) -> Array:
        """d rho / dz, (N, C)."""

    @abstractmethod
    def output_hessian(self, z0: Array) -> Array:
        """H_rho = d^2 rho / dz^2 at z = z0, (N, C, C)."""


@final
class SquaredEuclidean(Discrepancy):
    """rho = 1/2 ||z - z0||^2, H_rho = I; twice that without the half.

    Args:
        half: False gives ||z - z0||^2 as printed in P18 eq. 7.
    """

    def __init__(self, half: bool = True) -> None:
        self.half = half

    def value(self, z: Array, z0: Array) -> Array:
        """1/2 ||z - z0||^2 or ||z - z0||^2, (N,)."""
        return 0.5 * self._scale * np.sum((z - z0) ** 2, axis=1)

    def gradient(self, z: Array, z0: Array) -> Array:
        """z - z0 or 2 (z - z0), (N, C)."""
        return self._scale * (z - z0)

    def output_hessian(self, z0: Array) -> Array:
        """I or 2 I, (N, C, C)."""
        return np.broadcast_to(self._scale * np.eye(z0.shape[1]), (*z0.shape, z0.shape[1]))

    @property
    def _scale(self) -> float:
        return 1.0 if self.half else 2.0


@final
class CategoricalKL(Discrepancy):
    """The Kullback-Leibler divergence of categorical distributions given by logits.

    H_rho = diag(p0) - p0 p0^T in both orders.

    Args:
        order: "lookahead_current" is KL(p || p0), "current_lookahead" is KL(p0 || p).

    Source: P18 eq. 9, whose order is the default.
    """

    def __init__(self, order: str = "lookahead_current") -> None:
        self.order = one_of("order", order, ORDERS)

    def value(self, z: Array, z0: Array) -> Array:
        """sum_y p (log p - log p0) or sum_y p0 (log p0 - log p), (N,)."""
        r = log_softmax(z) - log_softmax(z0)
        if self.order == "lookahead_current":
            return np.sum(softmax(z) * r, axis=1)
        return -np.sum(softmax(z0) * r, axis=1)

    def gradient(self, z: Array, z0: Array) -> Array:
        """p (r - sum_y p r) with r = log p - log p0, or p - p0; (N, C)."""
        p = softmax(z)
        if self.order == "lookahead_current":
            r = log_softmax(z) - log_softmax(z0)
            return p * (r - np.sum(p * r, axis=1, keepdims=True))
        return p - softmax(z0)

    def output_hessian(self, z0: Array) -> Array:
        """diag(p0) - p0 p0^T, (N, C, C)."""
        return categorical_covariance(z0)


@final
class BernoulliKL(Discrepancy):
    """The Kullback-Leibler divergence of independent bits given by logits, summed over them.

    H_rho = diag(p0 (1 - p0)) in both orders.

    Args:
        order: "lookahead_current" is KL(p || p0), "current_lookahead" is KL(p0 || p).

    Source: P18 eq. 9; P22 section 4.3.
    """

    def __init__(self, order: str = "lookahead_current") -> None:
        self.order = one_of("order", order, ORDERS)

    def value(self, z: Array, z0: Array) -> Array:
        """sum_c p (z - z0) - softplus(z) + softplus(z0), or the same with z, z0 swapped; (N,)."""
        first, second = (z, z0) if self.order == "lookahead_current" else (z0, z)
        gap = softplus(second) - softplus(first)
        return np.sum(sigmoid(first) * (first - second) + gap, axis=1)

    def gradient(self, z: Array, z0: Array) -> Array:
        """p (1 - p) (z - z0), or p - p0; (N, C)."""
        p = sigmoid(z)
        return p * (1.0 - p) * (z - z0) if self.order == "lookahead_current" else p - sigmoid(z0)

    def output_hessian(self, z0: Array) -> Array:
        """diag(p0 (1 - p0)), (N, C, C)."""
        return bernoulli_covariance(z0)


@final
class GaussianKL(Discrepancy):
    """The Kullback-Leibler divergence of independent Gaussians, z = (mu, s), sigma = exp(s).

    H_rho = diag(1 / sigma0^2, 2) in both orders.

    Args:
        order: "lookahead_current" is KL(N || N0), "current_lookahead" is KL(N0 || N).

    Source: P18 eq. 9, with an integral over y; P22 section 4.3.
    """

    def __init__(self, order: str = "lookahead_current") -> None:
        self.order = one_of("order", order, ORDERS)

    def value(self, z: Array, z0: Array) -> Array:
        """sum_d s2 - s1 + (sigma1^2 + (mu1 - mu2)^2) / (2 sigma2^2) - 1/2 for KL(1 || 2); (N,)."""
        first, second = (z, z0) if self.order == "lookahead_current" else (z0, z)
        (mu1, s1), (mu2, s2) = mean_and_log_sigma(first), mean_and_log_sigma(second)
        e = (mu1 - mu2) * np.exp(-s2)
        return np.sum(s2 - s1 + 0.5 * (np.exp(2.0 * (s1 - s2)) + e**2 - 1.0), axis=1)

    def gradient(self, z: Array, z0: Array) -> Array:
        """(N, C): (m / sigma0^2, r^2 - 1), or (m / sigma^2, 1 - r^-2 - (m / sigma)^2).

        Here m = mu - mu0 and r = sigma / sigma0.
        """
        (mu, s), (mu0, s0) = mean_and_log_sigma(z), mean_and_log_sigma(z0)
        m, r2 = mu - mu0, np.exp(2.0 * (s - s0))
        if self.order == "lookahead_current":
            return np.concatenate([m * np.exp(-2.0 * s0), r2 - 1.0], axis=1)
        slope = m * np.exp(-2.0 * s)
        return np.concatenate([slope, 1.0 - 1.0 / r2 - m * slope], axis=1)

    def output_hessian(self, z0: Array) -> Array:
        """diag(1 / sigma0^2, 2), (N, C, C)."""
        return gaussian_fisher(mean_and_log_sigma(z0)[1])


class Potential(NamedTuple):
    """A convex psi(z) with its gradient and Hessian."""

    value: Callable[[Array], Array]
    gradient: Callable[[Array], Array]
    hessian: Callable[[Array], Array]


POTENTIALS: dict[str, Potential] = {
    "squared_error": Potential(
        lambda z: 0.5 * np.sum(z * z, axis=1),
        lambda z: z,
        lambda z: np.broadcast_to(np.eye(z.shape[1]), (*z.shape, z.shape[1])),
    ),
    "cross_entropy": Potential(logsumexp, softmax, categorical_covariance),
    "binary_cross_entropy": Potential(
        lambda z: np.sum(softplus(z), axis=1), sigmoid, bernoulli_covariance
    ),
    "poisson": Potential(
        lambda z: np.sum(np.exp(z), axis=1), np.exp, lambda z: diagonal_matrices(np.exp(z))
    ),
}

_POTENTIAL_OF: dict[type[Loss], str] = {
    SquaredError: "squared_error",
    CrossEntropy: "cross_entropy",
    BinaryCrossEntropy: "binary_cross_entropy",
    PoissonLoss: "poisson",
}


@final
class Bregman(Discrepancy):
    """rho = psi(z) - psi(z0) - <grad psi(z0), z - z0>, H_rho = Hessian of psi at z0.

    A loss psi(z) - <t, z> + const has the divergence of its psi: the target drops out. Where it
    does not, eq. 8 is a different function for every target, and no divergence where the loss is
    not convex: it falls below zero. `GaussianNLL` in (mu, s) is such a loss.

    Args:
        potential: "squared_error" (psi = 1/2 ||z||^2), "cross_entropy" (logsumexp z),
            "binary_cross_entropy" (sum softplus z) or "poisson" (sum exp z).

    Source: P18 eq. 8.
    """

    def __init__(self, potential: str) -> None:
        self.potential = one_of("potential", potential, list(POTENTIALS))
        self._psi = POTENTIALS[self.potential]

    def value(self, z: Array, z0: Array) -> Array:
        """psi(z) - psi(z0) - <grad psi(z0), z - z0>, (N,)."""
        linear = np.sum(self._psi.gradient(z0) * (z - z0), axis=1)
        return self._psi.value(z) - self._psi.value(z0) - linear

    def gradient(self, z: Array, z0: Array) -> Array:
        """grad psi(z) - grad psi(z0), (N, C)."""
        return self._psi.gradient(z) - self._psi.gradient(z0)

    def output_hessian(self, z0: Array) -> Array:
        """The Hessian of psi at z0, (N, C, C)."""
        return self._psi.hessian(z0)


def bregman_of(loss: Loss) -> Bregman:
    """The Bregman divergence of a loss psi(z) - <t, z> + const.

    Source: P18 eq. 8; P22 section 3.2 (G is then the generalized Gauss-Newton matrix).

    Raises:
        ValueError: the loss is not of this form, or not convex.
    """
    if type(loss) not in _POTENTIAL_OF:
        raise ValueError(
            "`loss` must be convex and linear in its target, so that the target drops out of eq. "
            f"8, got {type(loss).__name__}; use the Kullback-Leibler divergence instead."
        )
    return Bregman(_POTENTIAL_OF[type(loss)])
