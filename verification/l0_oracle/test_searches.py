"""The global minimum over what is not convex: polylines, and grids whose lowest point misleads."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.arrays import Array
from reference.manifolds import Parametrized, Polyline
from verification.profiles import share
from verification.strategies.manifolds import sine_curve
from verification.tolerances import ROUNDING, SOLVE

seeds = st.integers(0, 2**16)


@given(seed=seeds, decade=st.integers(-2, 2), corners=st.integers(2, 5))
def test_no_point_of_a_polyline_is_lower_than_the_minimum(
    seed: int, decade: int, corners: int
) -> None:
    """Also where a segment bends the quadratic by little, by nothing, or downwards."""
    rng = np.random.default_rng(seed)
    vertices = 10.0**decade * rng.standard_normal((corners, 3))
    V = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    Q = V @ np.diag(rng.uniform(-1.0, 1.0, 3)) @ V.T
    inside = rng.dirichlet(np.ones(corners)) @ vertices
    b = -Q @ inside + 0.1 * 10.0**decade * rng.standard_normal(3)
    Z = Polyline(vertices).minimize(Q, b)

    along = np.linspace(0.0, 1.0, 401)[:, None, None]
    points = (vertices[:-1] + along * np.diff(vertices, axis=0)).reshape(-1, 3)
    values = 0.5 * np.sum(points @ Q * points, axis=1) + points @ b
    found = float(0.5 * Z @ Q @ Z + b @ Z)
    longest = np.linalg.norm(np.diff(vertices, axis=0), axis=1).max()
    size = np.linalg.norm(vertices, axis=1).max()
    rounding = ROUNDING.allowed(size=9) * (size**2 + np.linalg.norm(b) * size)
    assert found <= values.min() + rounding
    # Of the parabola along a segment, bent by at most side^2, the sample next to Z is 1/800 away.
    assert values.min() <= found + 0.5 * (longest / 800.0) ** 2 + rounding
    # And Z itself is a point of the polyline: some sample is as near as samples are.
    assert np.linalg.norm(points - Z, axis=1).min() <= longest / 800.0 * (1.0 + 1e-9)


def test_a_segment_along_which_nothing_changes_gives_one_of_its_points() -> None:
    """Neither slope nor bend: 0/0 says nothing, and every point is as good."""
    Z = Polyline([[0.0, 0.0], [1.0, 0.0]]).minimize(np.zeros((2, 2)), np.array([0.0, 1.0]))
    assert Z[1] == 0.0
    assert 0.0 <= Z[0] <= 1.0


def wells(m: int) -> Parametrized:
    """{(w, -85 exp(-|w - c|^2 / 0.6^2))}, c = 7.5 e_1: no grid point comes near its deepest."""

    def well(w: Array) -> Array:
        u = w - 7.5 * np.eye(m)[0]
        return -85.0 * np.exp(-np.sum(u * u) / 0.36)

    def jacobian(w: Array) -> Array:
        u = w - 7.5 * np.eye(m)[0]
        return np.concatenate([np.eye(m), [-2.0 / 0.36 * well(w) * u]])

    axes = np.meshgrid(*[np.arange(-12.0, 13.0)] * m)
    grid = np.stack(axes, axis=-1).reshape(-1, m)
    return Parametrized(lambda w: np.append(w, well(w)), jacobian, grid, 0.0)


@pytest.mark.parametrize("m", [1, 2])
def test_a_search_leaves_the_basin_of_the_lowest_grid_points(m: int) -> None:
    """1/2 |w + 3 e_1|^2 is at most 2 at its best grid points, 7.5 by the well, and -29.9 in it."""
    Q, b = np.diag([1.0] * m + [0.0]), np.eye(m + 1)[m] + 3.0 * np.eye(m + 1)[0]
    Z = wells(m).minimize(Q, b)
    t = np.linspace(7.0, 8.0, 100_001)
    lowest = (0.5 * t**2 + 3.0 * t - 85.0 * np.exp(-((t - 7.5) ** 2) / 0.36)).min()
    found = 0.5 * Z @ Q @ Z + b @ Z
    # Between samples 1e-5 apart the value is lower by at most 1/2 curvature (1e-5 / 2)^2.
    assert lowest - 0.5 * (1.0 + 170.0 / 0.36) * 0.25e-10 <= found <= lowest


@share(0.5)
@given(center=st.floats(-20.0, 20.0))
def test_a_search_begins_where_the_grid_is_lowest(center: float) -> None:
    """Of ten minima of 0.01 (t - c)^2 + sin(t) / 2 the lowest is next to c."""
    Q, b = np.diag([0.02, 0.0]), np.array([-0.02 * center, 1.0])
    Z = sine_curve(0.5).minimize(Q, b)
    t = np.linspace(-30.0, 30.0, 60_001)
    values = 0.01 * t**2 - 0.02 * center * t + 0.5 * np.sin(t)
    found = float(0.5 * Z @ Q @ Z + b @ Z)
    # Between samples 1e-3 apart the value is lower by at most 1/2 curvature (1e-3 / 2)^2.
    room = 0.5 * 0.52 * 0.25e-6
    assert values.min() - room <= found <= values.min() + 20.0 * ROUNDING.allowed(size=4)


@given(seed=seeds)
def test_newtons_method_needs_one_step_for_a_quadratic(seed: int) -> None:
    """From one start, nothing but it and the minimum is looked at (and complex steps beside)."""
    rng = np.random.default_rng(seed)
    J = rng.standard_normal((4, 3))
    seen: list[Array] = []

    def jacobian(w: Array) -> Array:
        seen.append(np.real(w))
        return J + 0.0 * np.sum(w)

    plane = Parametrized(lambda w: J @ w, jacobian, np.zeros((1, 3)), 0.0)
    Q, b = np.diag(rng.uniform(0.5, 2.0, 4)), rng.standard_normal(4)
    plane.minimize(Q, b)
    bend = J.T @ Q @ J
    lowest = -np.linalg.solve(bend, J.T @ b)
    error = SOLVE.allowed(size=3, condition=float(np.linalg.cond(bend))) * np.linalg.norm(lowest)
    assert all(np.linalg.norm(w) == 0.0 or np.linalg.norm(w - lowest) <= error for w in seen)
