"""P18 section 3.1: the proximal oracle is projected gradient descent (eq. 14), and Lemma 1."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

from reference.arrays import Array
from reference.manifolds import Parametrized, Sphere
from reference.networks import MLP
from reference.output_space import (
    effective_gradient,
    lemma_1_point,
    model_change,
    projected_gradient_step,
    proximal_newton_step,
)
from verification.profiles import share
from verification.strategies.manifolds import (
    COMPLETE,
    DIMENSIONS,
    Descent,
    descents,
    network_surface,
    torus,
)
from verification.tolerances import COMPLEX_STEP, ROUNDING, SOLVE, assert_close

seeds = st.integers(0, 2**16)
decades = st.integers(-2, 2)
CURVED = ("circle", "sphere", "sine curve", "torus")
# Where a point is known by its value alone, a search sees it to sqrt(eps) of the distance scale.
SEEN_BY_VALUE = 64.0 * np.sqrt(np.finfo(float).eps)


def slack(case: Descent, gamma: float) -> float:
    """Rounding of the model at a point, whose terms are of the size of gamma G^2, or of the chord.

    The points come from searches and paths that are exact to 1e-10 of their length.
    """
    norm = float(np.linalg.norm(case.loss.gradient(case.start)))
    return 1e-9 * gamma * norm**2


@pytest.mark.parametrize("name", ["line", "plane"])
@given(seed=seeds, decade=decades)
def test_eq_14_on_a_flat_manifold_is_a_step_along_it(name: str, seed: int, decade: int) -> None:
    """Projecting is linear there: Z - U U^T grad L / (2 lambda)."""
    rng = np.random.default_rng(seed)
    manifold, weight = COMPLETE[name], 10.0**decade
    gradient = rng.standard_normal(DIMENSIONS[name])
    Z = manifold.project(rng.standard_normal(DIMENSIONS[name]))
    U = manifold.tangent(Z)
    expected = Z - U @ (U.T @ gradient) / (2.0 * weight)
    scale = float(np.linalg.norm(Z) + np.linalg.norm(gradient) / weight)
    step = projected_gradient_step(manifold, Z, gradient, weight)
    assert_close(step, expected, SOLVE, size=3, scale=scale, what="Z'")


@pytest.mark.parametrize("name", ["circle", "sphere"])
@given(seed=seeds, decade=decades)
def test_eq_14_on_a_sphere_scales_the_target_to_its_radius(
    name: str, seed: int, decade: int
) -> None:
    rng = np.random.default_rng(seed)
    manifold, weight = COMPLETE[name], 10.0**decade
    assert isinstance(manifold, Sphere)
    gradient = rng.standard_normal(DIMENSIONS[name])
    Z = manifold.project(rng.standard_normal(DIMENSIONS[name]))
    outward = Z - gradient / (2.0 * weight) - manifold.center
    expected = manifold.center + manifold.radius * outward / np.linalg.norm(outward)
    terms = np.linalg.norm(Z) + np.linalg.norm(gradient) / weight + np.linalg.norm(manifold.center)
    assert_close(
        projected_gradient_step(manifold, Z, gradient, weight),
        expected,
        SOLVE,
        condition=float(1.0 + terms / np.linalg.norm(outward)),
        size=3,
        what="Z'",
    )


@given(case=descents(("sine curve",)), decade=decades)
def test_eq_13_minimized_along_a_curve_is_eq_14(case: Descent, decade: int) -> None:
    """The objective itself, on a fine grid of the curve and by Brent's method around its best."""
    weight = 10.0**decade
    gradient = case.loss.gradient(case.start)

    def objective(t: float) -> float:
        d = np.array([t, 0.5 * np.sin(t)]) - case.start
        return float(gradient @ d + weight * d @ d)

    target = case.start - gradient / (2.0 * weight)
    if abs(target[0]) > 25.0:
        reject()  # beyond the grid on which the curve is searched
    grid = np.linspace(-30.0, 30.0, 6001)
    best = grid[np.argmin([objective(t) for t in grid])]
    found: Any = minimize_scalar(objective, bracket=(best - 0.01, best, best + 0.01), tol=1e-12)
    step = projected_gradient_step(case.manifold, case.start, gradient, weight)
    scale = float(np.linalg.norm(target) + np.linalg.norm(case.start))
    # Two basins may tie; then the values agree and the points do not.
    value = model_change(case.start, step, gradient, 0.5 / weight)
    assert value <= found.fun + ROUNDING.allowed(size=8) * weight * scale**2
    if np.linalg.norm(step - [found.x, 0.5 * np.sin(found.x)]) > SEEN_BY_VALUE * scale:
        assert abs(value - found.fun) <= ROUNDING.allowed(size=8) * weight * scale**2


