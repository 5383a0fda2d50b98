"""Losses L(z, t) of one example with their gradient and Hessian in the outputs z.

| symbol | meaning | shape |
|---|---|---|
| z | outputs | (N, C) |
| t | targets: real vectors, labels (cross-entropy), bits, counts (Poisson) | (N, C) or (N,) |
| p | softmax(z); sigmoid(z) for independent bits | (N, C) |
| mu, s | the halves of z in the Gaussian likelihood: mean and log sigma | (N, C/2) |

Each loss is the negative log-likelihood, up to a constant, of the model's predictive distribution
P_{y|x}(theta): a unit Gaussian around z, the categorical distribution p, independent bits with
logits z, independent counts with rates exp(z), or independent Gaussians with their own variances.

All but the last are convex in z, and of the form psi(z) - <t, z> + const. The Gaussian likelihood
in (mu, s) is neither.
"""

from abc import ABC, abstractmethod
from itertools import product
from typing import Any, NamedTuple, final

import numpy as np

from reference.analytic import logsumexp, sigmoid, softmax, softplus
from reference.arrays import Array, finite_array


class ModelTargets(NamedTuple):
    """Targets that stand for the model's predictive distribution, with their probabilities."""

    targets: list[Array]  # K arrays, each as a batch of targets
    probabilities: Array  # (N, K), rows sum to 1


class Loss(ABC):
    """A loss L(z, t) of one example; every method takes a batch."""

    @abstractmethod
    def value(self, z: Array, t: Any) -> Array:
        """L(z, t), (N,)."""

    @abstractmethod
    def gradient(self, z: Array, t: Any) -> Array:
        """dL/dz, (N, C)."""

    @abstractmethod
    def hessian(self, z: Array, t: Any) -> Array:
        """d^2 L/dz^2, (N, C, C)."""

    @abstractmethod
    def model_targets(self, z: Array) -> ModelTargets:
        """A finite set of targets over which the scores have P_{y|x}'s mean and covariance."""


@final
class SquaredError(Loss):
    """L = 1/2 ||z - t||^2, summed over the outputs; P_{y|x} = N(z, I)."""

    def value(self, z: Array, t: Any) -> Array:
        """1/2 ||z - t||^2, (N,)."""
        return 0.5 * np.sum(self.gradient(z, t) ** 2, axis=1)

    def gradient(self, z: Array, t: Any) -> Array:
        """z - t, (N, C)."""
        return z - finite_array("targets", t, z.shape)

    def hessian(self, z: Array, t: Any) -> Array:
        """I, (N, C, C)."""
        return np.broadcast_to(np.eye(z.shape[1]), (*z.shape, z.shape[1]))

    def model_targets(self, z: Array) -> ModelTargets:
        """z +- sqrt(C) e_c, each with probability 1/(2C): mean z and covariance I, as N(z, I)."""
        C = z.shape[1]
        points = np.sqrt(C) * np.concatenate([np.eye(C), -np.eye(C)])
        return ModelTargets([z + point for point in points], np.full((len(z), 2 * C), 0.5 / C))


@final
class CrossEntropy(Loss):
    """L = -log softmax(z)[t] = logsumexp(z) - z_t for integer labels t in [0, C)."""

    def value(self, z: Array, t: Any) -> Array:
        """logsumexp(z) - z_t, (N,)."""
        return logsumexp(z) - np.sum(z * _one_hot(t, z), axis=1)

    def gradient(self, z: Array, t: Any) -> Array:
        """p - e_t, (N, C)."""
        return softmax(z) - _one_hot(t, z)

    def hessian(self, z: Array, t: Any) -> Array:
        """diag(p) - p p^T, (N, C, C)."""
        return categorical_covariance(z)

    def model_targets(self, z: Array) -> ModelTargets:
        """Every label, with probability p."""
        N, C = z.shape
        return ModelTargets([np.full(N, label) for label in range(C)], softmax(z))


