"""G, the Fisher, and the factors of KFAC."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import (
    MLP,
    CategoricalKL,
    CrossEntropy,
    KFACFactors,
    Linear,
    MetaObjective,
    Problem,
    SquaredError,
    SquaredEuclidean,
    complex_step_jacobian,
    ekfac_basis,
    ekfac_eigenvalues,
    empirical_fisher,
    exact_fisher,
    fsd_hessian,
    ggn,
    kfac_factors,
)
from reference.arrays import Array
from reference.curvature import (
    damped_ekfac_inverse,
    exact_damped_inverse,
    factored_damped_factors,
)
from reference.discrepancies import GaussianKL, bregman_of
from reference.losses import BinaryCrossEntropy, GaussianNLL, Loss, PoissonLoss
from verification.l0_oracle.rounding import PassErrors, from_here, pass_errors
from verification.strategies import (
    ALL_DISCREPANCIES,
    CONVEX_LOSSES,
    DISCREPANCIES,
    kfac_cases,
    meta_cases,
    spd_matrices,
)
from verification.strategies.fixed_heads import Divergence
from verification.strategies.outputs import targets
from verification.tolerances import (
    BITWISE,
    FUNCTION,
    PROPAGATED,
    PROPAGATED_COMPLEX,
    ROUNDING,
    SOLVE,
    assert_close,
)

names = pytest.mark.parametrize("name", list(DISCREPANCIES))


def fsd_gradient(case, u: Array) -> Array:
    """The gradient of D_F in u, alone: lambda_FSD = 1, and the loss of a zero residual."""
    network, X = case.problem.network, case.other.inputs
    z, z0 = network.outputs(u, X), network.outputs(case.theta, X)
    return np.einsum("nci,nc->i", network.jacobian(u, X), case.discrepancy.gradient(z, z0)) / len(X)


def curvature_error(passes: PassErrors, H: Array | None = None) -> float:
    """Bound of G's rounding in units of u: |H_rho| <= 2, and an error e_z moves it by 2 e_z.

    Exponentials of z or of -2 z in H, (N, C, C), are larger, and as much more sensitive.
    """
    J, e_J = np.abs(passes.J), passes.e_J
    C = J.shape[1]
    largest = np.full(len(J), 2.0) if H is None else np.maximum(2.0, np.abs(H).max(axis=(1, 2)))
    once = np.einsum("n,nci,ndj->ij", largest, J, e_J)
    error_of_H = np.max(2.0 * passes.e_z + 16.0 * (1.0 + np.abs(passes.z)), axis=1) * largest / 2.0
    products = largest * (2 * C + len(J) + 4)
    twice = np.einsum("n,nci,ndj->ij", error_of_H + products, J, J)
    return float(np.linalg.norm(once + once.T + twice)) / len(J)


@names
@given(st.data())
def test_fsd_gradient_vanishes_at_no_change(name: str, data: st.DataObject) -> None:
    """Exactly: equal numbers are subtracted, and the difference is passed backward."""
    case = data.draw(meta_cases(), label="case")
    objective = MetaObjective(case.problem, DISCREPANCIES[name], 1.0, 0.0)
    q = objective.lookahead_gradient(case.theta, case.theta, case.batch, case.other.inputs)
    assert_close(q, case.gradient, BITWISE, what="q = grad J + grad D_F")


@given(case=meta_cases(smooth=True))
def test_g_is_the_second_derivative_of_the_fsd_at_no_change(case) -> None:
    network, X = case.problem.network, case.other.inputs
    G = fsd_hessian(network, case.discrepancy, case.theta, X)
    numeric = complex_step_jacobian(lambda u: fsd_gradient(case, u), case.theta)
    scale = curvature_error(pass_errors(network, case.theta, X))
    assert_close(G, numeric, PROPAGATED_COMPLEX, size=1, scale=scale, what="G")


@given(case=meta_cases())
def test_ggn_is_the_mean_of_the_products_of_each_example(case) -> None:
    network, X = case.problem.network, case.other.inputs
    J = network.jacobian(case.theta, X)
    H = np.array(case.discrepancy.output_hessian(network.outputs(case.theta, X)))
    expected = np.mean([j.T @ h @ j for j, h in zip(J, H, strict=True)], axis=0)
    magnitude = float(np.linalg.norm(np.einsum("nci,ncd,ndj->ij", *map(np.abs, (J, H, J)))))
    assert_close(
        ggn(J, H), expected, ROUNDING, size=2 * J.shape[1] + len(J), scale=magnitude, what="G"
    )


@given(case=meta_cases())
def test_g_is_positive_semidefinite_and_symmetric(case) -> None:
    G = fsd_hessian(case.problem.network, case.discrepancy, case.theta, case.other.inputs)
    passes = pass_errors(case.problem.network, case.theta, case.other.inputs)
    allowed = ROUNDING.allowed(size=1) * curvature_error(passes)
    assert np.abs(G - G.T).max() <= allowed
    lowest = np.linalg.eigvalsh(0.5 * (G + G.T))[0]
    assert lowest >= -allowed, f"smallest eigenvalue {lowest}, allowed {-allowed}"


LIKELIHOODS: dict[str, Loss] = {
    "kl": CrossEntropy(),
    "bernoulli-kl": BinaryCrossEntropy(),
    "gaussian-kl": GaussianNLL(),
}


@pytest.mark.parametrize("order", ["lookahead-current", "current-lookahead"])
@pytest.mark.parametrize("family", list(LIKELIHOODS))
@given(st.data())
def test_g_of_the_kl_is_the_fisher_of_the_model(
    family: str, order: str, data: st.DataObject
) -> None:
    """G = J^T H_rho J against sum_y p(y|x) score score^T: no Hessian on the second side."""
    case = data.draw(meta_cases(losses={family: LIKELIHOODS[family]}), label="case")
    problem, X = case.problem, case.other.inputs
    rho = ALL_DISCREPANCIES[f"{family}-{order}"]
    G = fsd_hessian(problem.network, rho, case.theta, X)
    passes = pass_errors(problem.network, case.theta, X)
    scale = curvature_error(passes, np.array(rho.output_hessian(passes.z)))
    if family == "gaussian-kl":  # e comes out of mu + sigma e, to eps (1 + |mu| / sigma)
        mu, s = np.split(passes.z, 2, axis=1)
        scale *= 1.0 + float(np.max(np.abs(mu) * np.exp(-s)))
    assert_close(
        G, exact_fisher(problem, case.theta, X), PROPAGATED, size=1, scale=scale, what="Fisher"
    )


@given(case=meta_cases(losses={"poisson": PoissonLoss()}))
def test_g_of_the_poisson_bregman_divergence_is_the_fisher(case) -> None:
    """KL between Poisson distributions, with two points for each count instead of all counts."""
    X, rho = case.other.inputs, bregman_of(case.problem.loss)
    G = fsd_hessian(case.problem.network, rho, case.theta, X)
    passes = pass_errors(case.problem.network, case.theta, X)
    scale = curvature_error(passes, np.array(rho.output_hessian(passes.z)))
    scale *= 1.0 + float(np.exp(passes.z).max())  # the score 1 = (1 + r) - r
    fisher = exact_fisher(case.problem, case.theta, X)
    assert_close(G, fisher, PROPAGATED, size=1, scale=scale, what="Fisher")


@given(case=meta_cases())
def test_g_of_the_squared_distance_is_the_fisher_of_the_unit_gaussian(case) -> None:
    problem = Problem(case.problem.network, SquaredError())
    X = case.other.inputs
    G = fsd_hessian(problem.network, SquaredEuclidean(), case.theta, X)
    passes = pass_errors(problem.network, case.theta, X)
    # The scores are differences of numbers as large as z + sqrt(C), products of two of them.
    factor = (1.0 + float(np.abs(passes.z).max())) * passes.z.shape[1]
    assert_close(
        G,
        exact_fisher(problem, case.theta, X),
        PROPAGATED,
        size=1,
        scale=curvature_error(passes) * factor,
        what="Fisher",
    )


def test_the_empirical_fisher_is_neither_the_fisher_nor_g() -> None:
    """Labels of the data instead of the model's: at a perfect fit it vanishes, the Fisher not."""
    problem = Problem(MLP([1, 2], bias=False), SquaredError())
    theta, X = np.array([1.0, -1.0]), np.array([[2.0]])
    T = problem.network.outputs(theta, X)
    assert_close(empirical_fisher(problem, theta, X, T), np.zeros((2, 2)), ROUNDING, scale=1.0)
    assert_close(exact_fisher(problem, theta, X), 4.0 * np.eye(2), ROUNDING, what="Fisher")


