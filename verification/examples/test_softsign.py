"""The README's rule conforms, and trains."""

import copy

import pytest
import torch
from torch import Tensor, nn

import apo_core as apo
import apo_core.testing
from verification.examples.softsign import Softsign


def linear(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_softsign_conforms(dtype: torch.dtype) -> None:
    model = linear(dtype)
    results = apo_core.testing.check_update_rule(Softsign, model)
    assert {name for name, result in results.items() if result.outcome == "skipped"} == {
        *("psd", "dense", "linear in phi", "optimum", "elementwise", "devices"),
        *("scale invariance", "scale equivariance", "rotation equivariance"),
    }


def test_softsign_trains_through_apo() -> None:
    """One meta-step moves both φ; 200 steps with them lower a quadratic loss by half at least."""
    model = linear()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(3, 2, generator=generator, dtype=torch.float64)

    def loss() -> Tensor:
        return 0.5 * (model(x) - y).square().sum(1).mean()

    rule = Softsign(model)
    phi = copy.deepcopy(rule.state_dict())
    meta = torch.optim.RMSprop(rule.parameters(), lr=0.1)
    optimizer = apo.APO(model, rule, apo.ProximalObjective("squared_error", 0.1), meta)
    start = float(loss().detach())
    for _ in range(200):
        optimizer.zero_grad()
        loss().backward()
        if optimizer.meta_due:
            optimizer.meta_step(loss=loss, outputs=lambda: model(x))
        optimizer.step()
    assert all(not torch.equal(phi[name], p) for name, p in rule.state_dict().items())
    assert float(loss().detach()) < 0.5 * start
