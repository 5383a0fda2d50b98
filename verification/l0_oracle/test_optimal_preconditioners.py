"""The analytic P* of every structure: formulas, optimality, nesting, necessity."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import block_diag
from scipy.optimize import minimize

from reference import (
    KFACFactors,
    Layer,
    LinearOptimum,
    approximate_meta_gradient,
    approximate_meta_objective,
    dense,
    diagonal,
    ekfac,
    ekfac_matrix,
    fsd_hessian,
    kronecker,
    linear_in_phi,
    per_layer,
    proximity_matrix,
    scalar,
)
from reference.arrays import Array
from verification.profiles import share
from verification.strategies import SPD, kfac_cases, spd_matrices, weights
from verification.strategies.fixed_heads import Divergence
from verification.strategies.spd import rotation
from verification.tolerances import MINIMIZER, ROUNDING, SOLVE, assert_close

seeds = st.integers(0, 2**16)
fsd_weights = weights(min_decade=-2.0, max_decade=2.0, zero=False)
wsd_weights = weights(min_decade=-2.0, max_decade=2.0)

Structure = Callable[[Array, Array], LinearOptimum]
STRUCTURES: dict[str, Structure] = {
    "scalar": scalar,
    "per-layer": lambda g, M: per_layer(g, M, two_layers(len(M))),
    "diagonal": diagonal,
    "dense": dense,
}
structures = pytest.mark.parametrize("structure", list(STRUCTURES))


def two_layers(n: int) -> list[Layer]:
    """Any split of theta in a first parameter and the rest."""
    cuts = [slice(0, 1), slice(1, n)][: min(n, 2)]
    return [Layer(cut, None, (cut.stop - cut.start, 1)) for cut in cuts]


def gradients_with(moment: SPD, seed: int) -> Array:
    """n + 2 gradients g whose second moment E[g g^T] is the given matrix."""
    n = len(moment.eigenvalues)
    white = rotation(n + 2, seed + 1)[:, :n] * np.sqrt(n + 2)
    return white @ np.linalg.cholesky(moment.matrix).T


@st.composite
def quadratics(draw: st.DrawFn, max_size: int = 4) -> tuple[Array, Array]:
    """(gradients, M) of a Q-hat with condition numbers of at most 100 in M and in E[g g^T]."""
    M = draw(spd_matrices(max_size=max_size, max_condition=1e2), label="M")
    n = len(M.eigenvalues)
    moment = draw(spd_matrices(min_size=n, max_size=n, max_condition=1e2), label="E[g g^T]")
    return gradients_with(moment, draw(seeds, label="seed")), M.matrix


def basis_of(structure: str, n: int) -> Array:
    """P_k of a structure, built from its definition."""
    if structure == "scalar":
        return np.eye(n)[None]
    if structure == "per-layer":
        return np.stack([np.diag((np.arange(n) > 0) == k).astype(float) for k in range(min(n, 2))])
    units = np.eye(n * n).reshape(n * n, n, n)
    return units if structure == "dense" else units[:: n + 1]


def second_moment(g: Array) -> Array:
    return g.T @ g / len(g)


@structures
@given(case=quadratics())
def test_normal_equations_have_the_closed_form_of_their_structure(
    structure: str, case: tuple[Array, Array]
) -> None:
    """H and phi from E[g g^T] and M alone, in the form that each structure gives them."""
    g, M = case
    S, n = second_moment(g), len(M)
    if structure == "scalar":
        H, b = np.array([[np.trace(M @ S)]]), np.array([np.trace(S)])
    elif structure == "per-layer":
        blocks = [layer.parameters for layer in two_layers(n)]
        H = np.array([[np.sum(M[k, j] * S[k, j]) for j in blocks] for k in blocks])
        b = np.array([np.trace(S[k, k]) for k in blocks])
    elif structure == "diagonal":
        H, b = M * S, np.diag(S)
    else:
        H, b = np.kron(M, S), S.ravel()
    optimum = STRUCTURES[structure](g, M)
    magnitude = float(np.linalg.norm(np.abs(M)) * np.trace(S)) * len(b)
    size, condition = n + len(g), float(np.linalg.cond(H))
    assert_close(optimum.H, H, ROUNDING, size=size, iterations=3, scale=magnitude, what="H")
    # H's entries err by their magnitude, which the inverse amplifies.
    amplified = condition * magnitude / float(np.linalg.norm(H, 2))
    phi = np.linalg.solve(H, b)
    assert_close(optimum.phi, phi, SOLVE, condition=amplified, size=len(b), what="phi")
    assert optimum.rank == len(b)


@given(case=quadratics())
def test_dense_optimum_is_the_inverse(case: tuple[Array, Array]) -> None:
    """Theorem 1: P* = M^{-1} whatever the gradients are, as long as E[g g^T] is non-singular."""
    g, M = case
    condition = float(np.linalg.cond(M) * np.linalg.cond(second_moment(g)))
    P = dense(g, M).P
    assert_close(P, np.linalg.inv(M), SOLVE, condition=condition, size=M.size, what="P*")


@structures
@given(case=quadratics(), seed=seeds, decade=st.floats(-3.0, 1.0))
def test_q_hat_rises_by_its_quadratic_form_around_the_optimum(
    structure: str, case: tuple[Array, Array], seed: int, decade: float
) -> None:
    """Q-hat(phi* + d) - Q-hat(phi*) = 1/2 E||P_d g||_M^2 >= 0 for every d within the structure."""
    g, M = case
    optimum, basis = STRUCTURES[structure](g, M), basis_of(structure, len(M))
    d = np.random.default_rng(seed).standard_normal(len(basis))
    d *= 10.0**decade * np.linalg.norm(optimum.phi) / np.linalg.norm(d)
    shift = np.einsum("k,kij->ij", d, basis)
    least = approximate_meta_objective(optimum.P, g, M)
    around = approximate_meta_objective(optimum.P + shift, g, M)
    steps = g @ shift.T
    rise = 0.5 * np.mean(np.sum(steps * (steps @ M), axis=1))
    # At phi* the linear part cancels to the accuracy of phi*, which the solver's condition limits.
    condition = float(np.linalg.cond(optimum.H))
    scale = abs(least) + rise + float(np.linalg.norm(optimum.H) * np.linalg.norm(d) ** 2)
    assert_close(
        np.float64(around - least),
        np.float64(rise),
        SOLVE,
        size=len(d) + len(M),
        condition=condition,
        scale=scale,
        what="rise of Q-hat",
    )


@structures
@share(0.5)
@given(case=quadratics(max_size=3))
def test_a_numerical_minimizer_finds_the_same_optimum(
    structure: str, case: tuple[Array, Array]
) -> None:
    """BFGS on eq. 43 with the gradient of eq. 46 in phi: ||phi - phi*|| <= ||grad|| / sigma_min.

    BFGS stops where it sees no decrease of Q-hat, at a gradient of sqrt(n eps kappa) of the first.
    """
    g, M = case
    basis, optimum = basis_of(structure, len(M)), STRUCTURES[structure](g, M)
    unit = 1.0 / float(np.linalg.norm(M, 2))  # the scale on which phi is of order one

    def gradient(phi: Array) -> Array:
        P = unit * np.einsum("k,kij->ij", phi, basis)
        return unit * np.einsum("ij,kij->k", approximate_meta_gradient(P, g, M), basis)

    first = float(np.linalg.norm(gradient(np.zeros(len(basis)))))

    def value(phi: Array) -> float:
        P = unit * np.einsum("k,kij->ij", phi, basis)
        return approximate_meta_objective(P, g, M) / first

    found = minimize(
        value,
        np.zeros(len(basis)),
        jac=lambda phi: gradient(phi) / first,
        method="BFGS",
        options={"gtol": 1e-12},
    )
    left = float(np.linalg.norm(gradient(found.x)))
    condition = float(np.linalg.cond(optimum.H))
    size = len(g) + 2 * len(M)
    assert left <= MINIMIZER.allowed(condition=condition, size=size) * first, found
    sigma_min = float(np.linalg.eigvalsh(unit**2 * optimum.H)[0])
    rounding = SOLVE.allowed(condition=condition, size=size) * float(np.linalg.norm(optimum.phi))
    distance = float(np.linalg.norm(unit * found.x - optimum.phi))
    assert distance <= unit * left / sigma_min + rounding, (distance, left, sigma_min)


@given(case=quadratics())
def test_wider_structures_do_better(case: tuple[Array, Array]) -> None:
    """Q-hat of scalar >= per layer >= diagonal >= dense, and none is above doing nothing."""
    g, M = case
    values = [approximate_meta_objective(STRUCTURES[s](g, M).P, g, M) for s in STRUCTURES]
    condition = float(np.linalg.cond(M) * np.linalg.cond(second_moment(g)))
    slack = SOLVE.allowed(size=M.size, condition=condition) * abs(values[-1])
    assert (np.diff([0.0, *values]) <= slack).all(), values


@given(case=quadratics(), seed=seeds)
def test_any_basis_of_a_structure_gives_the_same_preconditioner(
    case: tuple[Array, Array], seed: int
) -> None:
    g, M = case
    basis = basis_of("diagonal", len(M))
    mix = rotation(len(basis), seed + 1)
    mixed = np.einsum("kl,lij->kij", mix, basis)
    optimum = diagonal(g, M)
    assert_close(
        linear_in_phi(mixed, g, M).P,
        optimum.P,
        SOLVE,
        condition=float(np.linalg.cond(optimum.H)),
        size=2 * len(M),
        what="P*",
    )


@given(case=quadratics(), seed=seeds, rank=st.integers(1, 3))
def test_singular_second_moment_leaves_a_family_that_agrees_on_its_range(
    case: tuple[Array, Array], seed: int, rank: int
) -> None:
    """Necessity in Theorem 1: with fewer gradients than parameters P* is not determined."""
    M = np.asarray(block_diag(case[1], 1.0))  # one parameter more than the gradients span
    n = len(M)
    rank = min(rank, n - 1)
    rng = np.random.default_rng(seed)
    range_ = rotation(n, seed + 1)[:, :rank]
    g = rotation(rank, seed + 2) @ np.diag(rng.uniform(0.5, 2.0, rank)) @ range_.T
    optimum = dense(g, M)
    null = np.eye(n) - range_ @ range_.T
    member = optimum.P + rng.standard_normal((n, n)) @ null
    inverse = np.linalg.inv(M)
    condition = float(np.linalg.cond(M)) * 16.0  # E[g g^T] has singular values in [1/4, 4] on it
    size = n * n
    assert optimum.rank == n * rank
    steps = inverse @ g.T
    assert_close(optimum.P @ g.T, steps, SOLVE, condition=condition, size=size, what="P* g")
    scale = float(np.linalg.norm(steps) + np.linalg.norm(member) * np.linalg.norm(g))
    assert_close(
        member @ g.T, steps, SOLVE, condition=condition, size=size, scale=scale, what="P g"
    )
    best = approximate_meta_objective(inverse, g, M)
    size_of_terms = float(np.sum(g**2)) * (1 + float(np.linalg.norm(M)) * scale) * (1 + scale)
    for P in (optimum.P, member):
        assert_close(
            np.float64(approximate_meta_objective(P, g, M)),
            np.float64(best),
            SOLVE,
            condition=condition,
            size=size,
            scale=abs(best) + size_of_terms,
            what="Q-hat",
        )
    assert np.linalg.norm((optimum.P - inverse) @ null) > 0.5 * np.linalg.norm(inverse @ null)


def test_q_hat_without_curvature_along_a_gradient_has_no_minimum() -> None:
    g, M = np.array([[1.0, 1.0]]), np.diag([1.0, 0.0])
    for structure in ("diagonal", "dense"):
        with pytest.raises(ValueError, match="`M` must see every step of the structure, got a dir"):
            STRUCTURES[structure](g, M)
    assert_close(scalar(g, M).P, 2.0 * np.eye(2), ROUNDING, what="scalar P*")


@given(
    A=spd_matrices(max_size=3, max_condition=1e2),
    B=spd_matrices(max_size=3, max_condition=1e2),
    fsd=fsd_weights,
    wsd=wsd_weights,
)
def test_ekfac_blocks_give_the_damped_inverse(A: SPD, B: SPD, fsd: float, wsd: float) -> None:
    """Beyond Corollary 2: (lambda_FSD A kron B + lambda_WSD I)^{-1} lies inside eq. 9."""
    M = proximity_matrix(np.kron(A.matrix, B.matrix), fsd, wsd)
    blocks = ekfac(KFACFactors(A.matrix, B.matrix), fsd, wsd)
    assert blocks.S.shape == (len(B.matrix), len(A.matrix))
    assert_close(
        ekfac_matrix(*blocks),
        np.linalg.inv(M),
        SOLVE,
        condition=float(np.linalg.cond(M)),
        what="P_S",
    )


@given(
    A=spd_matrices(max_size=3, max_condition=1e2),
    B=spd_matrices(max_size=3, max_condition=1e2),
    fsd=fsd_weights,
)
def test_undamped_ekfac_blocks_give_kfac(A: SPD, B: SPD, fsd: float) -> None:
    factors = KFACFactors(A.matrix, B.matrix)
    assert_close(
        ekfac_matrix(*ekfac(factors, fsd, 0.0)),
        kronecker([factors], fsd),
        SOLVE,
        condition=A.condition * B.condition,
        what="P_S",
    )


@pytest.mark.parametrize("divergence", ["squared_error", "kl"])
@share(0.5)
@given(st.data())
def test_dense_optimum_is_kfac_where_its_assumptions_hold(
    divergence: Divergence, data: st.DataObject
) -> None:
    """Corollary 2, through three routes: normal equations over all P, A^{-1} kron B^{-1}, eq. 9."""
    case = data.draw(kfac_cases(divergence=divergence), label="case")
    fsd = data.draw(fsd_weights, label="lambda_FSD")
    wsd = data.draw(wsd_weights, label="lambda_WSD")
    network = case.problem().network
    G = fsd_hessian(network, case.discrepancy, case.theta(), case.inputs())
    M = proximity_matrix(0.5 * (G + G.T), fsd, wsd)
    rng = np.random.default_rng(case.seed)
    g = rng.standard_normal((2 * network.size, network.size))
    P = dense(g, M).P
    condition = float(np.linalg.cond(M) * np.linalg.cond(second_moment(g)))
    # G itself comes out of heads H_rho^(-1/2) ..., known to the condition number of H_rho.
    H = case.discrepancy.output_hessian(network.outputs(case.theta(), case.inputs()))[0]
    spectrum = np.linalg.eigvalsh(H)[1 if divergence == "kl" else 0 :]
    condition *= float(spectrum[-1] / spectrum[0])
    blocks = [ekfac_matrix(*ekfac(f, fsd, wsd)) for f in case.kfac()]
    structured = np.asarray(block_diag(*blocks))
    assert_close(P, structured, SOLVE, condition=condition, size=M.size, what="P* and eq. 9")
    if wsd == 0.0:
        pure = kronecker(case.kfac(), fsd)
        assert_close(P, pure, SOLVE, condition=condition, size=M.size, what="P* and KFAC")


def kronecker_spectrum(P: Array, in_: int) -> Array:
    """Singular values of P rearranged so that A kron B has rank one (Van Loan, Pitsianis 1993)."""
    out = len(P) // in_
    rearranged = P.reshape(in_, out, in_, out).transpose(0, 2, 1, 3).reshape(in_**2, out**2)
    return np.linalg.svd(rearranged, compute_uv=False)


@given(
    A=spd_matrices(min_size=2, max_size=2, max_condition=1e2),
    B=spd_matrices(min_size=2, max_size=2, max_condition=1e2),
    fsd=fsd_weights,
    wsd=wsd_weights,
)
def test_the_damped_optimum_is_no_kronecker_product(A: SPD, B: SPD, fsd: float, wsd: float) -> None:
    """Its distance to the nearest A kron B is |det| / sigma_1 of [1 / (lambda_FSD alpha beta +
    lambda_WSD)], and det is proportional to lambda_WSD (alpha_1 - alpha_2) (beta_1 - beta_2).
    """
    P = ekfac_matrix(*ekfac(KFACFactors(A.matrix, B.matrix), fsd, wsd))
    first, second = kronecker_spectrum(P, 2)[:2]
    (a1, a2), (b1, b2) = A.eigenvalues, B.eigenvalues
    products = np.prod([fsd * a * b + wsd for a in (a1, a2) for b in (b1, b2)])
    expected = fsd * wsd * abs((a1 - a2) * (b1 - b2)) / products / first
    M = proximity_matrix(np.kron(A.matrix, B.matrix), fsd, wsd)
    assert_close(
        second,
        np.float64(expected),
        SOLVE,
        size=4,
        condition=float(np.linalg.cond(M)),
        scale=float(first),
        what="distance to the nearest Kronecker product",
    )


def test_a_pure_kronecker_product_cannot_be_the_damped_optimum() -> None:
    """A = B = diag(1, 4), lambda = 1: 1/2, 1/5, 1/5, 1/17 on the diagonal, 1/34 is not 1/25."""
    factors = KFACFactors(np.diag([1.0, 4.0]), np.diag([1.0, 4.0]))
    P = ekfac_matrix(*ekfac(factors, 1.0, 1.0))
    assert_close(P, np.diag([1 / 2, 1 / 5, 1 / 5, 1 / 17]), SOLVE, condition=17 / 2, what="P*")
    left, values, right = np.linalg.svd(P.diagonal().reshape(2, 2))
    assert_close(values.prod(), np.float64(1 / 25 - 1 / 34), SOLVE, size=4, condition=17 / 2)
    nearest = values[0] * np.kron(np.diag(left[:, 0]), np.diag(right[0]))
    g, M = 2.0 * np.eye(4), proximity_matrix(np.kron(*factors), 1.0, 1.0)  # E[g g^T] = I
    rise = approximate_meta_objective(nearest, g, M) - approximate_meta_objective(P, g, M)
    # Q-hat(K) - Q-hat(P*) = 1/2 ||K - P*||_M^2, and no eigenvalue of M is below 2: for every
    # Kronecker product K it is at least sigma_2^2.
    assert rise > values[1] ** 2 > 3e-4


def test_preconditioners_check_their_arguments() -> None:
    g, M = np.ones((3, 2)), np.eye(2)
    with pytest.raises(ValueError, match=r"`basis` must have shape \(K, 2, 2\), got \(1, 3, 3\)"):
        linear_in_phi(np.eye(3)[None], g, M)
    with pytest.raises(ValueError, match=r"`M` must have shape \(2, 2\), got \(3, 3\)"):
        dense(g, np.eye(3))
    factors = KFACFactors(np.diag([1.0, 0.0]), np.eye(1))
    with pytest.raises(ValueError, match=r"`fsd_weight` must be positive, got 0.0; without it no"):
        kronecker([factors], 0.0)
    with pytest.raises(ValueError, match="must be positive definite, got smallest eigenvalue 0;"):
        ekfac(factors, 1.0, 0.0)
