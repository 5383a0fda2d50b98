"""P22 Corollary 2, one assumption dropped at a time; all numbers are of small, exact cases.

The corollary: P* is block-diagonal with the blocks A_l^-1 kron B_l^-1. It needs

| assumption | without it |
|---|---|
| independent layers | P* has cross blocks; the best block-diagonal P is not KFAC either |
| activations independent of pseudo-gradients | the block of G is not A_l kron B_l |
| lambda_WSD = 0 | P* is no Kronecker product once both factors have two eigenvalues |
| A_l of a-bar where the layer has a bias | the block of (W, b) is not the inverse of G's |

Eq. 9 itself survives the third: (A kron B) diag(vec S)^2 (A kron B)^T holds the damped inverse.
"""

import numpy as np
import pytest
from hypothesis import find, given
from hypothesis import strategies as st
from scipy.linalg import block_diag
from scipy.optimize import minimize

from reference import (
    CategoricalKL,
    FixedHead,
    KFACFactors,
    Linear,
    SquaredEuclidean,
    approximate_meta_objective,
    dense,
    diagonal,
    ekfac,
    ekfac_matrix,
    fsd_hessian,
    kfac_factors,
    kronecker,
    proximity_matrix,
)
from reference.arrays import Array
from verification.tolerances import MINIMIZER, ROUNDING, SOLVE, assert_close

correlations = st.floats(-0.9, 0.9)


def gradients_with(moment: Array) -> Array:
    """n gradients with E[g g^T] = `moment`, (n, n)."""
    return np.sqrt(len(moment)) * np.linalg.cholesky(moment).T


def two_layers(c: float) -> tuple[FixedHead, Array]:
    """z = w_1 x_1 + w_2 x_2, two layers of one weight, and inputs of correlation c."""
    return FixedHead([np.eye(1), np.eye(1)], [1, 1]), gradients_with(np.array([[1, c], [c, 1]]))


@given(c=correlations, s=correlations)
def test_with_dependent_layers_kfac_is_not_the_optimum(c: float, s: float) -> None:
    """G = [[1, c], [c, 1]], so that KFAC's P = I exceeds the optimum by c^2 / (1 - c^2) if E[g g^T]
    = I. Among the diagonal P the best is 1 / (1 + c s) for gradients of correlation s: neither the
    inverse of G's diagonal nor independent of the gradients.
    """
    network, X = two_layers(c)
    theta, rho = np.zeros(2), SquaredEuclidean()
    M = proximity_matrix(fsd_hessian(network, rho, theta, X), 1.0, 0.0)
    kfac = kronecker(kfac_factors(network, rho, theta, X), 1.0)
    condition = (1 + abs(c)) / (1 - abs(c))
    assert_close(kfac, np.eye(2), SOLVE, what="KFAC")
    white = gradients_with(np.eye(2))
    best = approximate_meta_objective(dense(white, M).P, white, M)
    gap = approximate_meta_objective(kfac, white, M) - best
    expected = c**2 / (1 - c**2)
    scale = 2.0 + abs(best)
    assert_close(
        np.float64(gap), expected, SOLVE, condition=condition, size=4, scale=scale, what="gap"
    )
    correlated = gradients_with(np.array([[1, s], [s, 1]]))
    P = diagonal(correlated, M).P
    condition *= (1 + abs(s)) / (1 - abs(s))
    assert_close(P, np.eye(2) / (1 + c * s), SOLVE, condition=condition, what="best diagonal")


