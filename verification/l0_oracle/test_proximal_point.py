"""The proximal point step: optimality, descent, limits, closed forms, and its certificate."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from reference import (
    MLP,
    Batch,
    Bregman,
    CategoricalKL,
    CrossEntropy,
    Linear,
    MetaObjective,
    Problem,
    ProximalPoint,
    SquaredError,
    SquaredEuclidean,
    certify,
    closed_form_step,
    exact_step,
    fsd_hessian,
    proximity_matrix,
)
from reference.arrays import Array
from reference.discrepancies import BernoulliKL
from reference.losses import BinaryCrossEntropy
from reference.proximal_point import search
from verification.l0_oracle.rounding import meta_gradient_error, meta_value_error
from verification.profiles import share
from verification.strategies import (
    LOSSES,
    MetaCase,
    ProximityWeights,
    batches,
    meta_cases,
    networks,
    parameters,
    scaled_normals,
    weights,
)
from verification.tolerances import ROUNDING, SOLVE, assert_close

pairs = st.builds(
    ProximityWeights,
    weights(min_decade=-2.0, max_decade=1.0),
    weights(min_decade=-1.0, max_decade=2.0, zero=False),
)
small_steps = share(0.5)


@st.composite
def linear_cases(
    draw: st.DrawFn, discrepancies: tuple = (SquaredEuclidean(),), loss: str = "squared_error"
) -> MetaCase:
    """Networks that are linear in theta, with divergences of the outputs that are convex."""
    network = draw(networks(kinds=["linear", "fixed-head"]), label="network")
    return MetaCase(
        problem=Problem(network, LOSSES[loss]),
        theta=draw(parameters(network), label="theta"),
        batch=draw(batches(network, LOSSES[loss]), label="B"),
        other=draw(batches(network, LOSSES[loss]), label="B'"),
        discrepancy=draw(st.sampled_from(discrepancies), label="discrepancy"),
        weights=draw(pairs, label="weights"),
    )


CONVEX = (SquaredEuclidean(), CategoricalKL("current_lookahead"))
convex_cases = st.one_of([linear_cases(CONVEX, loss) for loss in LOSSES])


def step_of(case: MetaCase, objective: MetaObjective | None = None) -> ProximalPoint:
    return exact_step(objective or case.objective(), case.theta, case.batch, case.other.inputs)


def value_at(case: MetaCase, u: Array) -> float:
    return float(case.objective().terms(case.theta, u, case.batch, case.other.inputs).total)


def curvature(case: MetaCase) -> tuple[Array, Array]:
    """G of the discrepancy over B' and the Hessian of the cost over B, at theta."""
    G = fsd_hessian(case.problem.network, case.discrepancy, case.theta, case.other.inputs)
    return 0.5 * (G + G.T), case.problem.hessian(case.theta, *case.batch)


def value_slack(case: MetaCase, u: Array) -> float:
    """What rounding may do to the objective at u."""
    args = case.theta, u, case.batch, case.other.inputs
    return ROUNDING.allowed(size=1) * meta_value_error(case.objective(), *args)


def minimizer_error(case: MetaCase, u: Array, M: Array) -> float:
    """How far, in units of u, the gradient's rounding moves the minimizer of curvature M."""
    args = case.theta, u, case.batch, case.other.inputs
    return meta_gradient_error(case.objective(), *args) / float(np.linalg.eigvalsh(M)[0])


@small_steps
@given(case=meta_cases(smooth=True, pairs=pairs))
def test_step_is_certified(case: MetaCase) -> None:
    """Gradient zero to 1e-10, Hessian positive definite, objective not above its start."""
    point = step_of(case)
    assert point.certified, point
    assert point.gradient_norm <= point.gradient_tolerance
    assert point.min_eigenvalue > 0.0


