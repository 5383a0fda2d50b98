"""The manifolds of P18 section 3: their geometry, and the global minimum over them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.arrays import Array
from reference.manifolds import Affine, Manifold, Parametrized, Sphere
from verification.profiles import share
from verification.strategies.manifolds import (
    COMPLETE,
    DIMENSIONS,
    Descent,
    descents,
    network_surface,
    sine_curve,
    torus,
)
from verification.tolerances import CENTRAL_DIFFERENCE, ROUNDING, SOLVE, assert_close

# The geodesic equation is solved with relative errors of 1e-12 a step; a path takes tens of steps.
GEODESIC = 1e-10
CURVED = ("circle", "sphere", "sine curve", "torus")
seeds = st.integers(0, 2**16)


def parametrized_circle(radius: float) -> Parametrized:
    """A circle around the origin, of which the general code knows nothing."""
    return Parametrized(
        lambda w: radius * np.array([np.cos(w[0]), np.sin(w[0])]),
        lambda w: radius * np.array([[-np.sin(w[0])], [np.cos(w[0])]]),
        np.linspace(-np.pi, np.pi, 60, endpoint=False)[:, None],
    )


def samples(case: Descent) -> Array:
    """Many points of the manifold, none of them found by a search."""
    rng = np.random.default_rng(0)
    manifold = case.manifold
    if isinstance(manifold, Affine):
        w = 5.0 * rng.standard_normal((2000, manifold.basis.shape[1]))
        return manifold.offset + w @ manifold.basis.T
    if isinstance(manifold, Sphere):
        y = rng.standard_normal((2000, len(manifold.center)))
        return manifold.center + manifold.radius * y / np.linalg.norm(y, axis=1, keepdims=True)
    assert isinstance(manifold, Parametrized)
    w = manifold.grid[rng.integers(len(manifold.grid), size=2000)]
    return np.array([manifold.point(row + 0.05 * rng.standard_normal(len(row))) for row in w])


@given(case=descents(("line", "plane", "circle", "sphere", "torus")))
def test_no_other_point_of_the_manifold_is_lower_than_the_minimum(case: Descent) -> None:
    Z = case.manifold.minimize(case.H, case.b)
    others = samples(case)
    values = 0.5 * np.sum(others @ case.H * others, axis=1) + others @ case.b
    slack = ROUNDING.allowed(size=len(Z)) * (abs(case.loss.value(Z)) + np.abs(values).min())
    assert case.loss.value(Z) <= values.min() + slack


@given(case=descents(("sine curve",)), seed=seeds)
def test_the_nearest_point_of_a_curve_is_the_nearest_of_a_fine_grid(
    case: Descent, seed: int
) -> None:
    Y = np.random.default_rng(seed).uniform([-20.0, -2.0], [20.0, 2.0])
    t = np.linspace(-25.0, 25.0, 20001)
    squares = (t - Y[0]) ** 2 + (0.5 * np.sin(t) - Y[1]) ** 2
    found = np.sum((case.manifold.project(Y) - Y) ** 2)
    assert found <= squares.min()
    # Between two grid points the squared distance is higher by at most 1/2 curvature (dt/2)^2.
    assert squares.min() - found <= 0.5 * (2.0 + 2.0 * np.abs(Y[1])) * (t[1] - t[0]) ** 2


@given(case=descents(("circle", "sphere")))
def test_the_minimum_over_a_sphere_has_the_multiplier_of_a_global_one(case: Descent) -> None:
    """(Q + mu I) y + beta = 0 with Q + mu I >= 0 is sufficient, also for an indefinite Q."""
    manifold = case.manifold
    assert isinstance(manifold, Sphere)
    Z = manifold.minimize(case.H, case.b)
    y = (Z - manifold.center) / manifold.radius
    slope = case.H @ Z + case.b
    mu = -float(slope @ y) / manifold.radius
    scale = float(np.linalg.norm(case.H) * np.linalg.norm(Z) + np.linalg.norm(case.b))
    assert_close(np.linalg.norm(y), 1.0, ROUNDING, size=len(y), what="||y||")
    # The root mu is found to 1e-15 of itself; the slope repeats it, through the eigenvectors.
    assert_close(
        slope + mu * manifold.radius * y, np.zeros_like(y), SOLVE, scale=scale, what="stationarity"
    )
    lowest = np.linalg.eigvalsh(case.H)[0] + mu
    assert lowest >= -SOLVE.allowed(size=len(y)) * scale / manifold.radius


@pytest.mark.parametrize("name", sorted(COMPLETE))
@share(0.25)
@given(seed=seeds)
def test_what_is_left_after_a_projection_is_normal(name: str, seed: int) -> None:
    manifold = COMPLETE[name]
    Y = 2.0 * np.random.default_rng(seed).standard_normal(DIMENSIONS[name])
    Z = manifold.project(Y)
    left = manifold.tangent(Z).T @ (Y - Z)
    # Newton's method ends where rounding of J^T (Z - Y) hides the slope; w is found again likewise.
    scale = float(np.linalg.norm(Y) + np.linalg.norm(Z))
    assert_close(left, np.zeros_like(left), SOLVE, size=len(Y), scale=scale, what="tangential part")


@given(seed=seeds)
def test_a_point_is_found_where_the_grid_is(seed: int) -> None:
    """Angles have other turns, in whose thousands they are rounded: Newton's steps are bounded."""
    manifold = torus()
    Y = 2.0 * np.random.default_rng(seed).standard_normal(3)
    w = manifold.locate(manifold.project(Y))
    assert np.abs(w).max() <= 2.0 * np.pi


