"""The whole of Algorithm 1, θ moving: the dense P* of Theorem 1 is the same wherever θ is."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import apo_core as apo
from reference.arrays import Array
from verification import bridge
from verification.l3_statistics.confidence import FALSE_ALARM, Confidence, pair_gradients
from verification.l3_statistics.populations import population
from verification.l3_statistics.running import Trial, runs, trial

META_STEPS, BURN_IN, INTERVAL = 1000, 250, 2


def train(case: Trial, seed: int, same_batch: bool) -> tuple[Array, Array]:
    """θ and P at each meta-step of Algorithm 1, (T + 1, n) and (T + 1, n²)."""
    problem, batches = case.population.problem, case.population.batches
    model = bridge.twin(problem.network, case.population.theta)
    rule = case.family.build(model, case.start)
    objective = apo.ProximalObjective(
        "squared_error", case.fsd_weight, case.wsd_weight, loss="linear"
    )
    optimizer = apo.APO(
        model, rule, objective, torch.optim.SGD(rule.parameters(), case.meta_lr), INTERVAL
    )
    losses = [bridge.loss_closure(problem, model, batch) for batch in batches]
    outputs = [bridge.outputs_closure(model, batch.inputs) for batch in batches]
    thetas, path = [], []
    draws = np.random.default_rng(seed).integers(len(batches), size=(INTERVAL * META_STEPS + 1, 2))
    for i, j in draws:
        optimizer.zero_grad()
        losses[i]().backward()
        if optimizer.meta_due:
            thetas.append(bridge.parameters_of(model, problem.network))
            path.append(case.family.read(rule))
            optimizer.meta_step(loss=losses[i], outputs=outputs[i if same_batch else j])
        optimizer.step()
    return np.array(thetas), np.array(path)


def judge(case: Trial, thetas: Array, path: Array) -> tuple[float, float, float]:
    """The alarm, ‖(P̄ − P*)C̄‖ / ‖P*C̄‖, and what that may be without alarm.

    E[ĝ_t | θ_t, P_t] = (MP_t − I)C_t with C_t = E[ggᵀ] at θ_t, so that P̄ = Σ P_t C_t (Σ C_t)⁻¹ has

        (P̄ − P*) Σ C_t = M⁻¹ [(P_0 − P_T) / α − N].
    """
    n, M, S = len(thetas[0]), case.M, case.optimum.S
    inverse = np.linalg.inv(M.mean((0, 1)))
    directions = np.vstack([np.kron(inverse, np.eye(n)), inverse.ravel()])
    steps = len(path) - 1
    confidence = Confidence(directions, S, steps, FALSE_ALARM)
    weighted, second = np.zeros((n, n)), np.zeros((n, n))
    G, g = case.population.curvatures, case.population.gradients
    for theta, phi in zip(thetas[:-1], path[:-1], strict=True):
        gradients = g + G @ (theta - case.population.theta)
        confidence.add(pair_gradients(case.family, phi, gradients, M))
        C = gradients.T @ gradients / len(gradients)
        weighted += phi.reshape(n, n) @ C
        second += C
    total = (path[0] - path[-1]) / case.meta_lr
    size = np.linalg.norm(inverse @ second)
    left = np.linalg.norm(inverse @ total.reshape(n, n))
    promised = left + np.linalg.norm(confidence.half_widths()[:-1])
    error = np.linalg.norm(weighted - inverse @ second)
    return confidence.alarm(total), float(error / size), float(promised / size)


@runs()
@given(seed=st.integers(0, 2**16), wsd_weight=st.floats(0.3, 1.0))
def test_algorithm_1_converges_to_the_damped_inverse(seed: int, wsd_weight: float) -> None:
    """K = 2, from P = η_0 I: θ goes to the minimum of J and keeps moving with every mini-batch."""
    case = trial("dense", population(seed), 1.0, wsd_weight)
    thetas, path = train(case, seed, same_batch=False)
    alarm, error, promised = judge(case, thetas[BURN_IN:], path[BURN_IN:])
    assert alarm <= 1
    assert error <= promised <= 0.5, f"{error:.3g}, promised {promised:.3g}"


def test_the_fsd_on_the_losss_mini_batch_raises_the_alarm() -> None:
    case = trial("dense", population(0, 0.4), 1.0, 0.3)
    thetas, path = train(case, 0, same_batch=True)
    alarm, _, _ = judge(case, thetas[BURN_IN:], path[BURN_IN:])
    assert alarm > 1
