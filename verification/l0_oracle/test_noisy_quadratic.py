"""P18 appendix F: the moments of x, what a gradient holds, and the preferred learning rates.

The noise enters every formula through its first two moments alone. So the oracle replaces the
Gaussian by +- one standard deviation in each coordinate, and every expectation is a finite sum.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.arrays import Array
from reference.noisy_quadratic import (
    NoisyQuadratic,
    other_batch_rate,
    same_batch_rate,
    sample_rate,
)
from reference.problem import complex_step_jacobian
from reference.schedules import unrolled
from verification.strategies.noisy_quadratics import QuadraticCase, quadratic_cases
from verification.strategies.weights import weights
from verification.tolerances import COMPLEX_STEP, ROUNDING, assert_close

seeds = st.integers(0, 2**16)
fractions = st.floats(0.05, 1.9)  # of 1 / (2 a h_max): from cautious to nearly unstable


def rates_of(case: QuadraticCase, fraction: list[float]) -> Array:
    return np.array(fraction) / case.problem.curvature.max()


@given(case=quadratic_cases(), seed=seeds)
def test_the_gradient_is_the_complex_step_of_the_value(case: QuadraticCase, seed: int) -> None:
    x, c = np.random.default_rng(seed).standard_normal((2, len(case.h)))
    problem = case.problem
    assert_close(
        problem.noisy_gradient(x, c),
        complex_step_jacobian(lambda u: problem.noisy_value(u, c)[None], x)[0],
        COMPLEX_STEP,
        scale=float(np.linalg.norm(problem.curvature * (np.abs(x) + np.abs(c)))),
        what="g",
    )
    assert_close(
        problem.noisy_gradient(x, 0.0 * c), 2 * problem.a * np.diag(problem.h) @ x, ROUNDING
    )


@given(case=quadratic_cases(max_size=2), fraction=st.lists(fractions, min_size=1, max_size=3))
def test_moments_are_those_of_every_path_of_the_noise(
    case: QuadraticCase, fraction: list[float]
) -> None:
    """E[x_T] and E[x_T^2] by following every x_0 through every sequence of c."""
    problem, moments = case.problem, case.moments
    points = list(case.points())
    magnitude = np.mean([np.abs(x) for x in points], axis=0) + np.sqrt(problem.v)
    for eta in rates_of(case, fraction):
        moments = problem.step(moments, eta)
        points = [x - eta * problem.noisy_gradient(x, c) for x in points for c in case.noise()]
        magnitude = (1.0 + eta * problem.curvature) * (magnitude + np.sqrt(problem.v))
    options = {"size": len(points) + len(case.h), "iterations": len(fraction)}
    assert_close(
        moments.mean,
        np.mean(points, axis=0),
        ROUNDING,
        scale=float(np.linalg.norm(magnitude)),
        what="E[x]",
        **options,
    )
    assert_close(
        moments.second,
        np.mean(np.square(points), axis=0),
        ROUNDING,
        scale=2.0 * float(np.linalg.norm(magnitude**2)),
        what="E[x^2]",
        **options,
    )


@given(case=quadratic_cases())
def test_expectations_are_the_means_over_points_and_noise(case: QuadraticCase) -> None:
    problem, second = case.problem, case.moments.second
    points, noise = list(case.points()), list(case.noise())
    gradients = [problem.noisy_gradient(x, c) for x in points for c in noise]
    hessian = 2.0 * problem.a * np.diag(problem.h)
    means = {
        "loss": (problem.expected_loss(second), [problem.noisy_value(x, 0.0) for x in points]),
        "power": (problem.power(second), [g @ g for g in gradients]),
        "bend": (problem.bend(second), [g @ hessian @ g for g in gradients]),
        "signal": (
            problem.signal(second),
            [np.sum(problem.noisy_gradient(x, 0.0) ** 2) for x in points],
        ),
    }
    for name, (closed, values) in means.items():
        # g has the modulus 2 a h (|x| + |c|) at most: squares of sums of two cancelling terms.
        assert_close(
            np.float64(closed),
            np.float64(np.mean(values)),
            ROUNDING,
            size=len(values) + len(case.h),
            scale=4.0 * float(np.max(values)),
            iterations=2,
            what=name,
        )


@pytest.mark.parametrize("batch", ["same", "other"])
@given(case=quadratic_cases(max_size=2), weight=weights(max_decade=1.0))
def test_preferred_rates_are_stationary_points_of_their_objectives(
    batch: str, case: QuadraticCase, weight: float
) -> None:
    """d/d eta of E[f~_c'(x - eta g_c) + lambda/2 ||eta g_c||^2], by enumeration; it is convex."""
    problem, second = case.problem, case.moments.second
    rule = same_batch_rate if batch == "same" else other_batch_rate

    def objective(eta: Array) -> Array:
        values = []
        for x in case.points():
            for c in case.noise():
                g = problem.noisy_gradient(x, c)
                others = [c] if batch == "same" else list(case.noise())
                loss = np.mean([problem.noisy_value(x - eta[0] * g, c2) for c2 in others])
                values.append(loss + 0.5 * weight * eta[0] ** 2 * (g @ g))
        return np.mean(values, keepdims=True)

    eta = float(rule(problem, second, weight))
    slope = complex_step_jacobian(objective, np.array([eta]))[0, 0]
    curved = problem.bend(second) + weight * problem.power(second)
    deviation = np.sqrt(second) + np.sqrt(problem.v)
    steepest = np.sum(problem.curvature**2 * deviation**2) + eta * np.sum(
        (problem.curvature + weight) * problem.curvature**2 * deviation**2
    )
    assert curved > 0.0
    size = len(list(case.points())) + 2 * len(list(case.noise())) + len(case.h)
    assert_close(
        np.float64(slope), 0.0, COMPLEX_STEP, size=size, scale=float(steepest), what="slope"
    )


@given(case=quadratic_cases(), weight=weights(max_decade=1.0), seed=seeds)
def test_the_rate_of_one_sample_is_a_stationary_point(
    case: QuadraticCase, weight: float, seed: int
) -> None:
    problem = case.problem
    x, c = np.random.default_rng(seed).standard_normal((2, len(case.h)))
    g = problem.noisy_gradient(x, c)
    eta = float(sample_rate(problem, x, c, weight))
    slope = complex_step_jacobian(
        lambda e: (problem.noisy_value(x - e[0] * g, c) + 0.5 * weight * e[0] ** 2 * g @ g)[None],
        np.array([eta]),
    )
    moduli = problem.curvature * (np.abs(x) + np.abs(c) + eta * np.abs(g)) + weight * eta * np.abs(
        g
    )
    assert_close(slope[0, 0], 0.0, COMPLEX_STEP, size=len(g), scale=2.0 * float(moduli @ np.abs(g)))


def test_problems_check_their_numbers() -> None:
    with pytest.raises(ValueError, match=r"`h` must be positive, got smallest entry 0.0; leave"):
        NoisyQuadratic([1.0, 0.0])
    with pytest.raises(ValueError, match=r"`v` must be non-negative, got smallest entry -1.0"):
        NoisyQuadratic([1.0], [-1.0])
    with pytest.raises(ValueError, match=r"`v` must have shape \(1,\), got \(2,\)"):
        NoisyQuadratic([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"`rule` must be one of .* got 'greed'; choose one"):
        unrolled(NoisyQuadratic([1.0]), [1.0], [0.1], "greed")
    with pytest.raises(ValueError, match=r"`wsd_weight` must be non-negative and finite, got -1.0"):
        same_batch_rate(NoisyQuadratic([1.0]), np.ones(1), -1.0)


def test_a_coordinate_may_have_no_noise() -> None:
    """Its gradient is exact, and gradient descent with rate 1/(2h) ends there at once."""
    problem = NoisyQuadratic([1.0, 2.0], [0.0, 1.0], half=False)
    assert problem.v.tolist() == [0.0, 1.0]
    x = np.array([3.0, 3.0])
    assert x[0] - problem.noisy_gradient(x, np.zeros(2))[0] / 2.0 == 0.0