@given(seed=seeds)
def test_a_parametrized_circle_is_a_circle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    general, special = parametrized_circle(1.7), Sphere(np.zeros(2), 1.7)
    Y = rng.standard_normal(2) * 3.0
    Z = special.project(Y)
    U = special.tangent(Z)
    assert_close(
        general.project(Y), Z, SOLVE, condition=float(1.7 / np.linalg.norm(Y) + 1.0), what="Z"
    )
    assert_close(np.abs(general.tangent(Z).T @ U), np.ones((1, 1)), SOLVE, what="tangent")
    assert_close(np.array(general.curvature), np.array(1 / 1.7), ROUNDING, size=8, what="C")
    path = general.geodesic(Z, U[:, 0], 2.5) - special.geodesic(Z, U[:, 0], 2.5)
    assert np.linalg.norm(path) <= GEODESIC * 2.5


@pytest.mark.parametrize("name", CURVED)
@share(0.25)
@given(seed=seeds)
def test_geodesics_stay_on_the_manifold_at_unit_speed_and_bend_no_more_than_c(
    name: str, seed: int
) -> None:
    manifold = COMPLETE[name]
    rng = np.random.default_rng(seed)
    Z = manifold.project(2.0 * rng.standard_normal(DIMENSIONS[name]))
    U = manifold.tangent(Z)
    v = U @ rng.standard_normal(U.shape[1])
    v /= np.linalg.norm(v)
    length = rng.uniform(0.2, 2.0)
    h = (
        np.finfo(float).eps ** 0.25
    )  # of a second difference: its two errors are both near sqrt(eps)
    back, here, on = (manifold.geodesic(Z, v, length + k * h) for k in (-1.0, 0.0, 1.0))
    assert np.linalg.norm(manifold.project(here) - here) <= GEODESIC * length
    assert abs(np.linalg.norm(on - back) / (2.0 * h) - 1.0) <= manifold.curvature**2 * h**2 + (
        GEODESIC / h
    )
    bend = np.linalg.norm(on - 2.0 * here + back) / h**2
    assert bend <= manifold.curvature + 4.0 * GEODESIC / h**2 + 10.0 * h


