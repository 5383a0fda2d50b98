"""P18 appendix F: the adjoint of a schedule, optimized schedules, table 2, rates of samples."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from reference.arrays import Array
from reference.noisy_quadratic import (
    NoisyQuadratic,
    evenly_spaced,
    same_batch_rate,
    sample_rate,
)
from reference.problem import complex_step_jacobian
from reference.schedules import FAMILIES, Optimum, Unrolled, optimize, unrolled
from verification.profiles import share
from verification.strategies.noisy_quadratics import QuadraticCase, quadratic_cases
from verification.tolerances import COMPLEX_STEP, FUNCTION, ROUNDING, assert_close

STEPS = 300
seeds = st.integers(0, 2**16)
fractions = st.floats(0.05, 1.9)  # of 1 / (2 a h_max): from cautious to nearly unstable

# What the paper prints, and what is found here for f = 1/2 x^T H x, summed over the coordinates.
TABLE_2 = {
    ("SGD", "optimal"): (3.3, 2.609),
    ("SGD", "exponential"): (4.6, 3.823),
    ("SGD", "linear"): (12.5, 12.291),
    ("SGD", "fixed"): (81.9, 85.702),
    ("SGD + APO", "optimal"): (4.69, 5.602),
    ("SGD + APO", "exponential"): (6.73, 6.937),
    ("SGD + APO", "linear"): (15.6, 41.991),
    ("SGD + APO", "fixed"): (80.8, 83.511),
}
cells = pytest.mark.parametrize(("method", "schedule"), list(TABLE_2))


def rates_of(case: QuadraticCase, fraction: list[float]) -> Array:
    return np.array(fraction) / case.problem.curvature.max()


@cache
def table_2(method: str, schedule: str) -> Optimum:
    """A cell of the table; the free schedules from their first start alone, for time."""
    family = FAMILIES[method][schedule]
    first = family._replace(starts=lambda steps: family.starts(steps)[:1])
    return optimize(evenly_spaced(), np.full(1000, 1e4), STEPS, first)


def moduli(problem: NoisyQuadratic, run: Unrolled, second: Array, d_s: Array, d_r: Array) -> Array:
    """The adjoint's gradient with every difference replaced by a sum: what cancels in it."""
    k, v, M = problem.curvature, problem.v, [second]
    for eta in run.rates:
        M.append((1.0 + eta * k) ** 2 * M[-1] + (eta * k) ** 2 * v)
    p, gradient = problem.a * problem.h, np.zeros(len(run.rates))
    for t in reversed(range(len(run.rates))):
        eta, r = run.rates[t], run.greediest[t]
        d_eta = np.sum(p * (2.0 * k * (1.0 + eta * k) * M[t] + 2.0 * eta * k**2 * v))
        gradient[t] = d_eta * abs(d_s[t])
        p = p * (1.0 + eta * k) ** 2 + d_eta * d_r[t] * k**2 * (1.0 + r * k) / np.sum(k**3 * v)
    return gradient


@given(case=quadratic_cases(), fraction=st.lists(fractions, min_size=1, max_size=5))
def test_the_adjoint_of_a_rate_schedule_is_the_complex_step(
    case: QuadraticCase, fraction: list[float]
) -> None:
    problem, second = case.problem, case.moments.second
    rates = rates_of(case, fraction)
    run = unrolled(problem, second, rates)
    numeric = complex_step_jacobian(lambda s: unrolled(problem, second, s).losses[-1:], rates)[0]
    scale = moduli(problem, run, second, np.ones(len(rates)), np.zeros(len(rates)))
    assert_close(
        run.gradient,
        numeric,
        COMPLEX_STEP,
        size=len(case.h) + 6,
        iterations=2 * len(rates),
        scale=float(np.linalg.norm(scale)),
        what="d loss / d eta",
    )


