"""The φ that a search for the amortization gap returns is where it met its least value."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import apo_core as apo
from apo_core.amortization import ROUND
from verification.engine.scenes import Quadratic
from verification.tolerances import FUNCTION, assert_close


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_the_objective_at_the_returned_phi_is_the_least_one_met(steps: int) -> None:
    """100 θ² with a wall at θ' = 0.4, behind which the last trials end: Q = 100 (0.9 − 180 η)²."""
    model = Quadratic([1.0])
    with torch.no_grad():
        model.theta.fill_(0.9)
    seen: list[float] = []

    def loss() -> Tensor:
        square = 100.0 * model.theta.square().sum()
        value = torch.where(model.theta.sum() > 0.4, square, torch.inf)
        seen.append(float(value.detach()))
        return value

    rule = apo.rules.SGD(model, 1e-3)
    solver = torch.optim.SGD(rule.parameters(), lr=0.1)
    optimizer = apo.APO(model, rule, apo.ProximalObjective(), solver)
    objective = optimizer.objective
    found = apo.amortization_gap(optimizer, [(loss, None)], steps=steps, objective=objective)
    ahead = 0.9 - 180.0 * math.exp(float(found.phi["log_lr"]))
    # θ' is a difference of two numbers of its size, of which one passes an exponential.
    condition = 4.0 * 0.9 / ahead
    assert_close(np.array(found.best), np.array(100.0 * ahead**2), FUNCTION, condition=condition)
    assert found.best == min(seen)
    assert found.best < found.q
    assert not any(value.requires_grad for value in found.phi.values())


@pytest.mark.parametrize("exponent", [-40, -10, 0, 40])
def test_a_search_is_the_same_in_another_unit_of_the_loss(exponent: int) -> None:
    """Q̂(η) = −η c² + ½ c η² c² for a loss ½ c θ² at θ = 1 and λ_WSD = c: least at η = 1/c, −c/2.

    One step does not reach it, and says so.
    """
    c = 2.0**exponent
    model = Quadratic([c])
    rule = apo.rules.SGD(model, 0.3 / c)
    solver = torch.optim.SGD(rule.parameters(), lr=0.1)
    optimizer = apo.APO(model, rule, apo.ProximalObjective(wsd_weight=c), solver)
    one = apo.amortization_gap(optimizer, [(model.loss, None)], steps=1)
    all_of_it = apo.amortization_gap(optimizer, [(model.loss, None)])
    assert not one.converged
    assert -0.5 * c < one.best < one.q
    if exponent < -10:  # torch's L-BFGS learns no curvature from y·s below 1e-10, and goes nowhere
        assert not all_of_it.converged
        return
    assert all_of_it.converged
    # Q̂ is a difference of terms of up to c, each of three products.
    assert_close(np.array(all_of_it.best), np.array(-0.5 * c), FUNCTION, size=4, scale=c)


def test_a_fall_within_rounding_is_convergence() -> None:
    """Q̂ = −η + ½ η² at η = 1 + 2e-8 is ½ (2e-8)² = 2e-16 above its minimum: less than eps · 1.5."""
    model = Quadratic([1.0])
    rule = apo.rules.SGD(model, 1.0 + 2e-8)
    solver = torch.optim.SGD(rule.parameters(), lr=0.1)
    optimizer = apo.APO(model, rule, apo.ProximalObjective(wsd_weight=1.0), solver)
    found = apo.amortization_gap(optimizer, [(model.loss, None)], steps=1)
    assert 0.0 < found.gap < 1.5 * np.finfo(float).eps
    assert found.converged


def test_all_rounds_together_have_no_more_iterations_than_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each round asks L-BFGS for what is left, of an objective that falls a little at each."""
    asked: list[int] = []
    solver = torch.optim.LBFGS

    def recording(params: list[Tensor], max_iter: int, **options: Any) -> torch.optim.LBFGS:
        asked.append(max_iter)
        return solver(params, max_iter=1, **options)

    monkeypatch.setattr(torch.optim, "LBFGS", recording)
    model = Quadratic([1.0])
    rule = apo.rules.SGD(model, 1e-6)
    meta_optimizer = torch.optim.SGD(rule.parameters(), lr=0.1)
    objective = apo.ProximalObjective(wsd_weight=1.0)
    optimizer = apo.APO(model, rule, objective, meta_optimizer)
    apo.amortization_gap(optimizer, [(model.loss, None)], steps=ROUND + 7)
    assert asked == [ROUND, 7]