@small_steps
@given(case=meta_cases(smooth=True, pairs=pairs))
def test_step_is_no_longer_than_the_loss_allows(case: MetaCase) -> None:
    """The objective does not rise, so lambda_WSD/2 ||u - theta||^2 <= J_B(theta), as losses >= 0.

    Thus u -> theta as lambda_WSD -> infinity, at least as lambda_WSD^(-1/2).
    """
    point = step_of(case)
    start = float(case.problem.value(case.theta, *case.batch))
    slack = value_slack(case, point.u)
    assert value_at(case, point.u) <= value_at(case, case.theta) + slack
    distance = float(np.sum((point.u - case.theta) ** 2))
    assert 0.5 * case.weights.wsd * distance <= start + slack, (distance, start)


@small_steps
@given(case=convex_cases, step=scaled_normals(max_scale=3.0))
def test_convex_objectives_grow_by_the_strong_convexity_around_the_step(
    case: MetaCase, step
) -> None:
    """Q(v) >= Q(u) + lambda_WSD/2 ||v - u||^2 for every v: u is the global minimizer."""
    u = step_of(case).u
    v = step.around(u)
    growth = 0.5 * case.weights.wsd * float(np.sum((v - u) ** 2))
    slack = value_slack(case, u) + value_slack(case, v)
    assert value_at(case, v) >= value_at(case, u) + growth - slack


@small_steps
@given(case=meta_cases(smooth=True, pairs=pairs))
def test_closed_form_minimizes_the_approximated_objective(case: MetaCase) -> None:
    """Eq. 4 is the arg min of eq. 17: the loss linear, the FSD quadratic, any network."""
    G, _ = curvature(case)
    M = proximity_matrix(G, *case.weights)
    point = step_of(case, case.objective().approximation())
    closed = closed_form_step(case.theta, case.gradient, G, *case.weights)
    assert_close(
        point.u,
        closed,
        SOLVE,
        condition=float(np.linalg.cond(M)),
        scale=float(np.linalg.norm(case.theta) + np.linalg.norm(closed)),
        what="u",
    )


@small_steps
@given(case=linear_cases())
def test_closed_form_is_exact_for_a_linear_loss_on_linear_networks(case: MetaCase) -> None:
    """There D_F is quadratic in u already, so that only the loss needs to be linearized."""
    G, _ = curvature(case)
    point = step_of(case, case.objective(loss="linear"))
    closed = closed_form_step(case.theta, case.gradient, G, *case.weights)
    assert_close(
        point.u,
        closed,
        SOLVE,
        condition=float(np.linalg.cond(proximity_matrix(G, *case.weights))),
        scale=float(np.linalg.norm(case.theta) + np.linalg.norm(closed)),
        what="u",
    )


@small_steps
@given(case=linear_cases())
def test_exact_step_on_linear_quadratic_problems(case: MetaCase) -> None:
    """With nothing approximated u = theta - (H + lambda_FSD G + lambda_WSD I)^{-1} g."""
    G, H = curvature(case)
    whole = H + case.weights.fsd * G
    closed = closed_form_step(case.theta, case.gradient, whole, 1.0, case.weights.wsd)
    M = proximity_matrix(whole, 1.0, case.weights.wsd)
    assert_close(
        step_of(case).u,
        closed,
        SOLVE,
        condition=float(np.linalg.cond(M)),
        scale=float(np.linalg.norm(closed - case.theta)) + minimizer_error(case, closed, M),
        what="u",
    )


@small_steps
@given(case=linear_cases(), decade=st.floats(2.0, 6.0))
def test_large_wsd_weight_gives_a_gradient_step(case: MetaCase, decade: float) -> None:
    """||u - (theta - g / lambda)|| <= ||H + lambda_FSD G|| ||g|| / lambda^2: eq. 25 in the limit.

    From (H' + lambda)^{-1} = 1/lambda - (H' + lambda)^{-1} H' / lambda.
    """
    G, H = curvature(case)
    wsd = 10.0**decade
    objective = MetaObjective(case.problem, case.discrepancy, case.weights.fsd, wsd)
    u, g = step_of(case, objective).u, case.gradient
    bound = np.linalg.norm(H + case.weights.fsd * G, 2) * np.linalg.norm(g) / wsd**2
    M = H + case.weights.fsd * G + wsd * np.eye(len(u))
    # Beside the gradient's error, u - theta is a difference of numbers of these sizes.
    ends = np.linalg.norm(u) + np.linalg.norm(case.theta)
    rounding = SOLVE.allowed(size=len(u)) * (ends + minimizer_error(case, u, M))
    assert np.linalg.norm(u - (case.theta - g / wsd)) <= bound + rounding
    assert np.linalg.norm(u - case.theta) <= np.linalg.norm(g) / wsd + rounding


