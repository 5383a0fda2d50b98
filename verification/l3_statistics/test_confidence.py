"""The confidence bound itself: it holds at the rate it states, and is no wider than it need be."""

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from verification.l3_statistics.confidence import Confidence
from verification.profiles import share

REPETITIONS = 2000


def outcomes(seed: int, pairs: int, size: int) -> np.ndarray:
    """Skewed meta-gradients, each as likely as any other, (pairs, size)."""
    return np.random.default_rng(seed).standard_exponential((pairs, size))


@given(seed=st.integers(0, 2**16), size=st.integers(1, 3), decade=st.floats(-2.0, -0.3))
def test_the_false_alarm_rate_of_every_sequence_of_draws(
    seed: int, size: int, decade: float
) -> None:
    """By brute force: of all 4⁴ sequences of four steps, a share of at most δ is outside."""
    table, false_alarm = outcomes(seed, 4, size), 10.0**decade
    confidence = Confidence(
        np.eye(size), np.cov(table.T, ddof=0).reshape(size, size), 4, false_alarm
    )
    for _ in range(4):
        confidence.add(table)
    alarms = [
        confidence.alarm(table[list(draws)].sum(0)) > 1
        for draws in itertools.product(range(4), repeat=4)
    ]
    assert np.mean(alarms) <= false_alarm


@share(0.1)
@given(seed=st.integers(0, 2**16))
def test_the_false_alarm_rate_of_long_runs(seed: int) -> None:
    """At δ = 0.2, one direction: 2000 runs of 200 steps; a failure by chance has odds of 1e-6.

    The bound is that of Markov's inequality: of a Gaussian's runs 3.2% are outside, not 20%.
    """
    table = outcomes(seed, 25, 1)
    confidence = Confidence(np.eye(1), np.cov(table.T, ddof=0).reshape(1, 1), 200, 0.2)
    confidence.add(table, 200)
    draws = np.random.default_rng(seed).integers(25, size=(REPETITIONS, 200))
    alarms = sum(confidence.alarm(total) > 1 for total in table[draws].sum(1))
    assert alarms <= binom.isf(1e-6, REPETITIONS, 0.2)
    assert alarms >= 1, "a bound that is never crossed says nothing"


@given(seed=st.integers(0, 2**16), decade=st.floats(-6.0, -1.0))
def test_the_bound_is_a_gaussians_chernoff_bound_in_long_runs(seed: int, decade: float) -> None:
    """√(2 log(2D/δ) Tv), with the third cumulant κ₃ as the remainder.

    log E exp(λξ) = λ²v/2 + λ³κ₃/6 + O(λ⁴), so that the bound is √(2LTv) + Lκ₃/(3v) + O(1/√T).
    """
    steps, false_alarm = 10**8, 10.0**decade
    table = outcomes(seed, 25, 2)
    S = np.cov(table.T, ddof=0)
    confidence = Confidence(np.eye(2), S, steps, false_alarm)
    confidence.add(table, steps)
    threshold, centred = math.log(4 / false_alarm), table - table.mean(0)
    v, third = np.diag(S), (centred**3).mean(0)
    leading = np.sqrt(2 * threshold * steps * v)
    skewed = threshold * third / (3 * v)
    # The next term is below λ³ E[ξ⁴] T / 24 with λ² = 2L / (Tv); twice it covers those after it.
    rest = 2 * (2 * threshold / v) ** 1.5 * (centred**4).mean(0) / 24 / math.sqrt(steps)
    # The sum of T logarithms of 1 + λ²v/2 loses eps of 1 each.
    lost = 4 * steps * np.finfo(float).eps / np.sqrt(2 * threshold / (steps * v))
    assert np.all(np.abs(confidence.upper - leading - skewed) <= rest + lost)
    assert np.all(np.abs(-confidence.lower - leading + skewed) <= rest + lost)
