"""P22 Theorem 1, one assumption dropped at a time.

P* = (lambda_FSD G + lambda_WSD I)^-1 is *the* minimizer of Q-hat. It needs

| assumption | without it |
|---|---|
| E[g g^T] non-singular | a family of minimizers, with other steps for other gradients |
| lambda_FSD G + lambda_WSD I positive definite | a saddle point: Q-hat falls without bound |
| G symmetric | the minimizer has (G + G^T) / 2 for G |
| loss linearized | (H + lambda_FSD G + lambda_WSD I)^-1 is better; P* may raise the loss |
| FSD quadratic | a bounded divergence holds no linear loss: no minimizer without WSD |

Second-order approximations of divergences are symmetric and positive semidefinite, so that the
second assumption fails only for lambda_WSD = 0 (or for an FSD that is no divergence).
"""

import numpy as np
from hypothesis import find, given
from hypothesis import strategies as st

from reference import (
    Batch,
    CategoricalKL,
    FixedHead,
    Linear,
    MetaObjective,
    Problem,
    SquaredError,
    SquaredEuclidean,
    approximate_meta_gradient,
    approximate_meta_objective,
    complex_step_jacobian,
    dense,
    exact_step,
    preconditioned,
    proximity_matrix,
)
from reference.arrays import Array
from reference.discrepancies import Discrepancy
from verification.profiles import share
from verification.strategies import spd_matrices, weights
from verification.tolerances import COMPLEX_STEP, ROUNDING, SOLVE, assert_close

seeds = st.integers(0, 2**16)
positive = weights(min_decade=-1.0, max_decade=1.0, zero=False)


def test_the_smallest_case_without_a_unique_minimizer_has_two_parameters_and_one_gradient() -> None:
    """Found: n = 2, g = (0, 1) alone. P* and P* + e_1 e_1^T take the same step along g, reach the
    same Q-hat, and take different steps along (1, 0).
    """

    def several_minimizers(rows: list[list[int]]) -> bool:
        g = np.array(rows, dtype=float)
        return bool(g.any()) and dense(g, np.eye(len(rows[0]))).rank < len(rows[0]) ** 2

    sizes = st.tuples(st.integers(1, 3), st.integers(1, 3))
    entries = st.integers(-2, 2)
    cases = sizes.flatmap(
        lambda size: st.lists(
            st.lists(entries, min_size=size[0], max_size=size[0]),
            min_size=size[1],
            max_size=size[1],
        )
    )
    assert find(cases, several_minimizers) == [[0, 1]]
    g, M = np.array([[0.0, 1.0]]), 2.0 * np.eye(2)
    star = np.linalg.inv(M)
    other = star + np.diag([1.0, 0.0])
    least, as_low = (approximate_meta_objective(P, g, M) for P in (star, other))
    assert least == as_low == -0.25
    theta = np.zeros(2)
    assert (preconditioned(theta, g[0], star) == preconditioned(theta, g[0], other)).all()
    new = np.array([1.0, 0.0])
    assert preconditioned(theta, new, star).tolist() == [-0.5, 0.0]
    assert preconditioned(theta, new, other).tolist() == [-1.5, 0.0]


def test_the_smallest_indefinite_curvature_has_no_minimizer() -> None:
    """Found: one parameter, G = -1, lambda_FSD = 1, lambda_WSD = 0. Q-hat(P) = -P - P^2 / 2."""
    one = np.ones((1, 1))

    def falls_from_eq_50(case: tuple[int, int]) -> bool:
        M = np.array([[case[0] + case[1]]], dtype=float)
        if not M.any():
            return False
        P = np.linalg.inv(M)
        return approximate_meta_objective(P + 1.0, one, M) < approximate_meta_objective(P, one, M)

    assert find(st.tuples(st.integers(-3, 3), st.integers(0, 3)), falls_from_eq_50) == (-1, 0)