@small_steps
@given(data=st.data(), decade=st.floats(-6.0, 0.0))
def test_small_weights_give_the_nearest_least_squares_solution(
    data: st.DataObject, decade: float
) -> None:
    """||u - w|| <= lambda / (sigma + lambda) ||w - theta|| for the nearest minimizer w of J_B.

    sigma is the smallest positive eigenvalue of the Hessian; w comes from `lstsq` alone.
    """
    inputs = data.draw(st.integers(1, 3), label="inputs")
    network = Linear(inputs, 1, bias=False)
    problem = Problem(network, SquaredError())
    theta = data.draw(parameters(network), label="theta")
    X, T = data.draw(batches(network, problem.loss, max_size=4), label="B")
    nearest = theta + np.linalg.lstsq(X, T[:, 0] - X @ theta, rcond=None)[0]
    spectrum = np.linalg.eigvalsh(X.T @ X / len(X))
    sigma = spectrum[len(theta) - min(X.shape)]
    wsd = 10.0**decade
    point = exact_step(MetaObjective(problem, SquaredEuclidean(), 0.0, wsd), theta, Batch(X, T), X)
    away = float(np.linalg.norm(nearest - theta))
    condition = float(spectrum[-1] + wsd) / float(min(sigma, spectrum[0] + wsd))
    size = 1.0 + float(np.linalg.norm(theta)) + away + float(np.linalg.norm(T))
    rounding = SOLVE.allowed(condition=abs(condition), size=len(theta)) * size
    assert np.linalg.norm(point.u - nearest) <= wsd / (sigma + wsd) * away + rounding
    # As u is optimal and w a competitor: the loss exceeds its minimum by lambda/2 ||w - theta||^2.
    least = problem.value(nearest, X, T)
    assert problem.value(point.u, X, T) <= least + 0.5 * wsd * away**2 + rounding * size


@small_steps
@given(case=meta_cases(smooth=True, pairs=pairs), decade=st.floats(-6.0, -2.0))
def test_certificate_sees_a_planted_displacement(case: MetaCase, decade: float) -> None:
    """A relative displacement of 1e-6 along the stiffest direction is not stationary any more."""
    point = step_of(case)
    args = case.batch, case.other.inputs
    step = 10.0**decade * (1.0 + float(np.linalg.norm(point.u)))
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(len(point.u))
    for _ in range(50):  # power iteration on the Hessian by differences of the certified gradient
        direction /= np.linalg.norm(direction)
        h = 1e-6
        up = case.objective().lookahead_gradient(case.theta, point.u + h * direction, *args)
        down = case.objective().lookahead_gradient(case.theta, point.u - h * direction, *args)
        direction = (up - down) / (2 * h)
    direction /= np.linalg.norm(direction)
    planted = certify(case.objective(), case.theta, point.u + step * direction, *args)
    assert planted.kind == "not stationary", planted
    assert not planted.certified


def test_certificate_sees_a_saddle() -> None:
    """At zero weights a network without biases is stationary, but the layers can grow together."""
    problem = Problem(MLP([1, 1, 1], bias=False), SquaredError())
    batch, zero = Batch(np.ones((1, 1)), np.ones((1, 1))), np.zeros(2)
    objective = MetaObjective(problem, SquaredEuclidean(), 0.0, 0.1)
    planted = certify(objective, zero, zero, batch, batch.inputs)
    # The Hessian is [[0.1, -1], [-1, 0.1]]: the derivative of w2 tanh(w1) - 1 in both is -1.
    assert planted.kind == "saddle"
    assert_close(np.float64(planted.min_eigenvalue), np.float64(-0.9), ROUNDING, what="eigenvalue")
    assert not planted.certified
    assert exact_step(objective, zero, batch, batch.inputs, start=np.array([0.1, 0.2])).certified