@final
class BinaryCrossEntropy(Loss):
    """L = sum_c softplus(z_c) - t_c z_c for independent bits t in {0, 1} with logits z."""

    def value(self, z: Array, t: Any) -> Array:
        """sum_c softplus(z_c) - t_c z_c, (N,)."""
        return np.sum(softplus(z) - _bits(t, z) * z, axis=1)

    def gradient(self, z: Array, t: Any) -> Array:
        """p - t, (N, C)."""
        return sigmoid(z) - _bits(t, z)

    def hessian(self, z: Array, t: Any) -> Array:
        """diag(p (1 - p)), (N, C, C)."""
        return bernoulli_covariance(z)

    def model_targets(self, z: Array) -> ModelTargets:
        """All 2^C vectors of bits, with the products of p and 1 - p."""
        p = sigmoid(z)
        bits = np.broadcast_to([0.0, 1.0], (*z.shape, 2))
        return _independent(bits, np.stack([1.0 - p, p], axis=2))


@final
class PoissonLoss(Loss):
    """L = sum_c exp(z_c) - t_c z_c: counts t with rates exp(z), without log t!.

    Any t >= 0 is allowed (a quasi-likelihood), as only the mean and the variance of t matter.
    """

    def value(self, z: Array, t: Any) -> Array:
        """sum_c exp(z_c) - t_c z_c, (N,)."""
        return np.sum(np.exp(z) - _counts(t, z) * z, axis=1)

    def gradient(self, z: Array, t: Any) -> Array:
        """exp(z) - t, (N, C)."""
        return np.exp(z) - _counts(t, z)

    def hessian(self, z: Array, t: Any) -> Array:
        """diag(exp z), (N, C, C)."""
        return diagonal_matrices(np.exp(z))

    def model_targets(self, z: Array) -> ModelTargets:
        """0 and 1 + r of each output with rate r = exp(z), with probabilities 1/(1 + r), r/(1 + r).

        The score t - r is linear in t, so that two points with the mean r and the variance r are
        exact, where a sum over finitely many counts is not.
        """
        r = np.exp(z)
        points = np.stack([np.zeros_like(r), 1.0 + r], axis=2)
        return _independent(points, np.stack([1.0 / (1.0 + r), r / (1.0 + r)], axis=2))


@final
class GaussianNLL(Loss):
    """L = sum_d s_d + 1/2 (t_d - mu_d)^2 exp(-2 s_d), z = (mu, s), sigma = exp(s); t is (N, C/2).

    Not convex: its Hessian is indefinite wherever t != mu. Not linear in t either, so that it has
    no Bregman divergence of its own; the Kullback-Leibler divergence is `GaussianKL`.
    """

    def value(self, z: Array, t: Any) -> Array:
        """sum_d s_d + 1/2 e_d^2 with e = (t - mu) / sigma, (N,)."""
        mu, s = mean_and_log_sigma(z)
        e = _standardized(mu, s, t)
        return np.sum(s + 0.5 * e**2, axis=1)

    def gradient(self, z: Array, t: Any) -> Array:
        """(-e / sigma, 1 - e^2), (N, C)."""
        mu, s = mean_and_log_sigma(z)
        e = _standardized(mu, s, t)
        return np.concatenate([-e * np.exp(-s), 1.0 - e**2], axis=1)

    def hessian(self, z: Array, t: Any) -> Array:
        """[[1 / sigma^2, 2 e / sigma], [2 e / sigma, 2 e^2]] for each pair, (N, C, C)."""
        mu, s = mean_and_log_sigma(z)
        e = _standardized(mu, s, t)
        cross = diagonal_matrices(2.0 * e * np.exp(-s))
        return np.block(
            [[diagonal_matrices(np.exp(-2.0 * s)), cross], [cross, diagonal_matrices(2.0 * e**2)]]
        )

    def model_targets(self, z: Array) -> ModelTargets:
        """mu + sigma e for e in {-sqrt 3, 0, sqrt 3}, with probabilities 1/6, 2/3, 1/6.

        Gauss-Hermite quadrature with three points: exact to degree 5 in e, and the product of two
        scores has degree 4.
        """
        mu, s = mean_and_log_sigma(z)
        nodes = np.sqrt(3.0) * np.array([-1.0, 0.0, 1.0])
        points = mu[:, :, None] + np.exp(s)[:, :, None] * nodes
        return _independent(points, np.broadcast_to([1 / 6, 2 / 3, 1 / 6], points.shape))


