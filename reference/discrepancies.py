"""Output-space divergences rho(z, z0): how far the outputs z at theta' lie from z0 at theta.

| symbol | meaning | shape |
|---|---|---|
| z, z0 | outputs at theta' and at theta | (N, C) |
| rho | the divergence of each example; D_F is its mean over B' (P22 eq. 3) | (N,) |
| H_rho | d^2 rho / dz^2 at z = z0 (P22 eq. 34) | (N, C, C) |
| p, p0 | softmax(z), softmax(z0) | (N, C) |
| psi | a convex potential of the outputs | (N,) |
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, final

import numpy as np

from reference.analytic import log_softmax, logsumexp, softmax
from reference.arrays import Array, one_of
from reference.losses import categorical_covariance


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
        self.order = one_of("order", order, ["lookahead_current", "current_lookahead"])

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
}


@final
class Bregman(Discrepancy):
    """rho = psi(z) - psi(z0) - <grad psi(z0), z - z0>, H_rho = Hessian of psi at z0.

    A loss psi(z) - <t, z> + const has the divergence of its psi: the target drops out.

    Args:
        potential: "squared_error" (psi = 1/2 ||z||^2) or "cross_entropy" (psi = logsumexp z).

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