def test_certificate_tells_a_maximum_from_a_saddle() -> None:
    """KL(p || p0) <= log 2 for z0 = 0: with a linear loss Q falls without bound behind a maximum.

    z = theta' and t = 1, so that Q = -z/2 + 4 KL, stationary where p (1 - p) z = 1/8: at a minimum
    before the bend of p (1 - p) z, at 1.54, and at a maximum after it.
    """
    problem = Problem(Linear(1, 1, bias=False), BinaryCrossEntropy())
    batch, zero = Batch(np.ones((1, 1)), np.ones((1, 1))), np.zeros(1)
    objective = MetaObjective(problem, BernoulliKL(), 4.0, 0.0, loss="linear")

    def slope(z: float) -> float:
        return np.exp(z) / (1.0 + np.exp(z)) ** 2 * z - 0.125

    roots = [brentq(slope, *bracket, xtol=1e-15) for bracket in ((0.0, 1.54), (1.54, 9.0))]
    points = [certify(objective, zero, np.array([z]), batch, batch.inputs) for z in roots]
    assert [point.kind for point in points] == ["minimum", "maximum"]
    assert points[0].certified
    assert not points[1].certified
    far = objective.terms(zero, np.array([40.0]), batch, batch.inputs).total
    assert far < points[0].value - 10.0


def test_certificate_sees_a_flat_direction() -> None:
    """Softmax does not see a shift of all logits: without WSD the minimizer is not unique."""
    problem = Problem(Linear(1, 2, bias=False), CrossEntropy())
    X = np.array([[1.0], [1.0]])
    batch = Batch(X, np.array([0, 1]))
    objective = MetaObjective(problem, Bregman("cross_entropy"), 1.0, 0.0)
    planted = certify(objective, np.zeros(2), np.zeros(2), batch, X)
    assert planted.kind == "degenerate"
    assert not planted.certified


def test_certificate_sees_a_local_minimum_above_the_start() -> None:
    """Both signs of a hidden unit fit alike, but the mirrored one lies far from theta."""
    problem = Problem(MLP([1, 1, 1], bias=False), SquaredError())
    batch, theta = Batch(np.ones((1, 1)), np.ones((1, 1))), np.array([1.2, 1.2])
    objective = MetaObjective(problem, SquaredEuclidean(), 0.0, 1e-3)
    mirrored = exact_step(objective, theta, batch, batch.inputs, start=-theta)
    assert mirrored.kind == "minimum"
    assert mirrored.rise > 0.0
    assert not mirrored.certified
    assert exact_step(objective, theta, batch, batch.inputs).certified


def test_the_exact_proximal_point_is_not_unique() -> None:
    """f = w2 w1 x with x = t = 1 and theta = (a, -a): swapping and negating both weights keeps Q.

    Off the mirror the residual is -lambda, so w1 w2 = 1 - lambda and w1 - w2 = a (for a = 1), and
    Q = lambda^2/2 + lambda/2 (w1^2 + w2^2) = lambda^2/2 + lambda/2 (1 + 2 (1 - lambda)).
    """
    problem = Problem(MLP([1, 1, 1], "identity", bias=False), SquaredError())
    batch, theta, wsd = Batch(np.ones((1, 1)), np.ones((1, 1))), np.array([1.0, -1.0]), 0.1
    objective = MetaObjective(problem, SquaredEuclidean(), 0.0, wsd)
    starts = [np.array([1.0, 1.0]), np.array([-1.0, -1.0])]
    found = [p for p in search(objective, theta, batch, batch.inputs, starts).found if p.certified]
    assert len(found) == 2, found
    root = np.sqrt(0.25 + 1.0 - wsd)  # w2 (w2 + 1) = 1 - lambda
    expected = np.array([[root + 0.5, root - 0.5], [0.5 - root, -0.5 - root]])
    points = np.array(sorted((tuple(p.u) for p in found), reverse=True))
    # A gradient of 1e-10 leaves u open by that over the smallest eigenvalue of H, 0.16.
    assert np.abs(points - expected).max() <= max(p.gradient_tolerance / 0.16 for p in found)
    for point in found:
        lowest = wsd**2 / 2 + wsd / 2 * (1.0 + 2.0 * (1.0 - wsd))
        assert_close(np.float64(point.value), np.float64(lowest), ROUNDING, size=4, what="Q")


