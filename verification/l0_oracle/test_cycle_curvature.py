"""The Hessians of the cycles' losses are the derivatives of their gradients."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reference.cycles import helix_cycle
from reference.manifolds import Parametrized
from reference.problem import complex_step_jacobian
from verification.l0_oracle.test_cycles import CYCLES
from verification.tolerances import FUNCTION, ROUNDING, assert_close

# Two gradients this far apart: of a piecewise linear one, their quotient is exact up to rounding.
STEP = 2.0**-20


@pytest.mark.parametrize("name", CYCLES)
@given(seed=st.integers(0, 2**16), wide=st.booleans())
def test_the_hessian_is_the_difference_quotient_of_the_gradient(
    name: str, seed: int, wide: bool
) -> None:
    """On both sides of the kink, that is of a gradient that is linear piece by piece."""
    cycle = CYCLES[name]
    rng = np.random.default_rng(seed)
    d = len(cycle.start)
    Z, v = (10.0 if wide else 0.02) * rng.standard_normal(d), rng.standard_normal(d)
    sides = [cycle.loss.gradient(Z + sign * STEP * v) for sign in (1.0, -1.0)]
    here = cycle.loss.gradient(Z)
    # A kink between the two shows as a gradient that is not their mean.
    assume(np.allclose(sides[0] + sides[1], 2.0 * here, rtol=0.0, atol=1e-3 * STEP))
    quotient = (sides[0] - sides[1]) / (2.0 * STEP)
    scale = float(np.linalg.norm(Z) + 1.0) / STEP
    assert_close(cycle.loss.hessian(Z) @ v, quotient, ROUNDING, size=d, scale=scale)


@pytest.mark.parametrize("name", ["circle", "other circle", "helix"])
def test_no_loss_jumps_where_it_turns_straight(name: str) -> None:
    """Along its steep direction, through both kinks: it changes by at most G times the distance."""
    cycle = CYCLES[name]
    steep = np.linalg.eigh(cycle.loss.hessian(np.zeros(len(cycle.start))))[1][:, -1]
    t = np.linspace(-5.0, 5.0, 10_001)
    values = np.array([cycle.loss.value(u * steep) for u in t])
    room = ROUNDING.allowed(size=4) * np.abs(values).max()
    assert np.abs(np.diff(values)).max() <= cycle.G * (t[1] - t[0]) + room


@pytest.mark.parametrize("ratio", [0.17, 0.2, 0.3, 0.45])
def test_both_points_of_a_helix_cycle_lie_where_the_loss_is_quadratic(ratio: float) -> None:
    """On straight turns they are +-(y, 1): the loss there has its curvature L."""
    cycle = helix_cycle(ratio)
    other = np.array([1.0, -1.0, -1.0]) * cycle.start
    for Z in (cycle.start, other):
        assert_close(np.linalg.eigvalsh(cycle.loss.hessian(Z))[-1], cycle.L, ROUNDING, size=9)


@given(t=st.floats(-10.0, 10.0))
def test_the_tangent_of_a_helix_is_the_derivative_of_its_points(t: float) -> None:
    helix = helix_cycle(0.3).manifold
    assert isinstance(helix, Parametrized)
    w = np.array([t])
    expected = complex_step_jacobian(helix.point, w)
    assert_close(helix.jacobian(w), expected, FUNCTION, size=4, condition=1.0 + abs(t))
