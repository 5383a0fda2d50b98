"""P18 Theorem 1: counterexamples to it as printed, and the condition with which it holds.

Printed: lambda >= max(C G, L / 4) gives min ||g_k||^2 <= 16 lambda / T (L(Z_0) - L*).
Corrected: lambda >= max(C G, L) / 2 gives it with 8 in place of 16 (`sufficient_weight`).
"""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from reference.arrays import Array
from reference.cycles import Cycle, circle_cycle, failing_horizon, helix_cycle, line_cycle
from reference.manifolds import Affine, Parametrized
from reference.output_space import (
    OutputLoss,
    Trajectory,
    curvature_free_bound,
    printed_weight,
    projected_gradient_descent,
    projected_gradient_step,
    rate_bound,
    sufficient_weight,
)
from verification.profiles import share
from verification.strategies.manifolds import Descent, descents, network_surface
from verification.tolerances import SOLVE, assert_close

BOUNDED = ("line", "plane", "circle", "sphere", "torus")
# The least multiple of L that the corrected and the printed condition ask for, and beyond.
EXCESS = st.sampled_from([1.0, 1.01, 1.5, 10.0])


def rounding(loss: Array) -> float:
    """What rounding, and searches exact to 1e-10, leave of a difference of losses."""
    return float(1e-9 * (1.0 + np.abs(loss).max()))


def least(trajectory: Trajectory, first: int, last: int) -> float:
    """The least ||g_k||^2 of the iterations from `first` up to and without `last`."""
    return float(np.min(trajectory.gradient_norm[first:last]) ** 2)


def follow(cycle: Cycle, steps: int) -> Trajectory:
    """Its first steps."""
    return projected_gradient_descent(cycle.manifold, cycle.loss, cycle.start, cycle.weight, steps)


# ------------------------------------------------------------------ refuted as printed


def fails_on_a_line(ratio: Fraction, T: int) -> bool:
    """Eq. 15 on M = R with the loss L/2 Z^2 and Z_0 = 1, in exact arithmetic, r = lambda / L.

    Z_{k+1} = (1 - 1 / (2 r)) Z_k, so the last gradient of a convergent run is the least.
    """
    factor = 1 - 1 / (2 * ratio)
    smallest = min(Fraction(1), factor ** (2 * (T - 1)))
    return smallest > Fraction(16) * ratio / T * Fraction(1, 2)


def test_the_smallest_counterexample_takes_three_iterations() -> None:
    """M = R, loss Z^2 / 2 (L = 1, C = 0), lambda = 1/4: Z alternates between 1 and -1.

    The printed bound is 16 lambda / T (1/2 - 0) = 2 / T; ||g_k||^2 = 1 exceeds it from T = 3 on.
    """
    assert not any(fails_on_a_line(Fraction(1, 4), T) for T in (1, 2))
    assert find(st.integers(1, 100), lambda T: fails_on_a_line(Fraction(1, 4), T)) == 3
    cycle = line_cycle()
    assert cycle.weight == printed_weight(cycle.L, cycle.C, 1e300)  # C = 0: no bound on G matters
    trajectory = follow(cycle, 3)
    assert trajectory.gradient_norm.tolist() == [1.0, 1.0, 1.0, 1.0]
    assert trajectory.Z[:, 0].tolist() == [1.0, -1.0, 1.0, -1.0]
    assert least(trajectory, 0, 3) > rate_bound(cycle.weight, 3, gap=0.5)
    assert failing_horizon(cycle, 1.0) == 3


def test_on_a_line_it_fails_in_a_strip_above_l_over_4() -> None:
    """There the run converges, but too slowly: up to r = 0.263, not from 0.264 on."""

    def fails(thousandths: int) -> bool:
        return any(fails_on_a_line(Fraction(thousandths, 1000), T) for T in range(1, 60))

    assert [r for r in range(250, 320) if fails(r)] == list(range(250, 264))


