"""The φ that a search for the amortization gap returns is where it met its least value."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import apo_core as apo
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


@pytest.mark.parametrize("exponent", [-10, 0, 40])
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
    assert [one.converged, all_of_it.converged] == [False, True]
    assert -0.5 * c < one.best < one.q
    # Q̂ is a difference of terms of up to c, each of three products.
    assert_close(np.array(all_of_it.best), np.array(-0.5 * c), FUNCTION, size=4, scale=c)
