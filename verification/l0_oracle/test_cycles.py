"""The losses of the cycles have the constants that they state for Theorem 1 of P18."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.cycles import Cycle, circle_cycle, failing_horizon, helix_cycle, line_cycle
from reference.output_space import rate_bound
from verification.tolerances import CENTRAL_DIFFERENCE, ROUNDING, assert_close

CYCLES = {
    "line": line_cycle(),
    "circle": circle_cycle(0.3, 0.25),
    "other circle": circle_cycle(0.26, 0.1),
    "helix": helix_cycle(0.3),
}
EVERY = pytest.mark.parametrize("cycle", CYCLES.values(), ids=CYCLES)
SEEDS = st.integers(0, 2**16)


@pytest.mark.parametrize("name", ["circle", "other circle"])
def test_the_gradient_of_a_circles_loss_has_the_norm_g_at_most_and_reaches_it(name: str) -> None:
    """Over the plane; it is largest where the pull and the straight part of the Huber loss meet."""
    cycle = CYCLES[name]
    grid = [np.array([u, v]) for u in (-2.0, 2.0) for v in np.linspace(-1.0, 1.0, 41)]
    largest = max(float(np.linalg.norm(cycle.loss.gradient(Z))) for Z in grid)
    assert_close(largest, cycle.G, ROUNDING, size=2, what="G")


@pytest.mark.parametrize("name", ["circle", "other circle"])
def test_the_loss_on_a_circle_is_nowhere_below_its_stated_bound_and_reaches_it(name: str) -> None:
    cycle = CYCLES[name]
    radius = 1.0 / cycle.C
    angles = np.linspace(0.0, 2.0 * np.pi, 721)  # pi, where it is lowest, is among them
    values = [cycle.loss.value(radius * np.array([np.cos(t), np.sin(t)])) for t in angles]
    assert_close(min(values), cycle.lowest, ROUNDING, size=4, what="the lowest loss")


@EVERY
@given(seed=SEEDS)
def test_no_gradient_changes_faster_than_l(cycle: Cycle, seed: int) -> None:
    """‖∇(Z) − ∇(Z')‖ <= L ‖Z − Z'‖, in the ambient space."""
    rng = np.random.default_rng(seed)
    Z, other = 0.1 * rng.standard_normal((2, len(cycle.start)))
    change = np.linalg.norm(cycle.loss.gradient(Z) - cycle.loss.gradient(other))
    # The rounding of the two gradients, of norm about 1, beside a difference that may be small.
    room = ROUNDING.allowed(size=len(Z)) * (1.0 + np.linalg.norm(Z) + np.linalg.norm(other))
    assert change <= cycle.L * np.linalg.norm(Z - other) + room


@EVERY
@given(seed=SEEDS)
def test_the_gradient_is_that_of_the_value(cycle: Cycle, seed: int) -> None:
    """Along a random direction; a kink of slope L within h changes the quotient by L h / 2."""
    rng = np.random.default_rng(seed)
    Z, v = (
        cycle.start + 0.1 * rng.standard_normal(len(cycle.start)),
        rng.standard_normal(len(cycle.start)),
    )
    h = np.finfo(float).eps ** (1 / 3)
    slope = (cycle.loss.value(Z + h * v) - cycle.loss.value(Z - h * v)) / (2.0 * h)
    scale = max(1.0, abs(cycle.loss.value(Z)))
    kinks = 0.5 * h * cycle.L * float(v @ v)
    allowed = CENTRAL_DIFFERENCE.allowed(size=len(Z)) * scale + kinks
    assert abs(slope - cycle.loss.gradient(Z) @ v) <= allowed


@EVERY
@given(norm=st.floats(1e-3, 1.0))
def test_the_horizon_is_the_first_at_which_the_printed_bound_fails(
    cycle: Cycle, norm: float
) -> None:
    """Eq. 15 at T allows 16 lambda gap / T; a step earlier it still allowed `norm` squared."""
    T = failing_horizon(cycle, norm)
    gap = cycle.loss.value(cycle.start) - cycle.lowest
    slack = 1.0 + ROUNDING.allowed(size=4)  # the horizon divides in another order
    assert rate_bound(cycle.weight, T, gap) < norm**2 * slack
    assert T == 1 or rate_bound(cycle.weight, T - 1, gap) * slack >= norm**2


@pytest.mark.parametrize("ratio", [1.0 / 6.0, 0.5, 0.1, 0.6])
def test_a_helix_has_no_cycle_at_the_ends_or_outside(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"`ratio` must lie in \(1/6, 1/2\), got"):
        helix_cycle(ratio)
