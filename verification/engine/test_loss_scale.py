"""A loss scale that is a power of two changes exponents alone, so no bit of a meta-step."""

from typing import Literal, TypeAlias

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import apo_core as apo

LossMode: TypeAlias = Literal["exact", "linear", "quadratic"]
FSDMode: TypeAlias = Literal["exact", "quadratic"]


@pytest.mark.parametrize("scale", [0.5, 2.0, 1024.0])
@pytest.mark.parametrize("loss_mode", ["exact", "linear", "quadratic"])
@pytest.mark.parametrize("fsd_mode", ["exact", "quadratic"])
def test_a_power_of_two_changes_no_bit(
    scale: float, loss_mode: LossMode, fsd_mode: FSDMode
) -> None:
    """1.0 takes another path than every other scale, and both must be the same one."""

    def phi_after(loss_scale: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        rule = apo.rules.SGD(model, lr=0.1)
        objective = apo.ProximalObjective("squared_error", 0.3, 0.1, loss=loss_mode, fsd=fsd_mode)
        solver = torch.optim.SGD(rule.parameters(), lr=1.0)
        optimizer = apo.APO(model, rule, objective, solver)
        mse_loss(model(x[:3]), x[:3, :1]).backward()
        optimizer.meta_step(
            loss=lambda: mse_loss(model(x[:3]), x[:3, :1]),
            outputs=lambda: model(x[3:]),
            loss_scale=loss_scale,
        )
        return rule.log_lr.detach().clone()

    assert torch.equal(phi_after(scale), phi_after(1.0))
