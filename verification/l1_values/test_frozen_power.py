"""RMSprop with a frozen exponent ρ, which ½ alone makes a square root."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import apo_core as apo
from verification.engine.scenes import Quadratic
from verification.tolerances import FUNCTION, assert_close


@pytest.mark.parametrize("rho", [0.25, 0.5, 1.0])
@given(g=st.floats(0.1, 10.0))
def test_a_step_divides_by_the_power_of_the_mean_square(rho: float, g: float) -> None:
    """θ' = θ − η g / (sᵖ + ε) with s = (1 − β) g² at the first step."""
    model = Quadratic([1.0])
    rule = apo.rules.RMSprop(model, 0.1, smoothing=0.9, rho=rho, eps=1e-3)
    solver = torch.optim.SGD(rule.parameters(), 0.1)
    optimizer = apo.APO(model, rule, apo.ProximalObjective(), solver)
    model.theta.grad = torch.tensor([g], dtype=torch.float64)
    optimizer.step()
    s = (1.0 - 0.9) * g**2
    expected = np.array([1.0 - 0.1 * g / (s**rho + 1e-3)])
    scale = 1.0 + 0.1 * g / s**rho
    assert_close(model.theta.detach().numpy(), expected, FUNCTION, iterations=2, scale=scale)


@pytest.mark.parametrize("learn", [("lr",), ("lr", "rho")])
def test_a_square_that_underflows_leaves_the_damping_alone(learn: tuple[str, ...]) -> None:
    """g = 1e-170, g² = 0: Δ = −η g / ε, whether ρ is learned or not; η makes it a usual number."""
    model = Quadratic([1.0])
    rule = apo.rules.RMSprop(model, 1e170, rho=0.3, eps=1e-3, learn=learn)
    g = torch.tensor([1e-170], dtype=torch.float64)
    theta = model.theta.detach()
    updates, _ = rule([theta], [g], rule.init_state([theta]))
    # η = exp(log η) has the rounding of log η = 391.
    assert_close(updates[0].detach().numpy(), np.array([-1e3]), FUNCTION, condition=400.0)


def test_no_derivative_sees_the_logarithm_of_a_mean_square_of_zero() -> None:
    """dΔ/dlog ρ = 0 at s = 0, and so is the next one: sᵖ log s is 0 there, and no 0 · (−∞)."""
    model = Quadratic([1.0])
    rule = apo.rules.RMSprop(model, 0.1, rho=0.3, eps=1e-3, learn=("lr", "rho"))
    theta, zero = model.theta.detach(), torch.zeros(1, dtype=torch.float64)
    (updates, *_), _ = rule([theta], [zero], rule.init_state([theta]))
    log_rho = rule.get_parameter("log_rho")
    (slope,) = torch.autograd.grad(updates.sum(), log_rho, create_graph=True)
    (bend,) = torch.autograd.grad(slope, log_rho)
    assert [slope.item(), bend.item()] == [0.0, 0.0]
