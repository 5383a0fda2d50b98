"""P22 Table 1 and appendix F: each closed form is the arg min of the objective its row names."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from reference import (
    MLP,
    Batch,
    CategoricalKL,
    CrossEntropy,
    Linear,
    MetaObjective,
    Problem,
    SquaredError,
    SquaredEuclidean,
    certify,
    complex_step_jacobian,
    exact_step,
    fsd_hessian,
)
from reference.arrays import Array
from reference.classical_methods import (
    TABLE_1,
    gauss_newton,
    generalized_gauss_newton,
    gradient_descent,
    hessian_free,
    natural_gradient,
    newton,
    row_objective,
)
from reference.discrepancies import Discrepancy, bregman_of
from verification.l0_oracle.classical_steps import closed_form
from verification.profiles import share
from verification.strategies import (
    CONVEX_LOSSES,
    SMOOTH,
    SPD,
    meta_cases,
    spd_matrices,
)
from verification.strategies.classical_methods import (
    classical_weights,
    damped_enough,
    row_cases,
    white,
)
from verification.tolerances import COMPLEX_STEP, ROUNDING, SOLVE, assert_close

rows = pytest.mark.parametrize("row", list(TABLE_1))


@rows
@share(0.5)
@given(st.data())
def test_each_row_minimizes_the_objective_that_it_names(row: str, data: st.DataObject) -> None:
    """Stationary by complex steps of the objective's value, with a positive definite Hessian; and
    the numerical arg min is the closed form.
    """
    case = data.draw(row_cases(row), label="case")
    if row == "damped Newton":
        case = damped_enough(case)
    objective = row_objective(row, case.problem, case.discrepancy, *case.weights)
    args = case.theta, case.batch, case.other.inputs
    found = exact_step(objective, *args)
    assert found.kind == "minimum", found
    slope = complex_step_jacobian(
        lambda u: objective.terms(case.theta, u, *args[1:]).total[None], found.u
    )[0]
    size = float(np.linalg.norm(case.theta) + np.linalg.norm(found.u))
    rounding = COMPLEX_STEP.allowed(size=case.problem.network.size) * found.max_eigenvalue
    assert np.linalg.norm(slope) <= 2.0 * found.gradient_tolerance + rounding * (1.0 + size)
    if row == "direct proximal optimization":
        return  # it has no closed form
    closed, M = closed_form(row, case)
    at = certify(objective, case.theta, closed, *args[1:])
    assert at.kind == "minimum", at
    condition = float(np.linalg.cond(M))
    scale = float(np.linalg.norm(case.theta) + np.linalg.norm(closed))
    # The Fisher of the model's targets and the objective's G differ by the rounding of their sums.
    terms = len(closed) + 4 * case.problem.network.output_size + len(case.other.inputs)
    assert_close(
        found.u, closed, SOLVE, condition=condition, size=terms, scale=scale, what=f"{row}: u"
    )


@share(0.5)
@given(st.data())
def test_the_direct_row_equals_a_minimizer_that_knows_values_and_slopes_only(
    data: st.DataObject,
) -> None:
    """For a convex objective ||u - v|| <= (||grad u|| + ||grad v||) / lambda_WSD, for every v."""
    case = data.draw(row_cases("direct proximal optimization"), label="case")
    objective, args = case.objective(), (case.batch, case.other.inputs)
    u = exact_step(objective, case.theta, *args)
    found = minimize(
        lambda v: float(objective.terms(case.theta, v, *args).total),
        case.theta,
        jac=lambda v: objective.lookahead_gradient(case.theta, v, *args),
        method="BFGS",
        options={"gtol": 1e-9},
    )
    left = float(np.linalg.norm(found.jac))
    assert left <= 1e-6 * (1.0 + np.linalg.norm(case.gradient)), found
    distance = float(np.linalg.norm(u.u - found.x))
    rounding = SOLVE.allowed(size=len(found.x)) * (1.0 + float(np.linalg.norm(u.u)))
    assert distance <= (left + u.gradient_norm) / case.weights.wsd + rounding


@given(
    widths=st.integers(1, 3),
    activation=st.sampled_from(SMOOTH),
    seed=st.integers(0, 2**16),
    residual=st.floats(30.0, 100.0),
    damping=st.floats(0.0, 0.9),
)
def test_newtons_row_has_no_arg_min_where_the_hessian_is_indefinite(
    widths: int, activation: str, seed: int, residual: float, damping: float
) -> None:
    """Eq. 31 is then a saddle of eq. 27, which falls by t^2 |lambda| / 2 along an eigenvector.

    A large residual r makes H = J^T J + r d^2 z/dtheta^2 indefinite: d^2 z/dtheta^2 has zeros on
    its diagonal, for the last weights, and slopes beside them.
    """
    rng = np.random.default_rng(seed)
    problem = Problem(MLP([1, widths, 1], activation, bias=False), SquaredError())
    theta, X = 0.5 * rng.standard_normal(problem.network.size), np.ones((1, 1))
    batch = Batch(X, problem.network.outputs(theta, X) - residual)
    g, H = problem.gradient(theta, *batch), problem.hessian(theta, *batch)
    eigenvalues, vectors = np.linalg.eigh(H)
    assert eigenvalues[0] < 0.0 < eigenvalues[-1]
    wsd = damping * -float(eigenvalues[0])
    objective = row_objective("damped Newton", problem, SquaredEuclidean(), 0.0, wsd)
    u = newton(theta, g, H, wsd)
    point = certify(objective, theta, u, batch, X)
    condition = float(np.linalg.cond(H + wsd * np.eye(len(H))))
    if condition < 1e5:  # the certificate asks for 1e-10, and the solve costs eps condition
        assert point.kind == "saddle", point
    t = 1.0 + float(np.linalg.norm(u))
    along = objective.terms(theta, u + t * vectors[:, 0], batch, X).total
    fall = -0.5 * t**2 * (eigenvalues[0] + wsd)
    # Beside the terms' own rounding, u is stationary to the accuracy of its solve, eps condition.
    moved = float(np.linalg.norm(u - theta)) + t
    scale = (np.abs(eigenvalues).max() + wsd) * moved**2 + np.linalg.norm(g) * moved
    assert_close(
        np.float64(point.value - along),
        np.float64(fall),
        SOLVE,
        condition=condition,
        size=len(u),
        scale=float(scale) + abs(point.value),
        what="fall along the eigenvector",
    )


def test_newton_at_a_saddle_climbs() -> None:
    """f = w2 tanh(w1), t = 1, theta = (0.1, 0.1): eq. 31 runs to the saddle near 0, uphill."""
    problem = Problem(MLP([1, 1, 1], bias=False), SquaredError())
    batch, theta = Batch(np.ones((1, 1)), np.ones((1, 1))), np.array([0.1, 0.1])
    H = problem.hessian(theta, *batch)
    u = newton(theta, problem.gradient(theta, *batch), H)
    objective = row_objective("Newton", problem, SquaredEuclidean(), 0.0, 0.0)
    point = certify(objective, theta, u, batch, batch.inputs)
    assert point.kind == "saddle"
    assert point.rise > 0.0
    assert problem.value(u, *batch) > problem.value(theta, *batch)
    assert np.linalg.norm(u) < 0.01


@given(seed=st.integers(0, 2**16), outputs=st.integers(1, 2), half=st.booleans())
def test_gauss_newton_is_least_squares(seed: int, outputs: int, half: bool) -> None:
    """min ||r + J d|| by `lstsq`; and damped Newton's objective with the Gauss-Newton matrix."""
    rng = np.random.default_rng(seed)
    network = Linear(2, outputs)
    problem, theta = Problem(network, SquaredError()), rng.standard_normal(network.size)
    X = white(4, 2, seed)
    T = rng.standard_normal((4, outputs))
    J, r = network.jacobian(theta, X), network.outputs(theta, X) - T
    u = gauss_newton(theta, J, r)
    rows = J.reshape(-1, network.size)
    expected = theta + np.linalg.lstsq(rows, -r.ravel(), rcond=None)[0]
    condition = float(np.linalg.cond(rows)) ** 2
    scale = float(np.linalg.norm(theta) + np.linalg.norm(expected))
    args = {"condition": condition, "size": 4 * network.size, "scale": scale}
    assert_close(u, expected, SOLVE, what="Gauss-Newton step", **args)
    # Of the squared error in MetaObjective's terms: the proximal step with squared Euclidean FSD.
    # Without the half in rho, lambda is 1/2.
    rho, fsd = (SquaredEuclidean(), 1.0) if half else (SquaredEuclidean(half=False), 0.5)
    objective = MetaObjective(problem, rho, fsd, 0.0, "linear", "quadratic")
    assert_close(exact_step(objective, theta, Batch(X, T), X).u, u, SOLVE, what="arg min", **args)