@pytest.mark.parametrize("rule", ["wsd_weight", "caution"])
@given(
    case=quadratic_cases(max_condition=10.0),
    values=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=3),
)
def test_the_adjoint_through_the_moments_is_the_complex_step(
    rule: str, case: QuadraticCase, values: list[float]
) -> None:
    """Under APO's rules the rate depends on the moments, and so on all that came before."""
    problem, second, T = case.problem, case.moments.second, len(values)
    s = np.array(values) * (problem.curvature.max() if rule == "wsd_weight" else 1.0)
    run = unrolled(problem, second, s, rule)
    numeric = complex_step_jacobian(lambda u: unrolled(problem, second, u, rule).losses[-1:], s)[0]
    d_s = run.rates**2 if rule == "wsd_weight" else run.greediest
    d_r = (run.rates / run.greediest) ** 2 if rule == "wsd_weight" else s
    scale = moduli(problem, run, second, d_s, d_r)
    # eta is a quotient of sums of m + v, so it errs twice as much as m; a step passes the relative
    # error of eta and of m on to m by less than kappa = moduli / value, of every coordinate.
    error, m = 1.0, second
    for eta in run.rates:
        sk = eta * problem.curvature
        after = (1.0 - sk) ** 2 * m + sk**2 * problem.v
        kappa = np.max(((1.0 + sk) ** 2 * m + sk**2 * problem.v) / after)
        error, m = float(kappa * (1.0 + 5.0 * error)), after
    assert_close(
        run.gradient,
        numeric,
        COMPLEX_STEP,
        size=len(case.h) + 6,
        iterations=2 * T,
        condition=error,
        scale=float(np.linalg.norm(scale)),
        what=f"d loss / d {rule}",
    )


@given(case=quadratic_cases(), values=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4))
def test_a_weight_schedule_takes_the_rates_of_eq_12(
    case: QuadraticCase, values: list[float]
) -> None:
    """And the caution c takes those of lambda = (1/c - 1) / r >= 0."""
    problem, moments = case.problem, case.moments
    lambdas = np.array(values) * problem.curvature.max()
    run = unrolled(problem, moments.second, lambdas, "wsd_weight")
    for t, weight in enumerate(lambdas):
        eta = same_batch_rate(problem, moments.second, float(weight))
        # The moments of one step enter the rate of the next: t steps of rounding.
        assert_close(
            run.rates[t], eta, ROUNDING, size=len(case.h) + 6, iterations=t + 1, what="eta"
        )
        moments = problem.step(moments, run.rates[t])
    again = unrolled(problem, case.moments.second, run.rates / run.greediest, "caution")
    assert_close(again.rates, run.rates, ROUNDING, size=8, iterations=len(lambdas), what="rates")


@pytest.mark.parametrize(
    "schedule", ["fixed", "exponential", "linear", "clipped linear", "optimal"]
)
@given(steps=st.integers(2, 8), seed=seeds)
def test_schedules_have_the_jacobian_of_their_values(schedule: str, steps: int, seed: int) -> None:
    family = FAMILIES["SGD + APO"][schedule]
    size = {"fixed": 1, "optimal": steps}.get(schedule, 2)
    psi = np.random.default_rng(seed).standard_normal(size)
    numeric = complex_step_jacobian(lambda u: family.schedule(u, steps)[0], psi)
    assert_close(family.schedule(psi, steps)[1], numeric, FUNCTION, size=4, scale=2.0 * np.exp(3.0))


@share(0.25)
@given(case=quadratic_cases(max_size=2, start=True), steps=st.integers(1, 4))
def test_one_coordinate_has_the_optimal_schedule_of_averaging(
    case: QuadraticCase, steps: int
) -> None:
    """1 / m_T = 1 / m_0 + T / v: x_T is the mean of all that was seen, and no rate does better."""
    problem = NoisyQuadratic(case.h[:1], case.v[:1], case.half)
    m0 = np.array(case.mean[:1]) ** 2 + 0.1 * problem.v
    family = FAMILIES["SGD"]["optimal"]
    shift = -float(np.log(problem.curvature[0]))
    best = optimize(problem, m0, steps, family._replace(starts=lambda T: [np.full(T, shift - 1.0)]))
    m_T = 1.0 / (1.0 / m0[0] + steps / problem.v[0])
    # L-BFGS stops where log loss falls by less than eps a step or its slope is below 1e-9; the
    # curvature of log loss in log eta is about m_T / v there, at least 1/10 of 1 / (1 + T).
    assert best.loss >= problem.a * problem.h[0] * m_T * (1.0 - 1e-13)
    assert best.loss <= problem.a * problem.h[0] * m_T * (1.0 + 1e-12 * (1.0 + steps) ** 2)


