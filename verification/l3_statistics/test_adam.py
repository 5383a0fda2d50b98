"""Adam as the meta-optimizer does not converge to P*: its fixed point is where E[m/√v] = 0.

The scalar rule on one parameter, |g| = 1 and λ_WSD = 0: with B' = j, dQ/dφ = η (ηλa_j − 1) for
φ = log η and G_j = a_j. SGD finds η* = 1 / (λ E a). Adam divides by √v, which knows how large the
last gradients were, and so gives rare large ones less weight.

To first order in 1 − β₂ and for small steps, at φ*, E[m/√v] = −½ a E[ĝ³] / E[ĝ²]^{3/2} with
a = (1 − β₁)(1 − β₂) / (1 − β₁β₂): φ is off by ½ a E[ĝ³] / (E[ĝ²] H). For the a_j below that is
0.1% of η with Adam's (0.9, 0.999), 1.1% with RMSprop's 0.99 and 11% with (0, 0.9); for (0, 0) the
fixed point is the median of the rates 1 / (λa_j), here four times η*.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import apo_core as apo
from reference.arrays import Array
from reference.losses import SquaredError
from reference.networks import FixedHead
from reference.problem import Batch, Problem
from verification import bridge
from verification.l3_statistics.confidence import FALSE_ALARM, Confidence, pair_gradients
from verification.l3_statistics.populations import Population
from verification.l3_statistics.running import runs, trial
from verification.tolerances import FUNCTION, assert_close

CURVATURES = np.array([0.25, 0.25, 0.25, 0.25, 4.0])  # a_j; E a = 1, so that log η* = 0
SEEDS = st.integers(0, 2**16)


def skewed() -> Population:
    """One example in each mini-batch, with x² = a_j and ∇J = 1 at θ = 0."""
    x = np.sqrt(CURVATURES)
    batches = [Batch(np.array([[v]]), np.array([[-1.0 / v]])) for v in x]
    return Population(Problem(FixedHead([[[1.0]]], [1]), SquaredError()), np.zeros(1), batches)


def engine(draws: Array, lrs: Array, betas: tuple[float, float], start: float) -> Array:
    """φ_0, ..., φ_T with torch's Adam at the learning rates `lrs` (T,), and ĝ_t; (2, T + 1)."""
    population = skewed()
    model = bridge.twin(population.problem.network, population.theta)
    rule = apo.rules.SGD(model, math.exp(start))
    objective = apo.ProximalObjective("squared_error", 1.0, loss="linear")
    adam = torch.optim.Adam(rule.parameters(), betas=betas)
    optimizer = apo.APO(model, rule, objective, adam)
    losses = [bridge.loss_closure(population.problem, model, b) for b in population.batches]
    outputs = [bridge.outputs_closure(model, b.inputs) for b in population.batches]
    path = []
    for (i, j), lr in zip(draws, lrs, strict=True):
        adam.param_groups[0]["lr"] = lr
        model.zero_grad()
        losses[i]().backward()
        before = rule.log_lr.item()
        optimizer.meta_step(loss=losses[i], outputs=outputs[j])
        path.append((before, float(bridge.phi_gradient(rule.log_lr))))
    return np.array([*path, (rule.log_lr.item(), math.nan)]).T


def twin(others: Array, lrs: Array, betas: tuple[float, float], start: float) -> Array:
    """φ_0, ..., φ_T of Adam as in its paper, for many runs at once: B' is (runs, T)."""
    phi = np.full(len(others), start)
    m, v, path = np.zeros_like(phi), np.zeros_like(phi), [phi]
    for t, (j, lr) in enumerate(zip(others.T, lrs, strict=True), start=1):
        gradient = np.exp(phi) * (np.exp(phi) * CURVATURES[j] - 1.0)
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient**2
        step = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + 1e-8)
        phi = phi - lr * step
        path.append(phi)
    return np.array(path).T