@pytest.mark.parametrize("weight", [0.3, 1.0, 10.0])
@pytest.mark.parametrize("surface", [torus(), network_surface()], ids=["torus", "network"])
def test_eq_13_minimized_over_the_parameters_is_eq_14(surface: Parametrized, weight: float) -> None:
    """SciPy's BFGS over the surface's parameters, from many starts, on the objective as printed."""
    w0 = np.array([0.9, 1.1])
    Z, gradient = surface.point(w0), np.array([0.5, -0.4, 0.3])

    def objective(w: Array) -> float:
        d = surface.point(w) - Z
        return float(gradient @ d + weight * d @ d)

    rng = np.random.default_rng(0)
    ends = [minimize(objective, w0 + 0.5 * rng.standard_normal(2)) for _ in range(20)]
    best = min(ends, key=lambda end: end.fun)
    step = projected_gradient_step(surface, Z, gradient, weight)
    assert np.linalg.norm(step - surface.point(best.x)) <= 1e-5  # BFGS's gradient tolerance
    assert model_change(Z, step, gradient, 0.5 / weight) <= best.fun + 1e-12


def test_a_network_that_is_linear_in_its_parameters_takes_gauss_newton_steps() -> None:
    """M = {X w}: eq. 14 is Z - X (X^T X)^-1 X^T grad L / (2 lambda), the step of P18 eq. 6-7."""
    rng = np.random.default_rng(1)
    X = rng.standard_normal((4, 2))
    network = MLP([2, 1], bias=False)
    linear = Parametrized(
        lambda w: network.outputs(w, X)[:, 0],
        lambda w: network.jacobian(w, X)[:, 0],
        rng.standard_normal((20, 2)),
    )
    w, gradient = rng.standard_normal(2), rng.standard_normal(4)
    step = np.linalg.lstsq(X, gradient / (2.0 * 0.7), rcond=None)[0]
    condition = float(np.linalg.cond(X) ** 2)
    new = projected_gradient_step(linear, X @ w, gradient, 0.7)
    assert_close(new, X @ (w - step), SOLVE, condition=condition, what="Z'")


@pytest.mark.parametrize("name", ["sine curve", "torus"])
@given(seed=seeds)
def test_the_effective_gradient_is_the_slope_along_the_manifold(name: str, seed: int) -> None:
    """Against complex steps of the loss along the parameters: J^T g = d L(f(w)) / dw."""
    rng = np.random.default_rng(seed)
    manifold = COMPLETE[name]
    assert isinstance(manifold, Parametrized)
    w = rng.uniform(-1.0, 1.0, manifold.grid.shape[1])
    c = rng.standard_normal(DIMENSIONS[name])
    g = effective_gradient(manifold, manifold.point(w), c)
    slope = [np.imag(c @ manifold.point(w + 1e-30j * e)) / 1e-30 for e in np.eye(len(w))]
    J = manifold.jacobian(w)
    # `locate` finds w again to SOLVE's accuracy, which C turns into an angle of the tangent space.
    condition = float(np.linalg.cond(J)) * (1.0 + manifold.curvature) * 10.0
    scale = float(np.linalg.norm(J) * np.linalg.norm(c))
    assert_close(
        J.T @ g, np.array(slope), COMPLEX_STEP, condition=condition, scale=scale, what="J^T g"
    )


@pytest.mark.parametrize("fraction_of_range", [0.01, 0.5, 1.0])
@share(0.5)
@given(case=descents(CURVED))
def test_lemma_1_holds_as_printed(fraction_of_range: float, case: Descent) -> None:
    """gamma <= 1 / (4 C G), its boundary included, with the point of the proof."""
    gamma = fraction_of_range / (4.0 * case.bend)
    gradient = case.loss.gradient(case.start)
    g = effective_gradient(case.manifold, case.start, gradient)
    Z = lemma_1_point(case.manifold, case.start, gradient, gamma)
    change = model_change(case.start, Z, gradient, gamma)
    assert change <= -gamma / 4.0 * (g @ g) + slack(case, gamma)


@pytest.mark.parametrize("fraction_of_range", [0.25, 0.5, 1.0])
@share(0.5)
@given(case=descents(CURVED))
def test_lemma_1_holds_in_four_times_the_printed_range(
    fraction_of_range: float, case: Descent
) -> None:
    """gamma <= 1 / (C G), with half the way of the printed proof: see `sufficient_weight`."""
    gamma = fraction_of_range / case.bend
    gradient = case.loss.gradient(case.start)
    g = effective_gradient(case.manifold, case.start, gradient)
    Z = lemma_1_point(case.manifold, case.start, gradient, gamma, fraction=0.5)
    change = model_change(case.start, Z, gradient, gamma)
    assert change <= -gamma / 4.0 * (g @ g) + slack(case, gamma)