def test_the_global_proximal_point_can_differ_from_the_one_reached_from_theta() -> None:
    """A wrong sign: from theta the weights shrink to a local minimum; beyond 0 lies a lower one."""
    problem = Problem(MLP([1, 1, 1], bias=False), SquaredError())
    batch = Batch(np.array([[1.0], [2.0]]), np.array([[-1.9], [-3.0]]))
    theta = np.array([2.3, 3.1])
    objective = MetaObjective(problem, SquaredEuclidean(), 0.0, 0.1)
    reached = exact_step(objective, theta, batch, batch.inputs)
    best = search(objective, theta, batch, batch.inputs, [np.array([-1.5, 1.5])]).best
    assert best is not None
    assert reached.certified
    assert best.certified
    assert reached.value > 3.0 * best.value
    # No point of a fine grid around theta and both minima lies lower.
    w1, w2 = np.meshgrid(np.linspace(-6.0, 6.0, 241), np.linspace(-6.0, 6.0, 241))
    residuals = [w2 * np.tanh(w1 * x) - t for x, t in ((1.0, -1.9), (2.0, -3.0))]
    wsd = 0.05 * ((w1 - theta[0]) ** 2 + (w2 - theta[1]) ** 2)
    grid = 0.25 * (residuals[0] ** 2 + residuals[1] ** 2) + wsd
    assert grid.min() >= best.value
    assert grid.min() - best.value <= 0.025**2 * 2 * best.max_eigenvalue


@share(0.25)
@given(case=meta_cases(smooth=True, pairs=pairs), seed=st.integers(0, 2**16))
def test_a_search_is_no_worse_than_the_step_from_theta(case: MetaCase, seed: int) -> None:
    """Its best is certified, no certified point lies lower, and none is listed twice."""
    starts = list(case.theta + np.random.default_rng(seed).standard_normal((2, len(case.theta))))
    args = case.theta, case.batch, case.other.inputs
    best, found = search(case.objective(), *args, starts)
    assert best is not None
    assert best.certified
    slack = value_slack(case, best.u)
    assert best.value <= step_of(case).value + slack
    assert best.value == min(point.value for point in found if point.certified)
    values = [point.value for point in found]
    assert values == sorted(values)
    for k, point in enumerate(found):
        assert all(np.linalg.norm(point.u - other.u) > 1e-5 for other in found[:k])


def test_closed_form_refuses_what_has_no_minimizer() -> None:
    with pytest.raises(
        ValueError, match=r"must be positive definite, got smallest eigenvalue 0; raise"
    ):
        closed_form_step(np.zeros(2), np.ones(2), np.diag([1.0, 0.0]), 1.0, 0.0)
    with pytest.raises(ValueError, match=r"`g` must have shape \(2,\), got \(3,\)"):
        closed_form_step(np.zeros(2), np.ones(3), np.eye(2), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"`G` must have shape \(2, 2\), got \(3, 3\)"):
        closed_form_step(np.zeros(2), np.ones(2), np.eye(3), 1.0, 1.0)


@pytest.mark.parametrize(("rise", "certified"), [(1e-9, True), (1e-8, False)])
def test_a_rise_within_the_rounding_of_a_large_value_is_none(rise: float, certified: bool) -> None:
    """8 n eps |value| = 3.6e-9 for two parameters and a value of 1e6."""
    found = ProximalPoint(
        u=np.zeros(2),
        value=1e6,
        rise=rise,
        gradient_norm=0.0,
        gradient_tolerance=1.0,
        min_eigenvalue=1.0,
        max_eigenvalue=1.0,
        kind="minimum",
    )
    assert found.certified == certified


def test_closed_form_refuses_what_is_singular_to_rounding() -> None:
    """By the size of the smallest eigenvalue beside the largest, here 1e-16 beside 1."""
    with pytest.raises(ValueError, match="must be positive definite, got smallest eigenvalue"):
        closed_form_step(np.zeros(2), np.ones(2), np.diag([1.0, 1e-16]), 1.0, 0.0)