@given(case=meta_cases())
def test_empirical_fisher_is_the_second_moment_of_the_example_gradients(case) -> None:
    g = case.problem.example_gradients(case.theta, *case.batch)
    expected = np.mean([np.outer(row, row) for row in g], axis=0)
    assert_close(
        empirical_fisher(case.problem, case.theta, *case.batch),
        expected,
        ROUNDING,
        size=len(g),
        scale=float(np.sum(g**2)),
        what="E[g g^T]",
    )


@pytest.mark.parametrize("name", list(CONVEX_LOSSES))
@given(st.data())
def test_g_of_the_loss_bregman_divergence_is_the_ggn(name: str, data: st.DataObject) -> None:
    """E[J^T (d^2 L/dz^2) J], with the loss's Hessian by complex steps of its gradient."""
    case = data.draw(meta_cases(), label="case")
    network, X, loss = case.problem.network, case.other.inputs, CONVEX_LOSSES[name]
    passes = pass_errors(network, case.theta, X)
    T = targets(loss, (len(X), network.output_size), np.random.default_rng(0))
    H = [
        complex_step_jacobian(lambda v, n=n: loss.gradient(v[None], T[n : n + 1])[0], passes.z[n])
        for n in range(len(X))
    ]
    classic = np.mean([J.T @ h @ J for J, h in zip(passes.J, H, strict=True)], axis=0)
    G = fsd_hessian(network, bregman_of(loss), case.theta, X)
    scale = curvature_error(from_here(passes), np.array(H))
    assert_close(G, classic, PROPAGATED_COMPLEX, size=1, scale=scale, what="GGN")