@given(
    M=spd_matrices(max_size=5, max_condition=1e2, max_log_scale=1.0),
    decade=st.floats(-2.0, 1.0),
    seed=st.integers(0, 2**16),
)
def test_hessian_free_iterates_minimize_over_krylov_subspaces(
    M: SPD, decade: float, seed: int
) -> None:
    """Each iterate against the minimizer over an orthonormal basis of span{g, .., M^(k-1) g}.

    By the objective's value, which is flat at its minimum, and exact after n iterations.
    """
    n, wsd = len(M.eigenvalues), 10.0**decade
    rng = np.random.default_rng(seed)
    theta, g = rng.standard_normal((2, n))
    damped = M.matrix + wsd * np.eye(n)
    step = hessian_free(theta, g, lambda v: M.matrix @ v, wsd)
    condition = float(np.linalg.cond(damped))

    def value(d: Array) -> float:
        return float(g @ d + 0.5 * d @ damped @ d)

    K = np.zeros((n, 0))
    least = float(0.5 * g @ np.linalg.solve(damped, g))
    for k, iterate in enumerate(step.iterates[1:], start=1):
        # The next basis vector, orthogonalized twice (Giraud, Langou, Rozloznik 2005).
        v = g if k == 1 else damped @ K[:, -1]
        for _ in range(2):
            v = v - K @ (K.T @ v)
        if np.linalg.norm(v) <= 1e-8 * np.linalg.norm(damped):
            break  # the subspace is invariant: the minimum is reached
        K = np.column_stack([K, v / np.linalg.norm(v)])
        best = K @ np.linalg.solve(K.T @ damped @ K, -K.T @ g)
        assert_close(
            np.float64(value(iterate - theta)),
            np.float64(value(best)),
            SOLVE,
            condition=condition,
            size=n,
            scale=least + float(np.abs(g) @ np.abs(theta)),
            what=f"model after {k} iterations",
        )
    values = [value(iterate - theta) for iterate in step.iterates]
    slack = SOLVE.allowed(condition=condition, size=n) * (least + float(np.abs(g) @ np.abs(theta)))
    assert all(after <= before + slack for before, after in pairwise(values))
    # The conjugate directions lose their conjugacy to eps condition.
    assert_close(
        step.theta,
        newton(theta, g, M.matrix, wsd),
        SOLVE,
        condition=condition**1.5,
        size=n,
        scale=float(np.linalg.norm(theta) + np.linalg.norm(step.theta)),
        what="step",
    )