@given(stiff=spd_matrices(min_size=2, max_size=3, max_condition=1e2), seed=seeds)
def test_with_an_indefinite_curvature_eq_50_is_a_saddle(stiff, seed: int) -> None:
    """The smallest eigenvalue's sign is turned: eq. 50's P stays stationary, and along v v^T, v its
    eigenvector, Q-hat falls as -|mu| t^2 v^T S v / 2 without bound; along the others it rises.
    """
    n = len(stiff.matrix)
    rng = np.random.default_rng(seed)
    eigenvalues, vectors = np.linalg.eigh(stiff.matrix)
    eigenvalues[0] *= -1.0
    M = (vectors * eigenvalues) @ vectors.T
    M = 0.5 * (M + M.T)
    g = rng.standard_normal((2 * n, n))
    S = g.T @ g / len(g)
    P = np.linalg.inv(M)
    condition = stiff.condition
    gradient = approximate_meta_gradient(P, g, M)
    scale = float(np.linalg.norm(S))
    assert_close(
        gradient,
        np.zeros_like(M),
        SOLVE,
        condition=condition,
        size=3 * n,
        scale=scale,
        what="slope",
    )
    at = approximate_meta_objective(P, g, M)
    for column, mu in zip(vectors.T, eigenvalues, strict=True):
        ray = np.outer(column, column)
        for t in (1.0, 1e3):
            length = t * float(np.linalg.norm(P))
            change = approximate_meta_objective(P + length * ray, g, M) - at
            expected = 0.5 * mu * length**2 * (column @ S @ column)
            # the slope, zero but for rounding, is followed over the length
            scale = abs(at) + float(np.linalg.norm(S)) * length + abs(expected)
            scale += float(np.linalg.norm(M) * np.linalg.norm(S)) * length * (1.0 + length)
            assert_close(
                np.float64(change), expected, SOLVE, condition=condition, size=3 * n, scale=scale
            )
    falling = np.outer(vectors[:, 0], vectors[:, 0])
    far = approximate_meta_objective(P + 1e6 * np.linalg.norm(P) * falling, g, M)
    assert far < min(at, 0.0)


@given(G=spd_matrices(min_size=2, max_size=3, max_condition=1e1), seed=seeds)
def test_only_the_symmetric_part_of_g_counts(G, seed: int) -> None:
    """With G + K, K skew, the minimizer is that of G, and eq. 50 with G + K is not stationary."""
    rng = np.random.default_rng(seed)
    n = len(G.matrix)
    K = rng.standard_normal((n, n))
    K = K - K.T
    g = rng.standard_normal((2 * n, n))
    S = g.T @ g / len(g)

    def gradient(P: Array) -> Array:
        """Of eq. 43 with G + K, by complex steps."""
        flat = complex_step_jacobian(
            lambda phi: np.array([approximate_meta_objective(phi.reshape(n, n), g, G.matrix + K)]),
            P.ravel(),
        )
        return flat.reshape(n, n)

    star, skewed = np.linalg.inv(G.matrix), np.linalg.inv(G.matrix + K)
    size = 3 * n + len(g)
    scale = float(np.trace(S)) * (1.0 + float(np.linalg.norm(G.matrix + K) * np.linalg.norm(star)))
    condition = G.condition
    zero = np.zeros((n, n))
    assert_close(
        gradient(star), zero, SOLVE, condition=condition, size=size, scale=scale, what="P*"
    )
    # (G + K) P = I leaves -K P S of the gradient, which needs G = (G + K) - K
    left = -K @ skewed @ S
    scale = float(np.trace(S)) * (
        1.0 + float(np.linalg.norm(G.matrix + K) * np.linalg.norm(skewed))
    )
    condition = float(np.linalg.cond(G.matrix + K))
    assert_close(
        gradient(skewed), left, SOLVE, condition=condition, size=size, scale=scale, what="eq. 50"
    )
    assert np.linalg.norm(left) > 0.0


def test_without_the_linearized_loss_p_star_may_raise_the_loss() -> None:
    """J = (u - 1)^2 / 2 at theta = 0 with lambda_FSD = 0 and lambda_WSD = 1/k: P* = k steps to k.

    Found: from k = 3 on the loss is above its start. The exact objective's minimizer over P is
    1 / (1 + 1/k), which never overshoots.
    """
    problem = Problem(Linear(1, 1, bias=False), SquaredError())
    theta, batch = np.zeros(1), Batch(np.ones((1, 1)), np.ones((1, 1)))
    g = problem.gradient(theta, *batch)

    def rises(k: int) -> bool:
        step = preconditioned(theta, g, k * np.eye(1))
        return problem.value(step, *batch) > problem.value(theta, *batch)

    assert find(st.integers(1, 10), rises) == 3
    objective = MetaObjective(problem, SquaredEuclidean(), 0.0, 1 / 3)
    point = exact_step(objective, theta, batch, batch.inputs)
    assert_close(point.u, [0.75], SOLVE, condition=4.0, what="exact")


