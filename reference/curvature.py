"""The curvature of the FSD: G, the Fisher, and the factors of KFAC and EKFAC.

| symbol | meaning | shape |
|---|---|---|
| J | dz/dtheta | (N, C, n) |
| H_rho | output Hessian of the discrepancy at z = z0 | (N, C, C) |
| G | E[J^T H_rho J], the Hessian of D_F at u = theta | (n, n) |
| F | the Fisher: E over x and over y from the model | (n, n) |
| A_l | E[a_{l-1} a_{l-1}^T]; E sum_t a_t a_t^T of a convolution | (in_l, in_l) |
| B_l | E[(dz/ds_l)^T H_rho dz/ds_l]; with KL: E[Ds_l Ds_l^T], y from the model | (out_l, out_l) |
| T | positions of a convolution; its B_l is 1/T E sum_t (dz/ds_t)^T H_rho dz/ds_t | |
| gamma | damping, lambda_WSD / lambda_FSD | > 0 |
| U_A, U_B | orthonormal eigenvectors of A_l and B_l, in columns | as A_l, B_l |
"""

from typing import Any, NamedTuple

import numpy as np

from reference.arrays import Array, finite_array, non_negative, unvec, vec
from reference.discrepancies import Discrepancy
from reference.networks import Network
from reference.problem import Problem


def ggn(jacobian: Any, output_hessian: Any) -> Array:
    """G = E[J^T H_rho J], (n, n), for J (N, C, n) and H_rho (N, C, C).

    Source: P22 eq. 34.
    """
    J = finite_array("jacobian", jacobian, ("N", "C", "n"))
    H = finite_array("output_hessian", output_hessian, (*J.shape[:2], J.shape[1]))
    return np.einsum("nci,ncd,ndj->ij", J, H, J) / len(J)


def fsd_hessian(network: Network, discrepancy: Discrepancy, theta: Any, X: Any) -> Array:
    """G of a network at theta, over the inputs X, (n, n).

    Source: P22 eq. 16 and 34.
    """
    H = discrepancy.output_hessian(network.outputs(theta, X))
    return ggn(network.jacobian(theta, X), H)


def exact_fisher(problem: Problem, theta: Any, X: Any) -> Array:
    """F = E_x E_{y ~ P(y|x, theta)}[score score^T], (n, n): the labels come from the model.

    The expectation over y is a finite sum: over the classes, or over points whose first two
    moments are the Gaussian's.

    Source: P22 section 4.3, below Theorem 1.
    """
    model = problem.loss.model_targets(problem.network.outputs(theta, X))
    F = np.zeros((problem.network.size, problem.network.size))
    for y, p in zip(model.targets, model.probabilities.T, strict=True):
        scores = problem.example_gradients(theta, X, y)  # (N, n), minus the scores
        F += np.einsum("n,ni,nj->ij", p, scores, scores) / len(p)
    return F


def empirical_fisher(problem: Problem, theta: Any, X: Any, T: Any) -> Array:
    """E[g g^T] with the labels of the data, (n, n): not the Fisher, and not G."""
    g = problem.example_gradients(theta, X, T)
    return g.T @ g / len(g)


class KFACFactors(NamedTuple):
    """One layer's A = E[a a^T] (in, in) and B = E[J_s^T H_rho J_s] (out, out)."""

    A: Array
    B: Array


def kfac_factors(
    network: Network, discrepancy: Discrepancy, theta: Any, X: Any
) -> list[KFACFactors]:
    """(A_l, B_l) of every layer's weight; G_l = A_l kron B_l under the KFAC assumptions.

    Biases have no factors here: A_l is of the activations alone, without a homogeneous one.

    A convolution's A is a sum over its positions and its B a mean. For it G_l = A_l kron B_l needs
    more: derivatives that do not correlate between two positions, and a second moment of the inputs
    or of the derivatives that is the same at every position.

    Source: P22 eq. 56-58; convolutions: Grosse and Martens 2016, section 3.
    """
    trace = network.trace(theta, X)
    H = discrepancy.output_hessian(trace.outputs)
    factors = []
    for a, D in trace.positions:
        N, T = a.shape[:2]
        A = np.einsum("nti,ntj->ij", a, a) / N
        B = np.einsum("ncto,ncd,ndtp->op", D, H, D, optimize=True) / (N * T)
        factors.append(KFACFactors(A, B))
    return factors