@pytest.mark.parametrize("model", ["quadratic", "gauss_newton"])
@share(0.25)
@given(st.data())
def test_hessian_free_minimizes_the_second_order_loss_without_fsd(
    model: str, data: st.DataObject
) -> None:
    """P22 section 3.2: with H (eq. 27), or with the GGN as Martens, which is never indefinite."""
    case = data.draw(
        meta_cases(smooth=True, pairs=classical_weights, losses=CONVEX_LOSSES, small=True)
    )
    case = damped_enough(case) if model == "quadratic" else case
    wsd = case.weights.wsd
    objective = MetaObjective(case.problem, case.discrepancy, 0.0, wsd, model)
    curvature = objective.loss_curvature(case.theta, case.batch)
    step = hessian_free(case.theta, case.gradient, lambda v: curvature @ v, wsd, iterations=100)
    found = exact_step(objective, case.theta, case.batch, case.other.inputs)
    assert found.kind == "minimum"
    # Both are within their gradient over the strong convexity of the arg min.
    apart = (step.residual_norm + found.gradient_norm) / found.min_eigenvalue
    condition = found.max_eigenvalue / found.min_eigenvalue
    size = float(np.linalg.norm(case.theta) + np.linalg.norm(found.u))
    rounding = SOLVE.allowed(condition=condition, size=len(found.u)) * size
    assert np.linalg.norm(step.theta - found.u) <= apart + rounding
    assert step.residual_norm <= found.gradient_tolerance