def mean_and_log_sigma(z: Array) -> tuple[Array, Array]:
    """The halves mu and s of z = (mu, s), each (N, C/2).

    Raises:
        ValueError: C is odd.
    """
    if z.shape[1] % 2:
        raise ValueError(
            f"`z` must hold means, then as many log sigmas, got {z.shape[1]} outputs; give the "
            "network an even number."
        )
    mu, s = np.split(z, 2, axis=1)
    return mu, s


def gaussian_fisher(s: Array) -> Array:
    """diag(1 / sigma^2, 2), (N, C, C), of s (N, C/2): the covariance of (e / sigma, e^2 - 1)."""
    return diagonal_matrices(np.concatenate([np.exp(-2.0 * s), np.full_like(s, 2.0)], axis=1))


def bernoulli_covariance(z: Array) -> Array:
    """diag(p (1 - p)) with p = sigmoid(z), (N, C, C): the covariance of independent bits."""
    p = sigmoid(z)
    return diagonal_matrices(p * (1.0 - p))


def diagonal_matrices(d: Array) -> Array:
    """diag(d_n) of every row, (N, C) -> (N, C, C)."""
    return d[:, :, None] * np.eye(d.shape[1])


def categorical_covariance(z: Array) -> Array:
    """diag(p) - p p^T with p = softmax(z), (N, C, C): the covariance of a one-hot label."""
    p = softmax(z)
    return p[:, :, None] * np.eye(z.shape[1]) - p[:, :, None] * p[:, None, :]


def _one_hot(t: Any, z: Array) -> Array:
    """e_t, (N, C), of checked labels."""
    labels = np.asarray(t)
    N, C = z.shape
    if labels.dtype.kind not in "iu" or labels.shape != (N,):
        raise ValueError(
            f"`targets` must be {N} integer labels, got dtype {labels.dtype} and shape "
            f"{labels.shape}; give class indices, not one-hot rows."
        )
    if labels.min() < 0 or labels.max() >= C:
        raise ValueError(
            f"`targets` must be labels in [0, {C}), got {labels.min()}..{labels.max()}; "
            "renumber them."
        )
    return np.eye(C)[labels]


def _bits(t: Any, z: Array) -> Array:
    """Checked targets in {0, 1}, (N, C)."""
    bits = finite_array("targets", t, z.shape)
    if not np.isin(bits, (0.0, 1.0)).all():
        raise ValueError(
            f"`targets` must be 0 or 1, got {bits.min()}..{bits.max()}; give bits, not labels."
        )
    return bits


def _counts(t: Any, z: Array) -> Array:
    """Checked targets >= 0, (N, C)."""
    counts = finite_array("targets", t, z.shape)
    if counts.min() < 0.0:
        raise ValueError(f"`targets` must be non-negative, got {counts.min()}; give counts.")
    return counts


def _standardized(mu: Array, s: Array, t: Any) -> Array:
    """e = (t - mu) / sigma of checked targets, (N, C/2)."""
    return (finite_array("targets", t, mu.shape) - mu) * np.exp(-s)


def _independent(points: Array, probabilities: Array) -> ModelTargets:
    """Every combination of each target's K points, (N, D, K), with the product of probabilities."""
    D, K = points.shape[1:]
    choices = [(np.arange(D), list(choice)) for choice in product(range(K), repeat=D)]
    weights = [np.prod(probabilities[:, d, k], axis=1) for d, k in choices]
    return ModelTargets([points[:, d, k] for d, k in choices], np.stack(weights, axis=1))
