"""Whether a step is linear in the learning rate is judged beside the rounding of θ, in any unit."""

from collections.abc import Callable
from typing import Any, final

import pytest
import torch

import apo_core as apo
from verification.engine.scenes import Quadratic


@final
class PowerOfRate(torch.optim.Optimizer):
    """θ ← θ − ηᵏ g."""

    def __init__(self, params: Any, lr: float, power: int) -> None:
        super().__init__(params, {"lr": lr, "power": power})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step."""
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] ** group["power"] * p.grad


@pytest.mark.parametrize("unit", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize("lr", [0.3, 3.0])
def test_the_unit_of_the_parameters_does_not_matter(lr: float, unit: float) -> None:
    """A step of a third of θ, or of three: its rounding is that of θ + Δ, its square is seen."""
    model = Quadratic([1.0, 1.0, 1.0])
    with torch.no_grad():
        model.theta.copy_(unit * torch.tensor([1.0, 0.7, -0.3], dtype=torch.float64))

    def meta_step(power: int) -> None:
        rule = apo.rules.LearningRate(model, PowerOfRate(model.parameters(), lr, power))
        solver = torch.optim.SGD(rule.parameters(), lr=0.1)
        optimizer = apo.APO(model, rule, apo.ProximalObjective(), solver)
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.meta_step(loss=model.loss)

    meta_step(1)
    with pytest.raises(RuntimeError, match="linear"):
        meta_step(2)


@final
class Counting(torch.optim.Optimizer):
    """θ ← θ − η g, with a count under a name with dots."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step."""
        for group in self.param_groups:
            for p in group["params"]:
                count = self.state[p].get("of.all.steps", 0)
                self.state[p]["of.all.steps"] = count + 1
                p -= group["lr"] * p.grad


def test_a_state_may_have_dots_in_its_names() -> None:
    model = Quadratic([1.0])
    rule = apo.rules.LearningRate(model, Counting(model.parameters(), 0.3))
    solver = torch.optim.SGD(rule.parameters(), lr=0.1)
    optimizer = apo.APO(model, rule, apo.ProximalObjective(), solver)
    for _ in range(3):
        model.theta.grad = torch.ones_like(model.theta)
        optimizer.step()
    (held,) = optimizer.rule_state.values()
    assert [int(t) for t in held] == [3]
    assert [t.dtype for t in held] == [torch.int64]
