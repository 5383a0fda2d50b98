"""dQ/dphi = (d theta'/d phi)^T q, by hand for every update rule.

| symbol | meaning | shape |
|---|---|---|
| q | dQ/dtheta' | (n,) |
| g | what the rule steps along: the mini-batch gradient, or the momentum's direction | (n,) |
| phi = log eta | log learning rate, one or one for each layer | scalar, (L,) |
| P, s | dense preconditioner; diagonal P = diag(s^2) | (n, n), (n,) |
| A, B, S | blocks of P22 eq. 9 | (in, in), (out, out), (out, in) |
| V, R | one layer's g and q as matrices | (out, in) |

g does not depend on phi, so no second derivative of the network appears.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from reference.arrays import Array, finite_array
from reference.networks import Layer
from reference.update_rules import EKFACBlocks, per_layer_rates


def log_lr_gradient(q: Any, g: Any, log_eta: float) -> float:
    """theta' = theta - exp(phi) g gives dQ/dphi = -exp(phi) g^T q."""
    q, g = _check(q, g)
    return float(-np.exp(log_eta) * (g @ q))


def per_layer_log_lr_gradient(q: Any, g: Any, log_eta: Any, layers: Sequence[Layer]) -> Array:
    """theta'_l = theta_l - exp(phi_l) g_l gives dQ/dphi_l = -exp(phi_l) g_l^T q_l, (L,)."""
    q, g = _check(q, g)
    product = -np.exp(per_layer_rates(log_eta, layers)) * g * q
    return np.array([np.sum(product[layer.parameters]) for layer in layers])


def dense_gradient(q: Any, g: Any) -> Array:
    """theta' = theta - P g gives dQ/dP = -q g^T, (n, n)."""
    q, g = _check(q, g)
    return -np.outer(q, g)


def diagonal_gradient(q: Any, g: Any, s: Any) -> Array:
    """theta' = theta - s^2 * g gives dQ/ds = -2 s * g * q, (n,)."""
    q, g = _check(q, g)
    return -2.0 * finite_array("s", s, g.shape) * g * q


def ekfac_gradient(R: Any, V: Any, A: Any, B: Any, S: Any) -> EKFACBlocks:
    """(dQ/dA, dQ/dB, dQ/dS) for W' = W - B (S^2 * Y) A^T with Y = B^T V A (P22 eq. 10).

    With Z = B^T R A, the same for q, and X = S^2 * Y, N = S^2 * Z:
        dQ/dA = -(R^T B X + V^T B N)
        dQ/dB = -(R A X^T + V A N^T)
        dQ/dS = -2 S * Y * Z

    Args:
        R: q of this layer's weight, (out, in).
        V: g of this layer's weight, (out, in).
        A: (in, in).
        B: (out, out).
        S: (out, in).
    """
    S = finite_array("S", S, ("out", "in"))
    out, in_ = S.shape
    A, B = finite_array("A", A, (in_, in_)), finite_array("B", B, (out, out))
    R, V = finite_array("R", R, S.shape), finite_array("V", V, S.shape)
    Y, Z = B.T @ V @ A, B.T @ R @ A
    X, N = S**2 * Y, S**2 * Z
    return EKFACBlocks(
        A=-(R.T @ B @ X + V.T @ B @ N),
        B=-(R @ A @ X.T + V @ A @ N.T),
        S=-2.0 * S * Y * Z,
    )


def _check(q: Any, g: Any) -> tuple[Array, Array]:
    g = finite_array("g", g, ("n",))
    return finite_array("q", q, g.shape), g