def test_the_ggn_of_a_gaussian_likelihood_is_not_its_fisher() -> None:
    """In (mu, log sigma) E[J^T (d^2 L/dz^2) J] has the target and a negative eigenvalue."""
    problem = Problem(Linear(1, 2, bias=False), GaussianNLL())
    theta, X = np.zeros(2), np.ones((1, 1))
    H = GaussianNLL().hessian(np.zeros((1, 2)), np.array([[1.0]]))
    classic = ggn(problem.network.jacobian(theta, X), H)
    assert_close(classic, np.array([[1.0, 2.0], [2.0, 2.0]]), ROUNDING, what="GGN")
    assert np.linalg.eigvalsh(classic)[0] < -0.5
    fisher = exact_fisher(problem, theta, X)
    assert_close(fisher, np.diag([1.0, 2.0]), FUNCTION, what="Fisher")
    assert_close(fsd_hessian(problem.network, GaussianKL(), theta, X), fisher, FUNCTION, what="G")


@given(case=meta_cases(kinds=["linear", "fixed-head"]), seed=st.integers(0, 2**16))
def test_away_from_theta_linear_networks_keep_the_form_of_g(case, seed: int) -> None:
    """J^T (d^2 rho/dz^2 at z) J is the Hessian of D_F at every u if z is linear in u."""
    network, X = case.problem.network, case.other.inputs
    u = case.theta + np.random.default_rng(seed).standard_normal(network.size)
    z, z0 = network.outputs(u, X), network.outputs(case.theta, X)
    H = [
        complex_step_jacobian(
            lambda v, n=n: case.discrepancy.gradient(v[None], z0[n : n + 1])[0], z[n]
        )
        for n in range(len(X))
    ]
    numeric = complex_step_jacobian(lambda v: fsd_gradient(case, v), u)
    here, there = pass_errors(network, u, X), pass_errors(network, case.theta, X)
    # d^2 rho/dz^2 grows with log p - log p0 for KL(p || p0), and so does its sensitivity to z.
    spread = 1.0 + 4.0 * float(np.abs(z - z0).max())
    scale = (curvature_error(here) + curvature_error(there)) * spread
    size = 1 + int(np.abs(z0).max())  # rounding of z0 relative to that of z
    assert_close(ggn(here.J, np.array(H)), numeric, PROPAGATED_COMPLEX, size=size, scale=scale)


