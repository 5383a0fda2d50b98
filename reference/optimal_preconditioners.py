"""The analytic P* that minimizes Q-hat within each structure.

| symbol | meaning | shape |
|---|---|---|
| g | mini-batch gradients at theta; E[...] is their mean | (m, n) |
| M | lambda_FSD G + lambda_WSD I | (n, n) |
| P_k | basis of a structure that is linear in phi: P = sum_k phi_k P_k | (K, n, n) |
| A_l, B_l | KFAC factors of a layer, G_l = A_l kron B_l | (in, in), (out, out) |
| U_A, alpha | eigenvectors and eigenvalues of A_l (of B_l: U_B, beta) | (in, in), (in,) |
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import block_diag

from reference.arrays import Array, finite_array, non_negative
from reference.curvature import KFACFactors, ekfac_basis
from reference.networks import Layer
from reference.update_rules import EKFACBlocks


class LinearOptimum(NamedTuple):
    """A minimizer of Q-hat over P = sum_k phi_k P_k.

    If H is singular the minimizers are a family; this is the one with the shortest phi, and all of
    them take the same steps P g.
    """

    phi: Array  # (K,)
    P: Array  # (n, n)
    H: Array  # (K, K), the Hessian of Q-hat in phi
    rank: int  # of H; K means that the minimizer is unique


def linear_in_phi(basis: Any, gradients: Any, M: Any) -> LinearOptimum:
    """H phi = b with H_kl = E[g^T P_k^T M P_l g] and b_k = E[g^T P_k g].

    Q-hat(phi) = -b^T phi + 1/2 phi^T H phi is P22 eq. 43 for P = sum_k phi_k P_k.

    Args:
        basis: P_k, (K, n, n).
        gradients: g, (m, n).
        M: symmetric positive semidefinite, (n, n).

    Raises:
        ValueError: a shape is wrong, an entry is not finite, or Q-hat has no minimum because it
            falls without bound along a direction that M does not see.
    """
    g = finite_array("gradients", gradients, ("m", "n"))
    n = g.shape[1]
    basis = finite_array("basis", basis, ("K", n, n))
    M = finite_array("M", M, (n, n))
    steps = np.einsum("kij,mj->kmi", basis, g)  # P_k g
    H = np.einsum("kmi,ij,lmj->kl", steps, M, steps, optimize=True) / len(g)
    b = np.einsum("kmi,mi->k", steps, g) / len(g)
    eigenvalues, vectors = np.linalg.eigh(H)
    cutoff = len(b) * np.finfo(float).eps * max(eigenvalues[-1], 0.0)
    seen = eigenvalues > cutoff
    c = vectors.T @ b
    # b lies in H's range wherever a minimum exists; 1e-6 is far above what rounding leaves of it in
    # the null space, and far below any share that a step without curvature would have.
    if np.linalg.norm(c[~seen]) > 1e-6 * np.linalg.norm(b):
        raise ValueError(
            "`M` must see every step of the structure, got a direction without curvature along "
            "which Q-hat falls without bound; use a positive `wsd_weight`."
        )
    phi = vectors[:, seen] @ (c[seen] / eigenvalues[seen])
    return LinearOptimum(phi, np.einsum("k,kij->ij", phi, basis), H, int(np.sum(seen)))


def scalar(gradients: Any, M: Any) -> LinearOptimum:
    """P = eta I: eta = E[g^T g] / E[g^T M g]."""
    return linear_in_phi(np.eye(_size(gradients))[None], gradients, M)


def per_layer(gradients: Any, M: Any, layers: Sequence[Layer]) -> LinearOptimum:
    """P = blockdiag(eta_l I): one learning rate for each layer."""
    basis = np.zeros((len(layers), _size(gradients), _size(gradients)))
    for k, layer in enumerate(layers):
        basis[k][layer.parameters, layer.parameters] = np.eye(
            layer.parameters.stop - layer.parameters.start
        )
    return linear_in_phi(basis, gradients, M)


def diagonal(gradients: Any, M: Any) -> LinearOptimum:
    """P = diag(phi). An entry may be negative; diag(s^2) attains it where none is."""
    n = _size(gradients)
    basis = np.zeros((n, n, n))
    basis[np.arange(n), np.arange(n), np.arange(n)] = 1.0
    return linear_in_phi(basis, gradients, M)


def dense(gradients: Any, M: Any) -> LinearOptimum:
    """P with n^2 free entries: M^{-1} wherever E[g g^T] is non-singular.

    Source: P22 Theorem 1.
    """
    n = _size(gradients)
    return linear_in_phi(np.eye(n * n).reshape(n * n, n, n), gradients, M)


def kronecker(factors: Sequence[KFACFactors], fsd_weight: float) -> Array:
    """P = blockdiag((A_l^{-1} kron B_l^{-1}) / lambda_FSD), (n, n), for layers without biases.

    The optimum for lambda_WSD = 0 under the KFAC assumptions.

    Source: P22 Corollary 2 and appendix H.2.

    Raises:
        ValueError: `fsd_weight` is not positive, or a factor is not square and finite.
        numpy.linalg.LinAlgError: a factor is singular.
    """
    if not non_negative("fsd_weight", fsd_weight) > 0.0:
        raise ValueError("`fsd_weight` must be positive, got 0.0; without it no optimum exists.")
    blocks = []
    for A, B in factors:
        A, B = finite_array("A", A, ("in", "in")), finite_array("B", B, ("out", "out"))
        blocks.append(np.kron(np.linalg.inv(A), np.linalg.inv(B)) / fsd_weight)
    return np.asarray(block_diag(*blocks))


def ekfac(factors: KFACFactors, fsd_weight: float, wsd_weight: float) -> EKFACBlocks:
    """A = U_A, B = U_B, S = (lambda_FSD beta alpha^T + lambda_WSD)^{-1/2}: P22 eq. 9 of one layer.

    P_S = (lambda_FSD A_l kron B_l + lambda_WSD I)^{-1} exactly, also for lambda_WSD > 0, where no
    Kronecker product A kron B does.

    Raises:
        ValueError: a weight is negative, or the damped factors are singular.
    """
    basis = ekfac_basis(factors)
    curvature = non_negative("fsd_weight", fsd_weight) * np.outer(basis.beta, basis.alpha)
    damped = curvature + non_negative("wsd_weight", wsd_weight)  # (out, in)
    if damped.min() <= damped.size * np.finfo(float).eps * np.abs(damped).max():
        raise ValueError(
            "`fsd_weight` A kron B + `wsd_weight` I must be positive definite, got smallest "
            f"eigenvalue {damped.min():.3g}; raise `wsd_weight`."
        )
    return EKFACBlocks(basis.U_A, basis.U_B, damped**-0.5)


def _size(gradients: Any) -> int:
    return finite_array("gradients", gradients, ("m", "n")).shape[1]