@given(case=descents(("line", "plane")), T=st.integers(1, 20))
def test_on_flat_manifolds_it_holds_from_two_sevenths_of_l_on(case: Descent, T: int) -> None:
    """There one step lowers any loss by (1 - L / (4 lambda)) ||g||^2 / (2 lambda).

    That is at least the ||g||^2 / (16 lambda) that eq. 15 sums iff lambda >= 2 L / 7.
    """
    weight = 2.0 / 7.0 * case.L
    trajectory = projected_gradient_descent(case.manifold, case.loss, case.start, weight, T - 1)
    gap = float(trajectory.loss[0] - case.lowest) + rounding(trajectory.loss)
    assert least(trajectory, 0, T) <= rate_bound(weight, T, gap)


@pytest.mark.parametrize("ratio", [0.25, 0.3, 0.35, 0.4, 0.45, 0.49, 0.499])
def test_between_two_turns_of_a_helix_it_fails_up_to_l_over_2(ratio: float) -> None:
    """A connected analytic curve of curvature C with C G = 0.004 L at most: the steps never end."""
    cycle = helix_cycle(ratio)
    assert cycle.weight >= printed_weight(cycle.L, cycle.C, cycle.G)
    trajectory = follow(cycle, 40)
    assert np.max(np.linalg.norm([cycle.loss.gradient(Z) for Z in trajectory.Z], axis=1)) < cycle.G
    # Each step jumps to the other turn, and the second brings the point back.
    assert np.all(np.diff(np.sign(trajectory.Z[:, 2])) != 0.0)
    settled = trajectory.Z[-20:]
    drift = np.linalg.norm(settled[2:] - settled[:-2], axis=1)
    assert np.all(drift[1:] <= drift[:-1] + 1e-9)  # the cycle attracts
    assert drift.max() < 1e-2
    smallest = np.sqrt(least(trajectory, 0, 41))
    horizon = failing_horizon(cycle, float(smallest))
    gap = cycle.loss.value(cycle.start) - cycle.lowest
    assert smallest**2 > rate_bound(cycle.weight, horizon, gap)
    assert horizon < 3000


def test_on_the_helix_the_refutation_is_an_actual_run_of_seven_iterations() -> None:
    cycle = helix_cycle(0.3)
    trajectory = follow(cycle, 7)
    gap = cycle.loss.value(cycle.start) - cycle.lowest
    assert least(trajectory, 0, 7) > rate_bound(cycle.weight, 7, gap)


@pytest.mark.parametrize("ratio", [0.25, 0.35, 0.45])
def test_the_helix_cycle_is_the_one_of_straight_parallel_lines(ratio: float) -> None:
    """y = s c w / (6 r - 1): the effective gradient is 4 lambda y, up to the helix's bend."""
    trajectory = follow(helix_cycle(ratio, radius=5000.0), 40)
    s, c = np.sqrt(1.0 - 2.0 * ratio), np.sqrt(2.0 * ratio)
    expected = 4.0 * ratio * s * c / (6.0 * ratio - 1.0)
    # Slope rise/radius and bend y/radius of the turns, each a fraction 1e-3 of the straight lines.
    assert trajectory.gradient_norm[-1] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("ratio", "bend"), [(0.26, 0.1), (0.3, 0.25), (0.31, 0.25), (0.33, 0.33)])
def test_a_single_circle_suffices_below_l_plus_cg_over_4(ratio: float, bend: float) -> None:
    cycle = circle_cycle(ratio, bend)
    assert cycle.weight >= printed_weight(cycle.L, cycle.C, cycle.G)
    assert ratio < (1.0 + bend) / 4.0
    trajectory = follow(cycle, 400)
    # It never comes closer than it started: the stationary point repels.
    assert least(trajectory, 0, 401) >= (1.0 - 1e-9) * trajectory.gradient_norm[0] ** 2
    assert trajectory.gradient_norm[-1] > trajectory.gradient_norm[0]


@pytest.mark.parametrize(("ratio", "bend"), [(0.28, 0.1), (0.32, 0.25)])
def test_above_l_plus_cg_over_4_the_same_circle_converges(ratio: float, bend: float) -> None:
    trajectory = follow(circle_cycle(ratio, bend), 400)
    assert trajectory.gradient_norm[-1] < 1e-4 * trajectory.gradient_norm[0]