def test_away_from_theta_a_curved_network_adds_a_term() -> None:
    """G = J^T H_rho J holds at u = theta only: at u the term (d rho/dz) d^2 z/du^2 appears."""
    network, rho = MLP([1, 1, 1], "tanh", bias=False), SquaredEuclidean()
    theta, u, X = np.array([0.5, 1.0]), np.array([1.5, 2.0]), np.ones((1, 1))
    z, z0 = network.outputs(u, X), network.outputs(theta, X)

    def gradient(v: Array) -> Array:
        return network.jacobian(v, X)[0, 0] * rho.gradient(network.outputs(v, X), z0)[0, 0]

    t = np.tanh(1.5)
    slope, curve = 1 - t**2, -2 * t * (1 - t**2)
    lost = (z - z0)[0, 0] * np.array([[2.0 * curve, slope], [slope, 0.0]])
    H = complex_step_jacobian(gradient, u)
    J = network.jacobian(u, X)
    assert_close(H - ggn(J, rho.output_hessian(z0)), lost, FUNCTION, scale=float(np.linalg.norm(H)))
    assert np.linalg.norm(lost) > 0.1 * np.linalg.norm(H)


@given(case=meta_cases())
def test_kfac_factors_are_sums_over_examples(case) -> None:
    network, X = case.problem.network, case.other.inputs
    trace = network.trace(case.theta, X)
    H = case.discrepancy.output_hessian(trace.outputs)
    factors = kfac_factors(network, case.discrepancy, case.theta, X)
    for (A, B), a, D in zip(factors, trace.layer_inputs, trace.output_backprop, strict=True):
        N, size = len(X), 2 * D.shape[1] + len(X)
        expected_A = sum(np.outer(row, row) for row in a) / N
        expected_B = sum(D[n].T @ H[n] @ D[n] for n in range(N)) / N
        magnitude = float(
            sum(np.linalg.norm(abs(D[n]).T @ abs(H[n]) @ abs(D[n])) for n in range(N))
        )
        assert_close(A, expected_A, ROUNDING, size=N, scale=float(np.sum(a**2)), what="A")
        assert_close(B, expected_B, ROUNDING, size=size, scale=magnitude, what="B")


@pytest.mark.parametrize("divergence", ["squared_error", "kl"])
@given(st.data())
def test_g_is_kfac_where_its_assumptions_hold(divergence: Divergence, data: st.DataObject) -> None:
    """Block-diagonal with blocks A_l kron B_l: for parallel layers with fixed heads, exactly."""
    case = data.draw(kfac_cases(divergence=divergence, max_width=3), label="case")
    network, theta, X = case.problem().network, case.theta(), case.inputs()
    G = fsd_hessian(network, case.discrepancy, theta, X)
    expected = np.zeros_like(G)
    factors = kfac_factors(network, case.discrepancy, theta, X)
    for layer, (A, B) in zip(network.layers, factors, strict=True):
        expected[layer.weight, layer.weight] = np.kron(A, B)
    scale = curvature_error(pass_errors(network, theta, X))
    assert_close(G, expected, PROPAGATED, size=1, scale=scale, what="G")


