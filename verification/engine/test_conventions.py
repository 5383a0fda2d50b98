"""What users of `torch.optim` expect: copies, pickles, parameters without gradient, a log."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

import apo_core as apo
from verification.engine.scenes import RULES, Scene, scene, values


def go_on(s: Scene) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """θ and φ after three more steps, from the same random state."""
    torch.manual_seed(7)
    s.run(3)
    return values(s.model), values(s.optimizer.rule)


@pytest.mark.parametrize("rule", RULES)
def test_a_deep_copy_goes_on_by_itself(rule: str) -> None:
    """Both go on bit for bit alike, and neither moves the other's parameters."""
    first = scene(rule)
    first.run(3)
    second = copy.deepcopy(first)
    theta, phi = values(first.model), values(first.optimizer.rule)
    theirs = go_on(second)
    assert all(map(torch.equal, theta, first.model.parameters()))
    assert all(map(torch.equal, phi, first.optimizer.rule.parameters()))
    assert second.optimizer.model is second.model
    ours = go_on(first)
    for one, other in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("rule", ["nesterov", "ekfac", "any optimizer"])
def test_a_pickle_goes_on(rule: str) -> None:
    first = scene(rule)
    first.run(3)
    file = io.BytesIO()
    torch.save((first.model, first.optimizer), file)
    file.seek(0)
    model, optimizer = torch.load(file, weights_only=False)
    second = Scene(model, optimizer, first.x, first.y, first.x_other)
    for one, other in zip(go_on(first), go_on(second), strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("rule", RULES)
def test_a_parameter_without_gradient_stays_and_the_others_go_on(rule: str) -> None:
    """As in torch.optim: θ and its momentum stay; the meta-step looks ahead without it."""
    s = scene(rule)
    s.run(3)
    last = s.model[5]
    assert isinstance(last, nn.Linear)
    before = last.bias.detach().clone()
    index = [name for name, _ in s.model.named_parameters()].index("5.bias")
    state = {name: tensors[index].clone() for name, tensors in s.optimizer.rule_state.items()}
    others, phi = last.weight.detach().clone(), values(s.optimizer.rule)
    s.backward()
    last.bias.grad = None
    s.meta_step()
    s.optimizer.step()
    assert torch.equal(last.bias, before)
    after = s.optimizer.rule_state
    assert all(torch.equal(after[name][index], kept) for name, kept in state.items())
    assert not torch.equal(last.weight, others)
    assert not all(map(torch.equal, phi, s.optimizer.rule.parameters()))


def test_without_one_gradient_it_is_the_rule_on_the_others() -> None:
    """A frozen layer and a layer without gradient take the same part: none."""
    runs = []
    for frozen in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        model[0].requires_grad_(not frozen)
        rule = apo.rules.Adam(model)
        objective = apo.ProximalObjective("squared_error", 0.1, 0.1)
        optimizer = apo.APO(model, rule, objective, torch.optim.SGD(rule.parameters(), lr=0.1), 1)
        x = torch.randn(5, 3, dtype=torch.float64)
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            for p in model[0].parameters():
                p.grad = None
            optimizer.meta_step(
                loss=lambda model=model, x=x: model(x).square().mean(),
                outputs=lambda model=model, x=x: model(2.0 * x),
            )
            optimizer.step()
        runs.append([*values(model), *values(rule)])
    assert all(map(torch.equal, *runs))


def test_the_diagnostics_tell_q_the_counters_and_phi() -> None:
    s = scene("sgd per layer")
    shown = s.optimizer.diagnostics
    assert shown["steps"] == shown["meta_steps"] == 0.0
    assert "loss" not in shown
    s.backward()
    log_lr = s.optimizer.rule.get_parameter("log_lr")
    terms = s.meta_step()
    shown = s.optimizer.diagnostics
    assert shown["meta_steps"] == 1.0
    assert [shown[name] for name in ("loss", "fsd", "wsd", "q")] == [
        float(value) for value in (*terms, terms.total)
    ]
    assert log_lr.grad is not None
    assert shown["meta_gradient_norm"] == pytest.approx(float(log_lr.grad.norm()), rel=1e-6)
    assert shown["phi.log_lr.min"] == pytest.approx(float(log_lr.detach().min()), rel=1e-6)
    assert shown["phi.log_lr.min"] <= shown["phi.log_lr.mean"] <= shown["phi.log_lr.max"]
    assert shown.pop("trust_radius") == math.inf
    assert all(isinstance(value, float) and math.isfinite(value) for value in shown.values())
