"""Losses L(z, t) of one example with their gradient and Hessian in the outputs z.

| symbol | meaning | shape |
|---|---|---|
| z | outputs | (N, C) |
| t | targets: real vectors (squared error), integer labels (cross-entropy) | (N, C) or (N,) |
| p | softmax(z) | (N, C) |

Each loss is the negative log-likelihood, up to a constant, of the model's predictive distribution
P_{y|x}(theta): a unit Gaussian around z, or the categorical distribution p.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, final

import numpy as np

from reference.analytic import logsumexp, softmax
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
        """A finite set of targets over which every quadratic in y has its mean under P_{y|x}."""


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