@pytest.mark.parametrize("divergence", ["squared_error", "kl"])
@given(st.data())
def test_kfac_factors_are_those_that_the_case_was_built_from(
    divergence: Divergence, data: st.DataObject
) -> None:
    case = data.draw(kfac_cases(divergence=divergence, max_width=3), label="case")
    factors = kfac_factors(case.problem().network, case.discrepancy, case.theta(), case.inputs())
    for (A, B), planted in zip(factors, case.kfac(), strict=True):
        # A Cholesky factor or an eigenbasis, and its product with itself; H_rho^(-1/2) H_rho
        # H_rho^(-1/2) costs the condition number of H_rho, 1 / (min p), at most.
        size = 4 * (1 + sum(case.input_sizes) + case.problem().network.output_size)
        H = case.discrepancy.output_hessian(
            case.problem().network.outputs(case.theta(), case.inputs())
        )
        spectrum = np.linalg.eigvalsh(H[0])[1 if divergence == "kl" else 0 :]
        condition = float(spectrum[-1] / spectrum[0])
        assert_close(A, planted.A, SOLVE, size=size, what="A")
        assert_close(B, planted.B, SOLVE, size=size, condition=condition, what="B")


def test_kfac_is_not_g_where_activations_and_derivatives_depend_on_each_other() -> None:
    """Necessity: one linear layer and KL, where p(x) makes H_rho depend on x, and so on a a^T."""
    network = MLP([1, 2], bias=False)
    theta, X, rho = np.array([1.0, -1.0]), np.array([[0.1], [2.0]]), CategoricalKL()
    ((A, B),) = kfac_factors(network, rho, theta, X)
    G = fsd_hessian(network, rho, theta, X)
    assert np.linalg.norm(G - np.kron(A, B)) > 0.3 * np.linalg.norm(G)


@given(A=spd_matrices(max_size=4), B=spd_matrices(max_size=4))
def test_ekfac_basis_diagonalizes_the_kronecker_product(A, B) -> None:
    factors = KFACFactors(A.matrix, B.matrix)
    basis = ekfac_basis(factors)
    U = np.kron(basis.U_A, basis.U_B)
    G = np.kron(A.matrix, B.matrix)
    rebuilt = U @ np.diag(np.outer(basis.beta, basis.alpha).ravel(order="F")) @ U.T
    # eigh has a backward error of a modest multiple of n eps ||.||; three products of length n.
    assert_close(rebuilt, G, ROUNDING, size=len(G), iterations=6, what="U diag U^T")
    assert_close(
        ekfac_eigenvalues(G, basis),
        np.outer(basis.beta, basis.alpha),
        ROUNDING,
        size=len(G),
        iterations=6,
        what="corrected eigenvalues",
    )


@given(
    G=spd_matrices(min_size=4, max_size=4),
    A=spd_matrices(min_size=2, max_size=2),
    B=spd_matrices(min_size=2, max_size=2),
    seed=st.integers(0, 2**16),
)
def test_ekfac_eigenvalues_are_the_nearest_diagonal_in_the_basis(G, A, B, seed: int) -> None:
    """No other diagonal in the same basis is nearer to G."""
    basis = ekfac_basis(KFACFactors(A.matrix, B.matrix))
    U = np.kron(basis.U_A, basis.U_B)
    best = ekfac_eigenvalues(G.matrix, basis)
    other = best + np.linalg.norm(best) * np.random.default_rng(seed).standard_normal(best.shape)

    def distance(values: Array) -> float:
        return float(np.linalg.norm(G.matrix - U @ np.diag(values.ravel(order="F")) @ U.T))

    slack = ROUNDING.allowed(size=4, iterations=6) * float(np.linalg.norm(G.matrix))
    assert distance(best) <= distance(other) + slack


small_spd = spd_matrices(max_size=3, max_condition=1e2)
dampings = st.floats(-4.0, 2.0).map(lambda decade: 10.0**decade)


@given(A=small_spd, B=small_spd, damping=dampings)
def test_exact_damped_inverse_inverts_the_damped_kronecker_product(A, B, damping: float) -> None:
    damped = np.kron(A.matrix, B.matrix) + damping * np.eye(len(A.matrix) * len(B.matrix))
    inverse = exact_damped_inverse(KFACFactors(A.matrix, B.matrix), damping)
    condition = float(np.linalg.cond(damped))
    assert_close(inverse, np.linalg.inv(damped), SOLVE, condition=condition, what="inverse")


