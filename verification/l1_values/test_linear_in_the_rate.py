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
def test_the_unit_of_the_parameters_does_not_matter(unit: float) -> None:
    """A step of a third of θ: its rounding is that of θ, its square is seen."""
    model = Quadratic([1.0, 1.0, 1.0])
    with torch.no_grad():
        model.theta.copy_(unit * torch.tensor([1.0, 0.7, -0.3], dtype=torch.float64))

    def meta_step(power: int) -> None:
        rule = apo.rules.LearningRate(model, PowerOfRate(model.parameters(), 0.3, power))
        solver = torch.optim.SGD(rule.parameters(), lr=0.1)
        optimizer = apo.APO(model, rule, apo.ProximalObjective(), solver)
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.meta_step(loss=model.loss)

    meta_step(1)
    with pytest.raises(RuntimeError, match="linear"):
        meta_step(2)