@cells
def test_the_search_ends_at_a_stationary_point(method: str, schedule: str) -> None:
    """L-BFGS stops where a step gains less than eps, so |slope| < sqrt(2 eps curvature).

    The curvature of log loss in log s is below 2 T^2: the loss multiplies T factors of degree 2.
    """
    assert table_2(method, schedule).slope < np.sqrt(4.0 * np.finfo(float).eps) * STEPS


@pytest.mark.parametrize("method", ["SGD", "SGD + APO"])
def test_the_fixed_schedule_is_the_best_of_a_grid_and_of_a_line_search(method: str) -> None:
    family, best = FAMILIES[method]["fixed"], table_2(method, "fixed")
    problem, second = evenly_spaced(), np.full(1000, 1e4)

    def loss(log_value: float) -> float:
        run = unrolled(problem, second, np.full(STEPS, np.exp(log_value)), family.rule)
        return float(run.losses[-1])

    psi = float(best.psi[0])
    assert min(loss(x) for x in np.linspace(psi - 3.0, psi + 1.0, 17)) >= best.loss * (1.0 - 1e-12)
    found = minimize_scalar(loss, bounds=(psi - 3.0, psi + 1.0), method="bounded")
    # It stops at 1e-5 in log s, where the loss is off by curvature / 2 times the square of that.
    assert found.fun == pytest.approx(best.loss, rel=1e-9)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("method", "schedule"), [key for key in TABLE_2 if key[1] in ("exponential", "linear")]
)
def test_two_parameters_are_the_best_of_a_grid_around_them(method: str, schedule: str) -> None:
    family, best = FAMILIES[method][schedule], table_2(method, schedule)
    problem, second = evenly_spaced(), np.full(1000, 1e4)
    left_open = 1e-12 + 3.0 * best.slope  # lambda_0 tends to 0: psi_0 has no best value
    for first in np.linspace(-1.5, 1.5, 5):
        for last in np.linspace(-1.5, 1.5, 5):
            s, _ = family.schedule(best.psi + np.array([first, last]), STEPS)
            with np.errstate(over="ignore", invalid="ignore"):
                loss = unrolled(problem, second, s, family.rule).losses[-1]
            assert not loss < best.loss * (1.0 - left_open), (first, last, loss)


@pytest.mark.parametrize("schedule", ["optimal", "exponential"])
def test_the_loss_is_known_although_it_passes_through_1e38(schedule: str) -> None:
    """Against extended precision, within a running error bound that is far below the digits shown.

    f = 1 - eta k errs by u (2 eta k + |f|), a step adds that, and f^2 takes what came before along.
    """
    problem, run = evenly_spaced(), table_2("SGD", schedule).run
    h = np.linspace(np.longdouble(0.01), np.longdouble(1.0), 1000)
    exact, m, error = np.full(1000, np.longdouble(1e4)), np.full(1000, 1e4), np.zeros(1000)
    for eta in run.rates:
        k = np.longdouble(eta) * h
        exact = (1.0 - k) ** 2 * exact + k**2 / h
        k = eta * problem.curvature
        f = 1.0 - k
        after = f**2 * m + k**2 * problem.v
        error = f**2 * error + 2.0 * np.abs(f) * (2.0 * k + 2.0 * np.abs(f)) * m + 4.0 * after
        m = after
    # h itself is rounded here, which moves k once more; the last sum has 1000 terms.
    u = 0.5 * np.finfo(float).eps
    allowed = u * float(np.sum(problem.h * error) + 1000.0 * run.losses[-1])
    assert abs(float(0.5 * np.sum(h * exact)) - run.losses[-1]) <= allowed
    assert allowed < 1e-6 * run.losses[-1]


