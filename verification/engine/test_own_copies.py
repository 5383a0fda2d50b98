"""What is loaded is a copy, one example needs no batch, and another's parameters stay."""

import pytest
import torch
from torch import nn

import apo_core as apo
from verification.engine.scenes import Quadratic, scene, values
from verification.l1_values.kfac_cases import factors_of, observed
from verification.tolerances import BITWISE, assert_close


@pytest.mark.parametrize("rule", ["heavy ball", "adamw", "rmsprop"])
def test_a_loaded_state_shares_no_memory_with_its_source(rule: str) -> None:
    s, other = scene(rule), scene(rule)
    s.run(2)
    saved = s.optimizer.state_dict()
    other.optimizer.load_state_dict(saved)
    for tensors in saved["rule_state"].values():
        for t in tensors:
            t.fill_(torch.nan)
    held = [t for ts in other.optimizer.rule_state.values() for t in ts]
    assert held
    assert all(bool(t.isfinite().all()) for t in held)


@pytest.mark.parametrize("bias", [True, False])
def test_one_example_without_a_batch_dimension_is_a_batch_of_one(bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2, bias=bias, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    (alone,) = factors_of(observed(layer, lambda: layer(x).square().sum()))
    (batch,) = factors_of(observed(layer, lambda: layer(x[None]).square().sum()))
    assert_close(alone.A.numpy(), batch.A.numpy(), BITWISE)
    assert_close(alone.B.numpy(), batch.B.numpy(), BITWISE)


def test_what_the_meta_optimizer_holds_beside_phi_stays() -> None:
    """Its gradient is an older one, which a meta-step does not know."""
    model = Quadratic([1.0])
    rule = apo.rules.SGD(model, 0.1)
    other = nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    solver = torch.optim.SGD([*rule.parameters(), other], lr=0.1)
    optimizer = apo.APO(model, rule, apo.ProximalObjective(), solver)
    model.loss().backward()
    before = values(rule)
    optimizer.meta_step(loss=model.loss)
    assert other.tolist() == [1.0, 1.0]
    assert not all(map(torch.equal, before, values(rule)))


@pytest.mark.parametrize("warm", [0, 1, 2])
def test_the_step_after_the_last_of_the_warm_up_is_the_rules(warm: int) -> None:
    """J = ½θ² at 1: halved by each step of the base optimizer, then by a quarter by the rule's."""
    model = Quadratic([1.0])
    rule = apo.rules.SGD(model, 0.25)
    base = torch.optim.SGD(model.parameters(), 0.5)
    solver = torch.optim.SGD(rule.parameters(), 0.1)
    objective = apo.ProximalObjective()
    optimizer = apo.APO(model, rule, objective, solver, warmup=apo.Warmup(base, warm))
    ratios = []
    for _ in range(4):
        before = model.theta.item()
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
        ratios.append(model.theta.item() / before)
    # exp(log ¼) is ¼ to the rounding of log ¼.
    assert ratios == pytest.approx([0.5] * warm + [0.75] * (4 - warm), rel=1e-14)
