"""Update rules theta' = u(theta, phi, g) and the preconditioner of P22 eq. 9.

| symbol | meaning | shape |
|---|---|---|
| theta, g | parameters, mini-batch gradient | (n,) |
| eta | learning rate > 0, one or one for each layer | scalar, (L,) |
| v, mu | momentum buffer, momentum in [0, 1) | (n,), scalar |
| P | preconditioner | (n, n) |
| A, B, S | the blocks of eq. 9 for a weight W (out, in) | (in, in), (out, out), (out, in) |
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import block_diag

from reference.arrays import Array, finite_array, vec
from reference.networks import Layer


class MomentumStep(NamedTuple):
    """theta' and the new momentum buffer."""

    theta: Array
    velocity: Array


class RMSpropStep(NamedTuple):
    """theta' and the new second moment."""

    theta: Array
    square_avg: Array


class AdamStep(NamedTuple):
    """theta' and the new moments."""

    theta: Array
    m: Array
    v: Array


class EKFACBlocks(NamedTuple):
    """phi of one layer: A (in, in), B (out, out), S (out, in)."""

    A: Array
    B: Array
    S: Array


def sgd(theta: Array, g: Array, eta: float) -> Array:
    """theta' = theta - eta g.

    Source: P22 eq. 6.
    """
    return theta - eta * g


def sgd_per_layer(theta: Array, g: Array, eta: Array, layers: Sequence[Layer]) -> Array:
    """theta'_l = theta_l - eta_l g_l, for `eta` (L,)."""
    return theta - per_layer_rates(eta, layers) * g


def heavy_ball(theta: Array, g: Array, v: Array, eta: float, mu: float) -> MomentumStep:
    """v <- mu v + g, theta' = theta - eta v."""
    v = mu * v + g
    return MomentumStep(theta - eta * v, v)


def nesterov(theta: Array, g: Array, v: Array, eta: float, mu: float) -> MomentumStep:
    """v <- mu v + g, theta' = theta - eta (g + mu v).

    Source: P18 eq. 18-19.
    """
    v = mu * v + g
    return MomentumStep(theta - eta * (g + mu * v), v)


def rmsprop(
    theta: Array, g: Array, s: Array, eta: Any, rho: Any, eps: Any, gamma: float
) -> RMSpropStep:
    """s <- gamma s + (1 - gamma) g^2, theta' = theta - eta g / (s^rho + eps).

    Source: P18 eq. 20-21.
    """
    s = gamma * s + (1.0 - gamma) * g**2
    return RMSpropStep(theta - eta / (s**rho + eps) * g, s)


def adam(
    theta: Array,
    g: Array,
    m: Array,
    v: Array,
    t: int,
    eta: Any,
    eps: Any,
    betas: tuple[float, float] = (0.9, 0.999),
    decay: float = 0.0,
) -> AdamStep:
    """Step t = 1, 2, ... of Adam, with a decoupled weight decay: theta' -= eta decay theta.

    Source: P18 eq. 22-26.
    """
    m = betas[0] * m + (1.0 - betas[0]) * g
    v = betas[1] * v + (1.0 - betas[1]) * g**2
    m_hat, v_hat = m / (1.0 - betas[0] ** t), v / (1.0 - betas[1] ** t)
    return AdamStep(theta - eta * (m_hat / (np.sqrt(v_hat) + eps) + decay * theta), m, v)


def preconditioned(theta: Array, g: Array, P: Array) -> Array:
    """theta' = theta - P g.

    Source: P22 eq. 7.
    """
    return theta - P @ g


def ekfac_matrix(A: Any, B: Any, S: Any) -> Array:
    """P_S = (A kron B) diag(vec S)^2 (A kron B)^T, (in out, in out), positive semidefinite.

    Source: P22 eq. 9.

    Raises:
        ValueError: the shapes of A, B and S do not belong together.
    """
    A, B, S = _check_blocks(A, B, S)
    K = np.kron(A, B)
    return K @ np.diag(vec(S) ** 2) @ K.T


def ekfac_product(A: Any, B: Any, S: Any, V: Any) -> Array:
    """B (S^2 * (B^T V A)) A^T, (out, in): the matrix whose vec is P_S vec(V).

    Source: P22 eq. 10.

    Raises:
        ValueError: the shapes of A, B, S and V do not belong together.
    """
    A, B, S = _check_blocks(A, B, S)
    V = finite_array("V", V, S.shape)
    return B @ (S**2 * (B.T @ V @ A)) @ A.T


def ekfac_preconditioner(
    layers: Sequence[Layer], blocks: Sequence[EKFACBlocks], bias_scales: Sequence[Array | None]
) -> Array:
    """P, (n, n): block-diagonal, eq. 9 for every weight and diag(s^2) for every bias.

    Args:
        layers: the network's layers.
        blocks: (A, B, S) of each layer.
        bias_scales: s, (out,), of each layer with a bias, None for one without.
    """
    parts: list[Array] = []
    for layer, (A, B, S), s in zip(layers, blocks, bias_scales, strict=True):
        parts.append(ekfac_matrix(A, B, S))
        if layer.bias is not None:
            parts.append(np.diag(finite_array("bias_scales", s, (layer.shape[0],)) ** 2))
    return np.asarray(block_diag(*parts))


def per_layer_rates(eta: Any, layers: Sequence[Layer]) -> Array:
    """`eta` (L,) repeated over the parameters of each layer, (n,)."""
    eta = finite_array("eta", eta, (len(layers),))
    sizes = [layer.parameters.stop - layer.parameters.start for layer in layers]
    return np.repeat(eta, sizes)


def _check_blocks(A: Any, B: Any, S: Any) -> EKFACBlocks:
    S = finite_array("S", S, ("out", "in"))
    out, in_ = S.shape
    return EKFACBlocks(finite_array("A", A, (in_, in_)), finite_array("B", B, (out, out)), S)