def test_the_smallest_dependence_of_activations_and_derivatives() -> None:
    """Found: logits (w x, -w x) with w = 1 and inputs 0 and 1.

    KL has the curvature h = 4 p (1 - p), which depends on x: G = E[x^2 h] and A B = E[x^2] E[h],
    whose difference is the covariance. KFAC's step is too short by the factor G / (A B) = 2 h(1) /
    (1 + h(1)), and Q-hat exceeds its minimum by G (1 / (A B) - 1 / G)^2 / 2.
    """
    network = FixedHead([np.array([[1.0], [-1.0]])], [1])
    rho = CategoricalKL()

    def curvatures(w: int, first: int, second: int) -> tuple[float, float]:
        theta, X = np.array([float(w)]), np.array([[float(first)], [float(second)]])
        ((A, B),) = kfac_factors(network, rho, theta, X)
        return fsd_hessian(network, rho, theta, X).item(), (A @ B).item()

    def differ(case: tuple[int, int, int]) -> bool:
        G, AB = curvatures(*case)
        return abs(G - AB) > ROUNDING.allowed(size=8) * max(G, AB)

    integers = st.integers(-3, 3)
    assert find(st.tuples(integers, integers, integers), differ) == (1, 0, 1)
    G, AB = curvatures(1, 0, 1)
    h = 1.0 / np.cosh(1.0) ** 2  # 4 p (1 - p) at the logits (1, -1)
    assert_close(np.float64(G), h / 2, SOLVE, size=2, what="G")
    assert_close(np.float64(AB), (1 + h) / 4, SOLVE, size=2, what="A B")
    one, M = np.ones((1, 1)), np.array([[G]])
    best, kfac = (approximate_meta_objective(np.array([[P]]), one, M) for P in (1 / G, 1 / AB))
    expected = 0.5 * G * (1 / AB - 1 / G) ** 2
    assert_close(np.float64(kfac - best), expected, SOLVE, size=2, scale=1 / G, what="gap")
    assert expected > 0.08 * abs(best)


def kronecker_gap(P: Array, in_: int) -> float:
    """The second singular value of P rearranged so that A kron B has rank one."""
    out = len(P) // in_
    rearranged = P.reshape(in_, out, in_, out).transpose(0, 2, 1, 3).reshape(in_**2, out**2)
    values = np.linalg.svd(rearranged, compute_uv=False)
    return float(values[1]) if len(values) > 1 else 0.0


def test_the_smallest_damped_optimum_that_is_no_kronecker_product() -> None:
    """Found: A = diag(1, 2) and B = diag(1, 2), two inputs and two outputs, lambda_WSD = 1.

    With one input, one output, or equal eigenvalues in a factor, some A' kron B' is P*.
    """

    def damped(case: tuple[list[int], list[int], int]) -> Array:
        alpha, beta, wsd = case
        factors = KFACFactors(np.diag(np.array(alpha, float)), np.diag(np.array(beta, float)))
        return ekfac_matrix(*ekfac(factors, 1.0, float(wsd)))

    def no_product(case: tuple[list[int], list[int], int]) -> bool:
        P = damped(case)
        return kronecker_gap(P, len(case[0])) > SOLVE.allowed(size=9, condition=20.0) * P.max()

    spectra = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(sorted)
    found = find(st.tuples(spectra, spectra, st.integers(0, 2)), no_product)
    assert found == ([1, 2], [1, 2], 1)


def test_the_gap_of_the_best_kronecker_product() -> None:
    """There M = diag(2, 3, 3, 5), P* = M^-1 and E[g g^T] = I: the best A' kron B' is diagonal, as
    entries beside the diagonal add M-weighted squares and leave the rest, and Q-hat exceeds its
    minimum by the least of 1/2 sum_ij M_ij (a_i b_j - 1 / M_ij)^2 over a and b.

    Two routes: BFGS over a and b from several starts, and alternating least squares.
    """
    M = proximity_matrix(np.diag([1.0, 2.0, 2.0, 4.0]), 1.0, 1.0)
    weights = np.diag(M).reshape(2, 2)

    def gap(x: Array) -> float:
        return 0.5 * float(np.sum(weights * (np.outer(x[:2], x[2:]) - 1 / weights) ** 2))

    a, b = np.ones(2), np.ones(2)
    for _ in range(200):
        a = b.sum() / (weights @ b**2)
        b = a.sum() / (weights.T @ a**2)
    alternating = gap(np.concatenate([a, b]))
    rng = np.random.default_rng(0)
    starts = rng.standard_normal((8, 4))
    least = min(minimize(gap, x, method="BFGS", options={"gtol": 1e-10}).fun for x in starts)
    # a line search sees the gap to the rounding of its addends, (1/2) sum 1 / M_ij
    slack = MINIMIZER.allowed(size=4) ** 2 * 0.5 * float(np.sum(1 / weights))
    assert abs(least - alternating) <= slack
    g = gradients_with(np.eye(4))
    best = approximate_meta_objective(np.linalg.inv(M), g, M)
    product = np.kron(np.diag(a), np.diag(b))
    excess = approximate_meta_objective(product, g, M) - best
    assert_close(np.float64(excess), alternating, SOLVE, condition=2.5, scale=2.0, what="excess")
    # the distance to the nearest product in M's norm is at least that of the smallest eigenvalue
    assert alternating >= 0.5 * 2.0 * kronecker_gap(np.linalg.inv(M), 2) ** 2 > 1e-4
    assert alternating < 1e-3 * abs(best)  # real, but small: the damping is nearly a product here


