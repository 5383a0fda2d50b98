"""Elementary functions that stay analytic: f(x + ih) = f(x) + ih f'(x) under a complex step.

No modulus and no ordering of complex numbers: a branch or a shift is chosen by the real part alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from reference.arrays import Array


class Activation(NamedTuple):
    """A hidden activation sigma and its derivative."""

    function: Callable[[Array], Array]
    slope: Callable[[Array], Array]


def sigmoid(s: Array) -> Array:
    """1 / (1 + exp(-s)), written by tanh, which does not overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * s))


def softplus(s: Array) -> Array:
    """log(1 + exp(s)); the larger of s and 0 is taken out, so that exp does not overflow."""
    positive = np.real(s) > 0.0
    return np.where(positive, s, 0.0) + np.log1p(np.exp(np.where(positive, -s, s)))


def logsumexp(z: Array) -> Array:
    """log sum_c exp(z_c) over the last axis."""
    shift = np.max(np.real(z), axis=-1, keepdims=True)
    return shift[..., 0] + np.log(np.sum(np.exp(z - shift), axis=-1))


def log_softmax(z: Array) -> Array:
    """z - logsumexp(z) over the last axis."""
    return z - logsumexp(z)[..., None]


def softmax(z: Array) -> Array:
    """exp(z_c) / sum_k exp(z_k) over the last axis."""
    return np.exp(log_softmax(z))


ACTIVATIONS: dict[str, Activation] = {
    "tanh": Activation(np.tanh, lambda s: 1.0 - np.tanh(s) ** 2),
    "sigmoid": Activation(sigmoid, lambda s: sigmoid(s) * (1.0 - sigmoid(s))),
    "relu": Activation(
        lambda s: np.where(np.real(s) > 0.0, s, 0.0), lambda s: (np.real(s) > 0.0).astype(float)
    ),
    "softplus": Activation(softplus, sigmoid),
    "identity": Activation(lambda s: s, np.ones_like),
}
