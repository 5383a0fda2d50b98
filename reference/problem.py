"""The cost function J_B(theta) of a network and a loss on a batch, with its derivatives.

| symbol | meaning | shape |
|---|---|---|
| J_B | mean over the batch of L(f(x, theta), t) (P22 eq. 2) | scalar |
| g | its gradient, E[J^T dL/dz] | (n,) |
| H | its Hessian | (n, n) |
"""

from collections.abc import Callable
from typing import Any, NamedTuple, final

import numpy as np

from reference.arrays import Array
from reference.losses import Loss
from reference.networks import Network

# The truncation error of a complex step is h^2; no difference is taken, so h can be this small.
COMPLEX_STEP = 1e-30


class Batch(NamedTuple):
    """A mini-batch B."""

    inputs: Array  # (N, d)
    targets: Array  # (N, C) or (N,)


@final
class Problem:
    """J_B(theta) = E_{(x, t) in B} L(f(x, theta), t).

    Source: P22 eq. 2.
    """

    def __init__(self, network: Network, loss: Loss) -> None:
        self.network = network
        self.loss = loss

    def value(self, theta: Any, X: Any, T: Any) -> Any:
        """J_B(theta), a scalar (complex for a complex theta)."""
        return np.mean(self.loss.value(self.network.outputs(theta, X), T))

    def example_gradients(self, theta: Any, X: Any, T: Any) -> Array:
        """J^T dL/dz of every example, (N, n)."""
        dz = self.loss.gradient(self.network.outputs(theta, X), T)
        return np.einsum("nci,nc->ni", self.network.jacobian(theta, X), dz)

    def gradient(self, theta: Any, X: Any, T: Any) -> Array:
        """g = E[J^T dL/dz], (n,)."""
        return np.mean(self.example_gradients(theta, X, T), axis=0)

    def hessian(self, theta: Any, X: Any, T: Any) -> Array:
        """H = d g / d theta, (n, n), by complex steps: exact to rounding for analytic networks."""
        return symmetric_part(complex_step_jacobian(lambda u: self.gradient(u, X, T), theta))


def complex_step_jacobian(function: Callable[[Array], Array], theta: Any) -> Array:
    """Column k is Im f(theta + i h e_k) / h, for f analytic from (n,) to (m,); (m, n)."""
    theta = np.asarray(theta, dtype=float)
    steps = 1j * COMPLEX_STEP * np.eye(len(theta))
    return np.stack([np.imag(function(theta + s)) / COMPLEX_STEP for s in steps], axis=-1)


def symmetric_part(matrix: Array) -> Array:
    """(M + M^T) / 2: removes the rounding error by which a computed Hessian is not symmetric."""
    return 0.5 * (matrix + matrix.T)
