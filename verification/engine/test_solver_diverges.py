"""A solver of φ that leaves the numbers after a sound start is put back, and starts afresh."""

import pytest
import torch

import apo_core as apo
from verification.engine.scenes import Quadratic
from verification.tolerances import BITWISE, ROUNDING, assert_close


def of_step(lr: float) -> tuple[Quadratic, apo.APO]:
    """J = ½·2·θ² at θ = 1 under SGD, whose log η is solved for by L-BFGS with step length `lr`."""
    model = Quadratic([2.0])
    rule = apo.rules.SGD(model, 0.1)
    solver = torch.optim.LBFGS(rule.parameters(), lr=lr)
    return model, apo.APO(model, rule, apo.ProximalObjective(), solver)


def test_a_solver_that_overflows_after_a_finite_start_leaves_no_trace() -> None:
    """Its first step takes log η beyond 709; then a solver of sound steps goes on as a new one."""
    model, optimizer = of_step(1e4)
    model.loss().backward()
    with pytest.warns(RuntimeWarning, match="a meta-step was skipped since the update of param"):
        terms = optimizer.meta_step(loss=model.loss)
    # Q at the first look: J(θ − 0.1 · 2θ) = 0.8² J(θ).
    assert_close(terms.loss.numpy(), 0.64 * model.loss().detach().numpy(), ROUNDING)
    assert (optimizer.meta_steps, optimizer.skipped_meta_steps) == (0, 1)
    assert not optimizer.meta_optimizer.state

    twin_model, twin = of_step(1.0)
    twin_model.loss().backward()
    optimizer.meta_optimizer.param_groups[0]["lr"] = 1.0
    for m, o in ((model, optimizer), (twin_model, twin)):
        o.meta_step(loss=m.loss)
        o.step()
    assert_close(model.theta.detach().numpy(), twin_model.theta.detach().numpy(), BITWISE)
    assert (optimizer.meta_steps, optimizer.skipped_meta_steps) == (1, 1)