@given(mean=st.floats(-3.0, 3.0))
def test_with_a_bias_the_factor_is_of_the_homogeneous_activations(mean: float) -> None:
    """z = w a + b with E[a] = m and E[a^2] = m^2 + 1: G = E[a-bar a-bar^T] with a-bar = (a, 1).

    Appendix H.2's a-bar gives P* = [[1, -m], [-m, m^2 + 1]]. Appendix H.1's a, with the bias on its
    own, gives diag(1 / (m^2 + 1), 1): the optimum for m = 0 alone, else Q-hat is above its minimum
    by (m^2 + 1 - 1 / (m^2 + 1)) / 2.
    """
    network, rho, theta = Linear(1, 1), SquaredEuclidean(), np.zeros(2)
    X = mean + np.array([[1.0], [-1.0]])
    G = fsd_hessian(network, rho, theta, X)
    M, g = proximity_matrix(0.5 * (G + G.T), 1.0, 0.0), gradients_with(np.eye(2))
    condition = float(np.linalg.cond(M))
    homogeneous = np.hstack([X, np.ones((2, 1))])
    with_bar = KFACFactors(homogeneous.T @ homogeneous / 2.0, np.eye(1))
    P = dense(g, M).P
    exact = np.array([[1.0, -mean], [-mean, mean**2 + 1.0]])
    assert_close(P, exact, SOLVE, condition=condition, what="P*")
    assert_close(kronecker([with_bar], 1.0), exact, SOLVE, condition=condition, what="a-bar")
    ((A, B),) = kfac_factors(network, rho, theta, X)
    apart = np.asarray(block_diag(np.linalg.inv(A), np.linalg.inv(B)))
    excess = approximate_meta_objective(apart, g, M) - approximate_meta_objective(P, g, M)
    # 1/2 tr((D - P*) M (D - P*)) = 1/2 tr(D M D - 2 D + P*) with D = diag(1 / (m^2 + 1), 1)
    expected = 0.5 * (mean**2 + 1.0 - 1.0 / (mean**2 + 1.0))
    scale = mean**2 + 2.0
    assert_close(np.float64(excess), expected, SOLVE, condition=condition, scale=scale, what="gap")


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_appendix_h2_prints_the_block_of_the_inverse_as_g(spread: float) -> None:
    """G_l = A_l kron B_l is the Fisher's block; A_l^-1 kron B_l^-1, printed as G_l, its inverse.

    They agree where the factors are identities alone (spread 0).
    """
    X = np.sqrt(2.0) * np.diag([1.0 + spread, 1.0])  # E[a a^T] = diag((1 + spread)^2, 1)
    network = FixedHead([np.eye(2)], [2])
    G = fsd_hessian(network, SquaredEuclidean(), np.zeros(4), X)
    factors = kfac_factors(network, SquaredEuclidean(), np.zeros(4), X)
    (A, B), printed = factors[0], kronecker(factors, 1.0)
    assert_close(G, np.kron(A, B), ROUNDING, size=4, what="G_l")
    assert_close(printed @ G, np.eye(4), SOLVE, condition=4.0, what="printed G_l times G_l")
    assert (np.linalg.norm(printed - G) > 1.0) == (spread > 0.0)