@runs()
@given(seed=SEEDS)
def test_without_memory_it_finds_the_median_of_the_mini_batches_rates(seed: int) -> None:
    """β = (0, 0): φ moves by ±α, upwards with probability 4/5 while η < 4, and down above 4.

    After T = 300 steps from log η = 0 it is within 13α of log 4. If it got there, it is k steps
    below with probability at most 4⁻ᵏ, as for the supremum of a walk of steps +1 and −1 with odds
    1 to 4: 4⁻¹² = 6e-8. Not to get there takes fewer than 164 ups of 300, where 240 are expected:
    at most exp(−2 · 76² / 300) = 2e-17 by Hoeffding's inequality. SGD ends at η* = 1.
    """
    draws = np.random.default_rng(seed).integers(5, size=(300, 2))
    path, _ = engine(draws, np.full(300, 0.05), (0.0, 0.0), 0.0)
    assert abs(path[-1] - math.log(4.0)) <= 13 * 0.05


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.0, 0.0)])
@runs()
@given(seed=SEEDS)
def test_the_path_of_phi_is_that_of_adam_by_hand(betas: tuple[float, float], seed: int) -> None:
    """100 meta-steps on the same draws; rounding may flip no sign, which alone counts at (0, 0).

    An Adam step is at most a few α, so that an error of φ grows by less than 1 + α dE/dφ ≤ 2 a step
    where it is not damped; it is damped, and the sum of 100 roundings is left.
    """
    draws = np.random.default_rng(seed).integers(5, size=(100, 2))
    lrs = 0.03 / np.sqrt(1 + np.arange(100))
    path, _ = engine(draws, lrs, betas, 0.1)
    expected = twin(draws[None, :, 1], lrs, betas, 0.1)[0]
    assert_close(path, expected, FUNCTION, iterations=100, size=4, scale=1.0, what="φ_t")


@runs()
@given(seed=SEEDS)
def test_with_a_falling_rate_it_ends_near_p_star(seed: int) -> None:
    """β = (0.9, 0.999), α_t = 0.2 / √t, T = 1500: φ̄ is off by no more than is known, and noise.

    φ̄ − φ* = H⁻¹ [Σ ĝ − Σ r − N] / T as with SGD, but that Σ ĝ does not telescope: it is read from
    φ's `.grad`, and what is not noise in it is the start, and Adam's own shift.
    """
    steps, burn_in = 1500, 375
    case = trial("scalar", skewed(), 1.0, 0.0)
    draws = np.random.default_rng(seed).integers(5, size=(steps, 2))
    lrs = 0.2 / np.sqrt(1 + np.arange(steps))
    path, gradients = engine(draws, lrs, (0.9, 0.999), -1.0)
    best, kept = case.optimum, steps - burn_in
    confidence = Confidence(np.linalg.inv(best.H), best.S, kept, FALSE_ALARM)
    curved = 0.0
    for phi in path[burn_in:-1]:
        pairs = pair_gradients(case.family, np.array([phi]), case.population.gradients, case.M)
        curved += float(confidence.add(pairs)[0] - best.H[0, 0] * phi)
    total = gradients[burn_in:-1].sum()
    assert confidence.alarm(np.array([total])) <= 1
    error = path[burn_in:-1].mean()
    half_width = float(confidence.half_widths()[0]) / kept
    assert abs(error - (total - curved) / best.H[0, 0] / kept) <= half_width
    assert half_width <= 0.3, "5.4 standard deviations of 1.5 / √1125, and the skewness"


def test_the_skewness_decides_how_far_it_ends_from_p_star() -> None:
    """1000 runs by hand, small constant α: at β₂ = 0.9 η ends above η*, and above (0.9, 0.999).

    Means of 1000 runs, 5.4 standard errors apart: a false-alarm rate below 1e-6. Here log η ends at
    0.120 ± 0.002 with (0, 0.9), where the first order in 1 − β₂ is 0.1125, and at -0.002 ± 0.001.
    """
    others = np.random.default_rng(0).integers(5, size=(1000, 1500))
    low, high = {}, {}
    for betas in ((0.0, 0.9), (0.9, 0.999)):
        phi = twin(others, np.full(1500, 0.005), betas, 0.0)[:, 500:].mean(1)
        margin = 5.4 * phi.std() / math.sqrt(len(phi))
        low[betas], high[betas] = phi.mean() - margin, phi.mean() + margin
    assert low[0.0, 0.9] > max(0.0, high[0.9, 0.999]), f"{low}, {high}"