class EKFACBasis(NamedTuple):
    """A = U_A diag(alpha) U_A^T and B = U_B diag(beta) U_B^T; alpha and beta ascend."""

    U_A: Array
    U_B: Array
    alpha: Array  # (in,)
    beta: Array  # (out,)


def ekfac_basis(factors: KFACFactors) -> EKFACBasis:
    """The Kronecker-factored eigenbasis U_A kron U_B of one layer.

    Raises:
        ValueError: a factor is not square, or not finite.
    """
    alpha, U_A = np.linalg.eigh(finite_array("A", factors.A, ("in", "in")))
    beta, U_B = np.linalg.eigh(finite_array("B", factors.B, ("out", "out")))
    return EKFACBasis(U_A, U_B, alpha, beta)


def ekfac_eigenvalues(G: Any, basis: EKFACBasis) -> Array:
    """The diagonal of (U_A kron U_B)^T G_l (U_A kron U_B) as a matrix, (out, in).

    KFAC puts the products beta alpha^T there; these are nearest to G_l in the Frobenius norm.
    """
    U = np.kron(basis.U_A, basis.U_B)
    G = finite_array("G", G, (len(U), len(U)))
    return unvec(np.einsum("ij,ik,kj->j", U, G, U), (len(basis.U_B), len(basis.U_A)))


def damped_ekfac_inverse(basis: EKFACBasis, eigenvalues: Any, damping: float) -> Array:
    """U (diag vec(eigenvalues) + gamma I)^{-1} U^T with U = U_A kron U_B, (in out, in out).

    With the `ekfac_eigenvalues` of G_l it is EKFAC's damped inverse; with beta alpha^T it is KFAC's
    (A kron B + gamma I)^{-1} exactly.

    Args:
        basis: of one layer.
        eigenvalues: (out, in).
        damping: gamma >= 0.

    Source: George et al. 2018, section 3.

    Raises:
        ValueError: the shapes differ, gamma is negative, or a damped eigenvalue is not positive.
    """
    shape = (len(basis.beta), len(basis.alpha))
    damped = finite_array("eigenvalues", eigenvalues, shape) + non_negative("damping", damping)
    if damped.min() <= damped.size * np.finfo(float).eps * np.abs(damped).max():
        raise ValueError(
            f"`eigenvalues` + `damping` must be positive, got {damped.min():.3g}; raise `damping`."
        )
    U = np.kron(basis.U_A, basis.U_B)
    return U / vec(damped) @ U.T


def exact_damped_inverse(factors: KFACFactors, damping: float) -> Array:
    """(A kron B + gamma I)^{-1} through the eigenbases, (in out, in out).

    Source: P22 theorem 1 with G_l = A_l kron B_l.
    """
    basis = ekfac_basis(factors)
    return damped_ekfac_inverse(basis, np.outer(basis.beta, basis.alpha), damping)


def factored_damped_factors(factors: KFACFactors, damping: float) -> KFACFactors:
    """(A + pi sqrt(gamma) I, B + sqrt(gamma) / pi I), whose inverses make a Kronecker product.

    pi^2 = (tr A / in) / (tr B / out) minimizes the trace norm of pi I kron B + A kron I / pi: of
    what these factors add to A kron B + gamma I, times sqrt(gamma).

    Source: Martens and Grosse 2015, section 6.3.

    Raises:
        ValueError: gamma is negative, or a trace is not positive.
    """
    A, B = finite_array("A", factors.A, ("i", "i")), finite_array("B", factors.B, ("o", "o"))
    root = np.sqrt(non_negative("damping", damping))
    traces = float(np.trace(A) / len(A)), float(np.trace(B) / len(B))
    if min(traces) <= 0.0:
        raise ValueError(
            f"`factors` must have positive traces, got {traces[0]:.3g} and {traces[1]:.3g} a row; "
            "use `exact_damped_inverse`."
        )
    pi = np.sqrt(traces[0] / traces[1])
    return KFACFactors(A + pi * root * np.eye(len(A)), B + root / pi * np.eye(len(B)))