@pytest.mark.parametrize("speed", [0.3, 0.7, 1.0])
def test_geodesics_of_a_torus_keep_clairauts_constant(speed: float) -> None:
    """On a surface of revolution (distance from the axis) x (speed around it) never changes."""
    surface = torus()
    Z = surface.point(np.array([0.4, 0.9]))
    around = np.array([-Z[1], Z[0], 0.0]) / np.hypot(Z[0], Z[1])
    across = np.cross(
        np.linalg.qr(surface.jacobian(np.array([0.4, 0.9])), "complete")[0][:, 2], around
    )
    v = speed * around + np.sqrt(1.0 - speed**2) * across
    h = np.finfo(float).eps ** (1 / 3)
    constants = []
    for length in (0.0, 1.0, 3.0):
        ahead, behind = (surface.geodesic(Z, v, length + k * h) for k in (1.0, -1.0))
        here, slope = surface.geodesic(Z, v, length), (ahead - behind) / (2.0 * h)
        constants.append(here[0] * slope[1] - here[1] * slope[0])
    assert_close(
        np.array(constants),
        np.full(3, speed * np.hypot(Z[0], Z[1])),
        CENTRAL_DIFFERENCE,
        condition=27.0,  # R^3 bounds position times third derivative on a torus of radii 2 and 1
        what="Clairaut's constant",
    )


@pytest.mark.parametrize(
    ("manifold", "largest"),
    [(sine_curve(0.5), 0.5), (torus(2.0, 1.0), 1.0), (torus(1.5, 1.0), 2.0)],
    ids=["sine curve", "tube", "hole"],
)
def test_the_stated_curvature_is_the_largest_measured(
    manifold: Parametrized, largest: float
) -> None:
    measured = [manifold.normal_curvature(w) for w in manifold.grid[::3]]
    assert manifold.curvature == pytest.approx(largest, rel=1e-15)
    assert max(measured) <= largest * (1.0 + ROUNDING.allowed(size=16))
    assert max(measured) >= 0.99 * largest  # the grid passes within 0.05 of the extremum


def test_the_curvature_of_a_network_surface_bends_its_paths() -> None:
    """No chord leaves its tangent faster than the measured C allows: ||P_N d|| <= C/2 ||d||^2."""
    surface = network_surface()
    w = np.array([1.0, 1.0])
    U = np.linalg.qr(surface.jacobian(w))[0]
    bends = []
    for angle in np.linspace(0.0, 2.0 * np.pi, 720):
        d = surface.point(w + 1e-3 * np.array([np.cos(angle), np.sin(angle)])) - surface.point(w)
        bends.append(2.0 * np.linalg.norm(d - U @ (U.T @ d)) / np.sum(d**2))
    # First-order terms of the chord change the ratio by about its length.
    assert max(bends) <= surface.normal_curvature(w) * 1.01
    assert max(bends) >= surface.normal_curvature(w) * 0.99
    assert surface.normal_curvature(w) <= surface.curvature


def test_a_basis_must_be_independent() -> None:
    with pytest.raises(ValueError, match="`basis` must have linearly independent columns"):
        Affine(np.zeros(3), np.ones((3, 2)))


@pytest.mark.parametrize("radius", [0.0, -1.0])
def test_a_radius_must_be_positive(radius: float) -> None:
    with pytest.raises(ValueError, match="`radius` must be"):
        Sphere(np.zeros(2), radius)


def test_a_minimum_over_a_sphere_must_be_unique() -> None:
    with pytest.raises(ValueError, match="minimum that is not unique"):
        Sphere(np.zeros(2), 1.0).project(np.zeros(2))


def test_curvature_is_measured_for_curves_and_surfaces_only() -> None:
    with pytest.raises(ValueError, match="`jacobian` must have one or two columns"):
        Parametrized(lambda w: w, lambda w: np.eye(3), np.zeros((1, 3)))


def test_every_manifold_is_a_manifold() -> None:
    for name, manifold in COMPLETE.items():
        assert isinstance(manifold, Manifold)
        Z = manifold.project(np.ones(DIMENSIONS[name]))
        U = manifold.tangent(Z)
        assert_close(U.T @ U, np.eye(U.shape[1]), ROUNDING, size=len(Z) + 8, what=f"{name}: U^T U")