@given(
    H=spd_matrices(min_size=2, max_size=2, max_condition=1e2, max_log_scale=1.0),
    wsd=positive,
    seed=seeds,
)
def test_with_the_exact_loss_the_minimizer_has_its_hessian(H, wsd: float, seed: int) -> None:
    """Linear regression with E[x x^T] = H: over all P, the exact Q is least at
    (H + lambda_FSD G + lambda_WSD I)^-1, by complex steps of Q itself; at P* its slope is H P* S.
    """
    rng = np.random.default_rng(seed)
    X = np.sqrt(2.0) * np.linalg.cholesky(H.matrix).T  # X^T X / 2 = H
    problem = Problem(Linear(2, 1, bias=False), SquaredError())
    other = rng.standard_normal((3, 2))
    theta, fsd = np.zeros(2), 1.0
    targets = [rng.standard_normal((2, 1)) for _ in range(4)]  # batches of equal inputs
    batches = [Batch(X, T) for T in targets]
    gradients = np.array([problem.gradient(theta, *batch) for batch in batches])
    objective = MetaObjective(problem, SquaredEuclidean(), fsd, wsd)

    def gradient(P: Array) -> Array:
        """Of the mean of Q(theta - P g) over the batches, by complex steps of its terms."""

        def value(phi: Array) -> Array:
            totals = [
                objective.terms(theta, theta - phi.reshape(2, 2) @ g, batch, other).total
                for g, batch in zip(gradients, batches, strict=True)
            ]
            return np.array([np.mean(totals)])

        return complex_step_jacobian(value, P.ravel()).reshape(2, 2)

    G = other.T @ other / len(other)
    M = proximity_matrix(G, fsd, wsd)
    S = gradients.T @ gradients / len(gradients)
    star, exact = np.linalg.inv(M), np.linalg.inv(H.matrix + M)
    for P, left in ((exact, np.zeros((2, 2))), (star, H.matrix @ star @ S)):
        whole = H.matrix + M
        condition = float(np.linalg.cond(whole) * np.linalg.cond(M))
        magnitude = float(np.linalg.norm(whole) * np.linalg.norm(P) * np.trace(S))
        # the residuals of the two examples are as large as their targets, not as their mean g
        terms = float(np.mean([np.linalg.norm(T) for T in targets]) * np.linalg.norm(X))
        scale = magnitude + terms * float(np.abs(gradients).max()) + float(np.trace(S))
        assert_close(gradient(P), left, SOLVE, condition=condition, size=12, scale=scale)


def binary(order: str) -> tuple[Problem, Discrepancy]:
    """Logits (u, -u) of one parameter: p0 is uniform at theta = 0, and G = 1."""
    problem = Problem(FixedHead([np.array([[1.0], [-1.0]])], [1]), SquaredError())
    return problem, CategoricalKL(order)


def test_without_the_quadratic_fsd_a_linear_loss_may_have_no_minimizer() -> None:
    """KL(p || p0) <= log 2 for a uniform p0: with a linear loss Q falls without bound, where Q-hat
    has P* = 1 / lambda_FSD.
    """
    problem, rho = binary("lookahead_current")
    theta, x = np.zeros(1), np.ones((1, 1))
    batch = Batch(x, np.array([[1.0, -1.0]]))
    slope = problem.gradient(theta, *batch)  # -2
    objective = MetaObjective(problem, rho, 10.0, 0.0, loss="linear")
    start = float(problem.value(theta, *batch))
    for u in (1e1, 1e2, 1e3):
        total = float(objective.terms(theta, np.array([u]), batch, x).total)
        assert total <= start + slope.item() * u + 10.0 * np.log(2.0) * (1.0 + ROUNDING.allowed())
    assert total < -1e3
    M = proximity_matrix(np.eye(1), 10.0, 0.0)
    assert_close(dense(slope[None], M).P, [[0.1]], SOLVE, what="P*")


@share(0.5)
@given(ratio=st.floats(0.05, 0.9))
def test_without_the_quadratic_fsd_the_step_is_longer_than_p_stars(ratio: float) -> None:
    """KL(p0 || p) = log cosh u: with the slope -r lambda_FSD the exact step is artanh r > r.

    It exists for r < 1 alone; Q-hat's step is r for every r, which is stationary only to O(r^3).
    """
    problem, rho = binary("current_lookahead")
    theta, x = np.zeros(1), np.ones((1, 1))
    batch = Batch(x, np.array([[1.0, -1.0]]))
    fsd = 2.0 / ratio  # the slope is -2
    objective = MetaObjective(problem, rho, fsd, 0.0, loss="linear")
    point = exact_step(objective, theta, batch, x)
    curvature = 1.0 - ratio**2  # of log cosh at artanh r
    expected = np.array([np.arctanh(ratio)])
    assert_close(point.u, expected, SOLVE, condition=1 / curvature**2, size=2, what="exact step")
    star = preconditioned(theta, problem.gradient(theta, *batch), np.eye(1) / fsd)
    assert_close(star, [ratio], ROUNDING, what="P* step")
    left = objective.lookahead_gradient(theta, star, batch, x)
    slope = fsd * (np.tanh(ratio) - ratio)
    assert_close(left, [slope], COMPLEX_STEP, size=2, scale=fsd, what="slope left at P*")
    assert slope < -fsd * ratio**3 / 4.0 < 0.0