@given(A=small_spd, B=small_spd, damping=dampings)
def test_factored_damping_adds_what_its_product_says(A, B, damping: float) -> None:
    """(A + pi r) kron (B + r/pi) = A kron B + gamma I + r (pi I kron B + A kron I / pi), r^2 =
    gamma: so the factored inverse is below the exact one, in the order of symmetric matrices.
    """
    a, b = A.matrix, B.matrix
    factored = np.kron(*factored_damped_factors(KFACFactors(a, b), damping))
    I_a, I_b, r = np.eye(len(a)), np.eye(len(b)), np.sqrt(damping)
    pi = np.sqrt(np.mean(A.eigenvalues) / np.mean(B.eigenvalues))
    exact = np.kron(a, b) + damping * np.kron(I_a, I_b)
    added = r * (pi * np.kron(I_a, b) + np.kron(a, I_b) / pi)
    assert_close(factored, exact + added, ROUNDING, size=12, what="factored damping")
    gap = exact_damped_inverse(KFACFactors(a, b), damping) - np.linalg.inv(factored)
    slack = SOLVE.allowed(condition=float(np.linalg.cond(exact)), size=len(exact))
    assert np.linalg.eigvalsh(gap)[0] >= -slack * np.linalg.norm(np.linalg.inv(exact))


@given(A=small_spd, B=small_spd, decade=st.floats(-1.0, 1.0))
def test_pi_minimizes_the_trace_of_what_factored_damping_adds(A, B, decade: float) -> None:
    a, b = A.matrix, B.matrix
    damped = factored_damped_factors(KFACFactors(a, b), 1.0)
    pi = float(np.trace(damped.A - a) / len(a))

    def trace(p: float) -> float:
        return float(p * len(a) * np.trace(b) + np.trace(a) * len(b) / p)

    # pi is read off A + pi I, to eps (|A| + pi) / pi; at its minimum the trace is flat in log pi.
    relative = 8 * np.finfo(float).eps * (np.abs(a).max() + pi) / pi
    assert trace(pi) <= trace(pi * 10.0**decade) * (1.0 + relative**2 + ROUNDING.allowed(size=6))
    # d trace / d log pi = p in tr B - tr A out / p vanishes at pi: the two terms are equal.
    terms = pi * len(a) * np.trace(b), np.trace(a) * len(b) / pi
    condition = 1.0 + float(np.abs(a).max()) / pi
    assert_close(terms[0], terms[1], ROUNDING, size=6, condition=condition, what="the two terms")


@given(
    G=spd_matrices(min_size=4, max_size=4),
    A=spd_matrices(min_size=2, max_size=2),
    B=spd_matrices(min_size=2, max_size=2),
    damping=dampings,
)
def test_damped_ekfac_inverse_has_g_on_its_diagonal(G, A, B, damping: float) -> None:
    """In the eigenbasis, 1 / (u^T G u + gamma) for each eigenvector u of A kron B."""
    basis = ekfac_basis(KFACFactors(A.matrix, B.matrix))
    inverse = damped_ekfac_inverse(basis, ekfac_eigenvalues(G.matrix, basis), damping)
    vectors = np.kron(basis.U_A, basis.U_B)
    expected = sum(np.outer(u, u) / (u @ G.matrix @ u + damping) for u in vectors.T)
    condition = (max(G.eigenvalues) + damping) / (min(G.eigenvalues) + damping)
    assert_close(inverse, expected, SOLVE, condition=condition, size=4, what="EKFAC inverse")


def test_damped_inverses_check_their_arguments() -> None:
    singular = KFACFactors(np.diag([1.0, 0.0]), np.eye(1))
    with pytest.raises(ValueError, match="`damping` must be positive, got 0; raise `damping`"):
        exact_damped_inverse(singular, 0.0)
    with pytest.raises(ValueError, match=r"`damping` must be non-negative and finite, got -1.0"):
        factored_damped_factors(singular, -1.0)
    with pytest.raises(ValueError, match="must have positive traces, got 0 and 1 a row; use"):
        factored_damped_factors(KFACFactors(np.zeros((1, 1)), np.eye(1)), 1.0)