def test_the_printed_proof_takes_a_model_that_the_step_does_not_minimize() -> None:
    """The minimizer for lambda, put into the model with 2 lambda, misses Lemma 1's bound.

    On the line: the step is d = -1 / (2 lambda), so -1/(2 lambda) + 2 lambda / (4 lambda^2) = 0,
    while the proof asks for at most -1 / (16 lambda).
    """
    cycle = line_cycle()
    gradient = cycle.loss.gradient(cycle.start)
    new = projected_gradient_step(cycle.manifold, cycle.start, gradient, cycle.weight)
    d = new - cycle.start
    doubled = float(gradient @ d + 2.0 * cycle.weight * d @ d)
    assert doubled == 0.0
    assert doubled > -(gradient @ gradient) / (16.0 * cycle.weight)


# ------------------------------------------------------------------ corrected


@given(case=descents(BOUNDED), excess=EXCESS)
def test_with_half_of_max_cg_and_l_each_step_lowers_the_loss(case: Descent, excess: float) -> None:
    weight = excess * sufficient_weight(case.L, case.manifold.curvature, case.G)
    trajectory = projected_gradient_descent(case.manifold, case.loss, case.start, weight, 4)
    promised = trajectory.gradient_norm[:-1] ** 2 / (8.0 * weight)
    assert np.all(-np.diff(trajectory.loss) >= promised - rounding(trajectory.loss))


@given(case=descents(BOUNDED), excess=EXCESS, T=st.sampled_from([1, 2, 5, 20]))
def test_with_half_of_max_cg_and_l_eq_15_holds_with_8_for_16(
    case: Descent, excess: float, T: int
) -> None:
    weight = excess * sufficient_weight(case.L, case.manifold.curvature, case.G)
    trajectory = projected_gradient_descent(case.manifold, case.loss, case.start, weight, T - 1)
    gap = float(trajectory.loss[0] - case.lowest) + rounding(trajectory.loss)
    assert least(trajectory, 0, T) <= rate_bound(weight, T, gap, constant=8.0)


@share(0.5)
@given(case=descents(("sine curve",)), excess=EXCESS)
def test_on_an_unbounded_curve_each_step_lowers_a_linear_loss(case: Descent, excess: float) -> None:
    weight = excess * sufficient_weight(0.0, case.manifold.curvature, case.G)
    trajectory = projected_gradient_descent(case.manifold, case.loss, case.start, weight, 3)
    promised = trajectory.gradient_norm[:-1] ** 2 / (8.0 * weight)
    assert np.all(-np.diff(trajectory.loss) >= promised - rounding(trajectory.loss))


@pytest.mark.parametrize("ratio", [0.5, 0.51, 0.7])
def test_at_l_over_2_the_helix_no_longer_cycles(ratio: float) -> None:
    """The cycle that r = 0.499 has, continued across the corrected condition's boundary."""
    cycle = helix_cycle(0.499)._replace(weight=ratio)
    trajectory = follow(cycle, 40)
    assert np.all(np.diff(trajectory.loss) <= rounding(trajectory.loss))
    assert np.all(trajectory.Z[1:, 2] * trajectory.Z[:-1, 2] > 0.0)  # it stays on its turn


@pytest.mark.parametrize("weight_over_l", [0.5, 1.0])
def test_on_a_networks_own_outputs_each_step_lowers_the_loss(weight_over_l: float) -> None:
    """w_2 tanh(w_1 x) on three inputs, squared error, targets near what the network can reach."""
    surface = network_surface()
    target = surface.point(np.array([1.2, 0.9])) + np.array([0.01, -0.02, 0.01])
    loss = OutputLoss(
        lambda Z: float(0.5 * np.sum((Z - target) ** 2)), lambda Z: Z - target, lambda Z: np.eye(3)
    )
    start = surface.point(np.array([0.9, 1.1]))
    G = float(np.linalg.norm(start - target))  # along a descent the gradient norm only falls
    weight = 2.0 * weight_over_l * sufficient_weight(1.0, surface.curvature, G)
    trajectory = projected_gradient_descent(surface, loss, start, weight, 8)
    promised = trajectory.gradient_norm[:-1] ** 2 / (8.0 * weight)
    assert np.all(-np.diff(trajectory.loss) >= promised - rounding(trajectory.loss))
    assert trajectory.gradient_norm[-1] < 0.3 * trajectory.gradient_norm[0]