@cells
def test_table_2_entries(method: str, schedule: str) -> None:
    """Ours, to the digits shown; half of the last one is far above what the search leaves open."""
    assert table_2(method, schedule).loss == pytest.approx(TABLE_2[method, schedule][1], abs=5e-4)


def test_no_scaling_of_the_loss_reproduces_table_2() -> None:
    """A factor of f, or a mean over the coordinates, multiplies all entries alike; the ratios of
    the paper's to ours differ: from 0.37 to 1.27, and from 0.95 to 1.27 within the row of SGD."""
    ratios = {cell: paper / table_2(*cell).loss for cell, (paper, _) in TABLE_2.items()}
    sgd = [ratio for (method, _), ratio in ratios.items() if method == "SGD"]
    assert max(sgd) / min(sgd) > 1.3
    assert max(ratios.values()) / min(ratios.values()) > 3.0
    # The four that come within 5% with the half and the sum:
    assert {cell for cell, ratio in ratios.items() if abs(ratio - 1.0) < 0.05} == {
        ("SGD", "linear"),
        ("SGD", "fixed"),
        ("SGD + APO", "exponential"),
        ("SGD + APO", "fixed"),
    }


def test_the_printed_fixed_rate_is_below_the_best_possible_one() -> None:
    """81.9 < 85.70 and 80.8 < 83.51: no search reaches them at the convention closest to both."""
    for method in ("SGD", "SGD + APO"):
        assert TABLE_2[method, "fixed"][0] < table_2(method, "fixed").loss


def test_the_printed_optimum_of_sgd_is_not_the_optimum() -> None:
    """3.3 and 4.6 are 26% and 20% above what L-BFGS finds: their search had not converged."""
    for schedule in ("optimal", "exponential"):
        assert table_2("SGD", schedule).loss < 0.85 * TABLE_2["SGD", schedule][0]


def test_what_is_printed_for_sgd_needs_rates_that_are_unstable() -> None:
    """With no rate above 2 / h_max the best are 4.32 and 16.86, above the printed 3.3 and 4.6.

    The free optima pay with a loss of 1e38 and 1e65 on the way. Among stable schedules the linear
    one (12.29) is better than the exponential one, against the table's order.
    """
    optimal, exponential = (table_2("SGD", f"stable {name}") for name in ("optimal", "exponential"))
    assert optimal.loss == pytest.approx(4.324, abs=5e-4)
    assert exponential.loss == pytest.approx(16.862, abs=5e-4)
    assert table_2("SGD", "linear").run.rates.max() < 2.0
    assert table_2("SGD", "linear").loss < exponential.loss
    for name, peak in (("optimal", 1e38), ("exponential", 1e65)):
        assert 0.1 * peak < table_2("SGD", name).run.losses.max() < 10.0 * peak
        assert np.argmax(table_2("SGD", f"stable {name}").run.losses) == 0


@pytest.mark.parametrize("method", ["SGD", "SGD + APO"])
def test_more_freedom_ends_lower(method: str) -> None:
    """The table's order: optimal < exponential < linear < fixed."""
    losses = [table_2(method, name).loss for name in ("optimal", "exponential", "linear", "fixed")]
    assert losses == sorted(losses)


def test_apo_loses_to_free_rates_by_its_cap() -> None:
    """lambda >= 0 caps eta at r_t, here below 4; free rates begin 85 times as large as APO's.

    "Almost the same loss" (P18) is 1.42 times in its table, 2.15 here, and 1.30 of stable rates.
    """
    sgd, apo = table_2("SGD", "optimal"), table_2("SGD + APO", "optimal")
    assert 2.1 < apo.loss / sgd.loss < 2.2
    assert 1.25 < apo.loss / table_2("SGD", "stable optimal").loss < 1.35
    assert apo.run.wsd_weights.min() >= -1e-12  # 1/eta - 1/r of two numbers of order 1
    assert apo.run.rates.max() < 4.0
    assert sgd.run.rates[0] > 85.0 * apo.run.rates[0]