def test_hessian_free_stops_where_its_residual_is_rounding() -> None:
    """Its recursion goes on falling, down to where its square is 0 beside that of a direction."""
    M = np.array([[4.0, 1.0, 0.5], [1.0, 3.0, 0.2], [0.5, 0.2, 2.0]])
    g = np.array([1.0, -2.0, 0.7])
    step = hessian_free(np.zeros(3), g, lambda v: M @ v, iterations=1_000)
    assert step.residual_norm <= np.finfo(float).eps * np.linalg.norm(g)
    assert len(step.iterates) <= 10
    condition = float(np.linalg.cond(M))
    assert_close(step.theta, -np.linalg.solve(M, g), SOLVE, condition=condition, size=3)


@pytest.mark.parametrize(
    ("method", "divergence"),
    [
        ("natural gradient", CategoricalKL()),
        ("generalized Gauss-Newton", bregman_of(CrossEntropy())),
    ],
)
def test_undamped_rows_refuse_a_singular_curvature(method: str, divergence: Discrepancy) -> None:
    """A softmax does not see a shift of all logits: F and G are singular for every batch."""
    problem = Problem(Linear(1, 2, bias=False), CrossEntropy())
    theta, X = np.zeros(2), np.ones((1, 1))
    G = fsd_hessian(problem.network, divergence, theta, X)
    step = natural_gradient if method == "natural gradient" else generalized_gauss_newton
    with pytest.raises(ValueError, match=r"must be positive definite, got .* raise `wsd_weight`"):
        step(theta, np.ones(2), G, 1.0)
    with pytest.raises(ValueError, match=r"`H` \+ `wsd_weight` I must be non-singular, got an eig"):
        newton(theta, np.ones(2), problem.hessian(theta, X, np.array([0])))


def test_classical_methods_check_their_arguments() -> None:
    two = np.ones(2)
    with pytest.raises(ValueError, match=r"`wsd_weight` must be positive, got 0.0; without it"):
        gradient_descent(two, two, 0.0)
    with pytest.raises(ValueError, match=r"`g` must have shape \(2,\), got \(3,\)"):
        newton(two, np.ones(3), np.eye(2))
    with pytest.raises(ValueError, match=r"`name` must be one of .* got 'Adam'; choose one"):
        row_objective("Adam", Problem(Linear(1, 1), SquaredError()), SquaredEuclidean(), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"`product` must have positive curvature, got -2 along"):
        hessian_free(two, two, lambda v: -v)
    with pytest.raises(ValueError, match=r"`r` must have shape \(1, 1\), got \(2, 1\)"):
        gauss_newton(two, np.ones((1, 1, 2)), np.ones((2, 1)))
    assert_close(hessian_free(two, np.zeros(2), lambda v: v).theta, two, ROUNDING, what="at rest")