@given(case=descents(BOUNDED), ratio=st.sampled_from([0.501, 0.6, 1.0, 3.0]))
def test_from_the_second_iterate_on_no_curvature_bound_is_needed(
    case: Descent, ratio: float
) -> None:
    """lambda > L / 2 alone bounds min ||g_k||^2 over k = 1 ... T, however curved M is."""
    L = max(case.L, 0.1)
    T = 5
    weight = ratio * L
    trajectory = projected_gradient_descent(case.manifold, case.loss, case.start, weight, T)
    gap = float(trajectory.loss[0] - case.lowest) + rounding(trajectory.loss)
    assert least(trajectory, 1, T + 1) <= curvature_free_bound(weight, L, T, gap)


def test_the_curvature_free_bound_is_what_its_two_inequalities_give() -> None:
    """||g|| <= (L + 2 lambda) ||d|| = 7 ||d|| and a fall of (lambda - L/2) ||d||^2 = 5/2 ||d||^2.

    A gap of 10 pays for four such steps with ||d|| = 1 each, so that the least ||g||^2 is 49.
    """
    assert curvature_free_bound(3.0, 1.0, 4, 10.0) == pytest.approx(49.0, rel=1e-15)


def test_the_curvature_free_bound_needs_more_than_l_over_2() -> None:
    with pytest.raises(ValueError, match=r"`weight` must exceed L / 2 = 0\.5, got 0\.5"):
        curvature_free_bound(0.5, 1.0, 1, 1.0)


# ------------------------------------------------------------------ what eq. 15 says of the norm


def test_eq_15_bounds_the_square_so_the_norm_need_not_fall_as_one_over_t() -> None:
    """The text has "the norm converges with rate O(1/T)"; T^(-2/3) is seen, which eq. 15 allows.

    M = R and the loss 1 / (1 + Z^2)^(1/2), whose tail 1 / Z makes Z grow as T^(1/3) and the norm
    fall as Z^-2: T ||g_T|| grows without bound. Between T = 1e3 and 1e4 its exponent is 1/3 up to
    the relative corrections O(Z^-2) < 1e-2.
    """
    line = Affine(np.zeros(1), np.eye(1))
    loss = OutputLoss(
        lambda Z: float(1.0 / np.sqrt(1.0 + Z @ Z)),
        lambda Z: -Z / (1.0 + Z @ Z) ** 1.5,
        lambda Z: (2.0 * Z @ Z - 1.0) / (1.0 + Z @ Z) ** 2.5 * np.eye(1),
    )
    trajectory = projected_gradient_descent(line, loss, np.array([2.0]), 0.5, 10_000)
    norm = trajectory.gradient_norm
    exponent = np.log10(norm[10_000] / norm[1_000])
    assert exponent == pytest.approx(-2.0 / 3.0, abs=1e-2)
    assert 10_000 * norm[10_000] > 2.0 * 1_000 * norm[1_000]
    for T in (10, 100, 1000, 10_000):
        assert least(trajectory, 0, T) <= rate_bound(0.5, T, gap=trajectory.loss[0], constant=8.0)


def test_a_helix_needs_a_ratio_below_one_half() -> None:
    with pytest.raises(ValueError, match=r"`ratio` must lie in \(1/6, 1/2\), got 0\.5"):
        helix_cycle(0.5)


def test_the_helix_has_the_stated_curvature() -> None:
    cycle = helix_cycle(0.3)
    assert isinstance(cycle.manifold, Parametrized)
    measured = cycle.manifold.normal_curvature(np.array([0.7]))
    assert_close(np.array(measured), np.array(cycle.C), SOLVE, condition=1e3, size=3, what="C")