def test_a_clipped_linear_weight_nearly_reaches_the_optimal_one() -> None:
    """With max(0, line) the linear entry is 5.99 and not 41.99: 15.6 is neither."""
    problem, second = evenly_spaced(), np.full(1000, 1e4)
    clipped = optimize(problem, second, STEPS, FAMILIES["SGD + APO"]["clipped linear"])
    assert clipped.loss == pytest.approx(5.992, abs=5e-4)
    assert table_2("SGD + APO", "optimal").loss < clipped.loss < 1.1 * 5.602


def spread_of_rates(problem: NoisyQuadratic, mean: Array, variance: Array) -> tuple[float, float]:
    """Standard deviation and bias of `sample_rate`, relative, to leading order (delta method).

    With e = (x - c)^2 of Gaussians, Var e = 2 s^4 + 4 mu^2 s^2; eta = sum k^2 e / sum k^3 e.
    """
    k, s2 = problem.curvature, variance + problem.v
    var_e, B = 2.0 * s2**2 + 4.0 * mean**2 * s2, np.sum(k**3 * (mean**2 + s2))
    r = float(same_batch_rate(problem, mean**2 + variance))
    deviation = np.sqrt(np.sum((k**2 * (1.0 - r * k)) ** 2 * var_e)) / (r * B)
    return float(deviation), float(-np.sum(k**5 * (1.0 - r * k) * var_e) / (r * B**2))


@pytest.mark.parametrize("after", [0, 30, 300])
def test_rates_of_single_samples_scatter_by_percents_around_the_expected_one(after: int) -> None:
    """Monte Carlo, 4000 samples, n = 1000: the mean within six standard errors, and its spread."""
    problem, N = evenly_spaced(), 4000
    moments = problem.start(np.full(1000, 100.0))
    for eta in table_2("SGD + APO", "exponential").run.rates[:after]:
        moments = problem.step(moments, eta)
    variance = moments.second - moments.mean**2
    source = np.random.default_rng(after)
    x = moments.mean + np.sqrt(np.maximum(variance, 0.0)) * source.standard_normal((N, 1000))
    c = np.sqrt(problem.v) * source.standard_normal((N, 1000))
    relative = sample_rate(problem, x, c) / same_batch_rate(problem, moments.second) - 1.0
    deviation, bias = spread_of_rates(problem, moments.mean, variance)
    # Beyond the leading orders, which are deviation and deviation^2, comes the cube.
    assert abs(np.mean(relative) - bias) < 6.0 * deviation / np.sqrt(N) + deviation**3
    # A variance of N nearly Gaussian samples errs by sqrt(2/N); beyond the leading order by bias.
    assert np.std(relative) == pytest.approx(deviation, rel=6.0 / np.sqrt(2 * N) + 10 * abs(bias))
    assert deviation < 0.03
    assert abs(bias) < 1e-3


@pytest.mark.parametrize("own", [False, True])
def test_simulated_runs_end_at_the_analytic_loss(own: bool) -> None:
    """40 runs of 300 steps; `own`: every run with the rate of its own samples, which sees its c.

    The mean lies within six standard errors, for own rates plus 1% (bias of order 1/n each step).
    """
    problem, runs = evenly_spaced(), 40
    best = table_2("SGD + APO", "fixed")
    source = np.random.default_rng(7)
    x = np.full((runs, 1000), 100.0)
    for eta, weight in zip(best.run.rates, best.run.wsd_weights, strict=True):
        c = np.sqrt(problem.v) * source.standard_normal((runs, 1000))
        rate = sample_rate(problem, x, c, float(weight))[:, None] if own else eta
        x = x - rate * problem.noisy_gradient(x, c)
    losses = problem.noisy_value(x, 0.0)
    error = np.std(losses) / np.sqrt(runs)
    assert abs(np.mean(losses) - best.loss) < 6.0 * error + (0.01 * best.loss if own else 0.0)
