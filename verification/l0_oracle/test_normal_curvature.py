"""The normal curvature of a surface belongs to the surface, and not to its parameters."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reference.manifolds import Parametrized, Sphere
from verification.profiles import share
from verification.strategies.manifolds import torus
from verification.tolerances import ROUNDING

MAJOR, MINOR = 2.0, 1.0
angles = st.floats(-np.pi, np.pi)


@share(0.5)
@given(around=angles, across=angles, turn=angles)
def test_a_torus_has_its_principal_curvature_in_any_parameters(
    around: float, across: float, turn: float
) -> None:
    """1/r around the tube, |cos| / (R + r cos) around the ring, also where v is neither."""
    surface, w = torus(MAJOR, MINOR), np.array([around, across])
    c, s = np.cos(turn), np.sin(turn)
    A = np.array([[c, -s], [s, c]])
    turned = Parametrized(
        lambda u: surface.point(A @ u), lambda u: surface.jacobian(A @ u) @ A, [A.T @ w], 0.0
    )
    ring = np.cos(across) / (MAJOR + MINOR * np.cos(across))
    largest = max(1.0 / MINOR, abs(ring))
    # Of 720 angles of v one is within pi/1440 of the principal direction; J, of condition at most
    # 3, makes three times that of it on the surface, and Euler's formula a square.
    missed = (1.0 / MINOR - ring) * (3.0 * np.pi / 1440.0) ** 2
    measured = turned.normal_curvature(A.T @ w)
    # Complex steps are exact up to the rounding of some twenty products of numbers of size 3.
    rounding = ROUNDING.allowed(size=20, condition=9.0)
    assert largest - missed - rounding <= measured <= largest + rounding


@given(radius=st.floats(0.1, 10.0), angle=angles)
def test_a_sphere_has_the_curvature_by_which_its_geodesics_leave_their_tangent(
    radius: float, angle: float
) -> None:
    """A chord of length d leaves the tangent by d^2 C / 2, exactly, on a circle of curvature C."""
    sphere = Sphere(np.zeros(2), radius)
    start = radius * np.array([1.0, 0.0])
    chord = radius * np.array([np.cos(angle), np.sin(angle)]) - start
    # Both addends are at most 2 radius, of coordinates of size radius: twice two of them err.
    rounding = ROUNDING.allowed(size=4) * radius
    assert abs(0.5 * sphere.curvature * (chord @ chord) + chord[0]) <= 4.0 * rounding