@given(case=descents(("line", "plane")), decade=decades)
def test_lemma_1_holds_for_every_gamma_where_the_manifold_is_flat(
    case: Descent, decade: int
) -> None:
    gamma = 10.0**decade
    gradient = case.loss.gradient(case.start)
    g = effective_gradient(case.manifold, case.start, gradient)
    Z = lemma_1_point(case.manifold, case.start, gradient, gamma)
    # On a flat manifold the model is -gamma/2 ||g||^2 there, twice what the lemma asks for.
    expected = -0.5 * gamma * float(g @ g)
    # Z is rounded to eps ||Z_k||, which the model's slope, at most 2 ||grad L||, carries on.
    moved = 2.0 * float(np.linalg.norm(gradient) * np.linalg.norm(case.start))
    scale = gamma * float(gradient @ gradient) + abs(expected) + moved
    change = model_change(case.start, Z, gradient, gamma)
    assert_close(np.array(change), np.array(expected), ROUNDING, size=2, scale=scale, what="model")


@given(case=descents(CURVED))
def test_the_oracles_step_is_at_least_as_low_as_lemma_1s_point(case: Descent) -> None:
    """So the lemma bounds what eq. 14 reaches, with gamma = 1 / (2 lambda)."""
    gamma = 0.25 / case.bend
    gradient = case.loss.gradient(case.start)
    step = projected_gradient_step(case.manifold, case.start, gradient, 0.5 / gamma)
    point = lemma_1_point(case.manifold, case.start, gradient, gamma)
    least = model_change(case.start, step, gradient, gamma)
    assert least <= model_change(case.start, point, gradient, gamma) + slack(case, gamma)


@given(case=descents(("circle", "sphere")), sign=st.sampled_from([1.0, -1.0]))
def test_lemma_1s_proof_needs_the_geodesic_along_minus_g(case: Descent, sign: float) -> None:
    """With v'(0) = +g / ||g|| as printed, the point lies uphill: the model rises."""
    gamma = 1.0 / (4.0 * case.bend)
    gradient = case.loss.gradient(case.start)
    g = effective_gradient(case.manifold, case.start, gradient)
    norm = float(np.linalg.norm(g))
    if norm <= 1e-3 * np.linalg.norm(gradient):
        reject()  # at a stationary point there is no direction
    Z = case.manifold.geodesic(case.start, sign * g / norm, gamma * norm)
    assert (model_change(case.start, Z, gradient, gamma) > 0.0) == (sign > 0.0)


@share(0.5)
@given(case=descents(CURVED))
def test_lemma_1s_proof_may_drop_the_cross_term_of_its_square(case: Descent) -> None:
    """||a + b||^2 <= ||a||^2 + ||b||^2 with a = Z - Y, b = Y - Z_k = -gamma g.

    The proof calls this the triangle inequality, which has no squares. It holds because a geodesic
    advances by at most its length: <Z - Y, g> >= 0, so the cross term is not positive.
    """
    gamma = 1.0 / (4.0 * case.bend)
    gradient = case.loss.gradient(case.start)
    g = effective_gradient(case.manifold, case.start, gradient)
    a = lemma_1_point(case.manifold, case.start, gradient, gamma) - (case.start - gamma * g)
    b = -gamma * g
    assert a @ b <= slack(case, gamma) * gamma
    assert np.sum((a + b) ** 2) <= np.sum(a**2) + np.sum(b**2) + 2.0 * slack(case, gamma) * gamma
    identity = -0.5 * gamma * g @ g + (gradient - g) @ a + a @ a / (2.0 * gamma)
    change = model_change(case.start, case.start + a + b, gradient, gamma)
    scale = gamma * float(gradient @ gradient)
    assert_close(np.array(change), np.array(identity), ROUNDING, size=32, scale=scale)


def test_a_step_needs_a_positive_weight() -> None:
    with pytest.raises(ValueError, match="`weight` must be positive, got 0"):
        projected_gradient_step(COMPLETE["line"], np.zeros(2), np.ones(2), 0.0)


@pytest.mark.loose("H = I multiplies by 1: both steps do the same operations, to the bit.")
@given(case=descents(("circle", "sphere", "plane")))
def test_eq_17_with_the_identity_for_hessian_is_eq_14_with_half(case: Descent) -> None:
    """lambda = 1/2 turns lambda ||d||^2 into the 1/2 ||d||_H^2 of eq. 17 with H = I."""
    gradient = case.loss.gradient(case.start)
    eye = np.eye(len(gradient))
    newton = proximal_newton_step(case.manifold, case.start, gradient, eye)
    step = projected_gradient_step(case.manifold, case.start, gradient, 0.5)
    assert_close(newton, step, SOLVE, condition=10.0, size=3, what="Z'")
