"""What else of torch moves an optimizer: schedulers, weight averages, hooks, GradScaler."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

import apo_core as apo
from verification.engine.scenes import scene, values
from verification.tolerances import ROUNDING, assert_close

SCHEDULERS: dict[str, Callable[[Optimizer], lr_scheduler.LRScheduler]] = {
    "step": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "warm-up": lambda o: lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=3),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0 / (1 + t)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=1.0, total_steps=8, cycle_momentum=False
    ),
    "average": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=4),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_scales_the_step_and_not_the_lookahead(name: str) -> None:
    """θ moves by `update_scale` · Δ at every step; a meta-step's Q does not depend on it."""
    s, twin = scene(interval=100), scene(interval=100)
    schedule = SCHEDULERS[name](s.optimizer)
    scales = []
    for _ in range(4):
        for one in (s, twin):
            torch.manual_seed(2)
            one.backward()
        torch.manual_seed(3)
        terms = s.meta_step()
        torch.manual_seed(3)
        unscaled = twin.meta_step()
        assert all(map(torch.equal, terms, unscaled))
        before = torch.cat([p.detach().flatten() for p in s.model.parameters()])
        scales.append(s.optimizer.update_scale)
        for one in (s, twin):
            one.optimizer.step()
        after, whole = (
            torch.cat([p.detach().flatten() for p in one.model.parameters()]) for one in (s, twin)
        )
        expected = before + scales[-1] * (whole - before)
        assert_close(after.numpy(), expected.numpy(), ROUNDING, size=2, what="θ")
        schedule.step()
        twin.model.load_state_dict(s.model.state_dict())
    assert len(set(scales)) > 1, "the schedule must have moved the scale"


def test_a_plateau_is_seen() -> None:
    s = scene()
    schedule = lr_scheduler.ReduceLROnPlateau(s.optimizer, factor=0.5, patience=0)
    for _ in range(3):
        s.run(1)
        schedule.step(1.0)
    assert s.optimizer.update_scale == 0.25


def test_a_schedule_is_saved_with_the_run() -> None:
    s = scene(update_scale=0.8)
    schedule = lr_scheduler.ExponentialLR(s.optimizer, 0.5)
    s.run(1)
    schedule.step()
    other = scene(update_scale=0.8)
    other.optimizer.load_state_dict(copy.deepcopy(s.optimizer.state_dict()))
    assert other.optimizer.update_scale == 0.4


def test_weights_are_averaged_and_batch_norm_is_updated() -> None:
    s = scene()
    average = swa_utils.AveragedModel(s.model)
    seen = []
    for _ in range(3):
        s.run(1)
        average.update_parameters(s.model)
        seen.append(torch.cat([p.detach().flatten() for p in s.model.parameters()]))
    mean = torch.cat([p.detach().flatten() for p in average.module.parameters()])
    expected = torch.stack(seen).mean(0)
    assert_close(mean.numpy(), expected.numpy(), ROUNDING, size=3, iterations=3, what="mean of θ")
    swa_utils.update_bn([s.x], average)
    norm = average.module.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 1


def test_hooks_run() -> None:
    s = scene(interval=1)
    calls: list[str] = []
    o = s.optimizer
    o.register_step_pre_hook(lambda *_: calls.append("before"))
    o.register_step_post_hook(lambda *_: calls.append("after"))
    o.register_state_dict_post_hook(lambda _, saved: calls.append("saved"))
    o.register_load_state_dict_pre_hook(lambda *_: calls.append("loading"))
    s.run(2)
    assert calls == ["before", "after"] * 2, "a meta-step is no step"
    o.load_state_dict(o.state_dict())
    assert calls[4:] == ["saved", "loading"]


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_are_cleared(to_none: bool) -> None:
    s = scene()
    s.backward()
    s.optimizer.zero_grad(set_to_none=to_none)
    grads = [p.grad for p in s.model.parameters()]
    if to_none:
        assert grads == [None] * len(grads)
    else:
        assert all(g is not None and not g.any() for g in grads)


def scaled_run(infinite_at: int | None, enabled: bool = True) -> tuple[apo.APO, list[Tensor]]:
    """Six steps with a GradScaler, one of them perhaps on a mini-batch that has an infinity."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    rule = apo.rules.SGD(model, 0.1, momentum=0.9)
    optimizer = apo.APO(
        model,
        rule,
        apo.ProximalObjective("squared_error", 0.1, 0.1),
        torch.optim.SGD(rule.parameters(), lr=0.1),
        interval=1,
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100, enabled=enabled)
    x, y, other = torch.randn(3, 6, 8, 3)
    for t in range(6):
        inputs = x[t].clone()
        if t == infinite_at:
            inputs[0, 0] = math.inf
        target = y[t, :, :2]

        def loss(inputs: Tensor = inputs, target: Tensor = target) -> Tensor:
            return (model(inputs) - target).square().mean()

        optimizer.zero_grad()
        scaler.scale(loss()).backward()
        scaler.unscale_(optimizer)
        optimizer.meta_step(
            loss=loss, outputs=lambda t=t: model(other[t]), loss_scale=scaler.get_scale()
        )
        scaler.step(optimizer)
        scaler.update()
    return optimizer, [*values(model), *values(rule)]


def test_a_grad_scaler_changes_nothing_but_the_range() -> None:
    """Powers of two scale exactly: with and without the scaler, bit for bit."""
    with_scaler, without = scaled_run(None), scaled_run(None, enabled=False)
    assert all(map(torch.equal, with_scaler[1], without[1]))
    assert with_scaler[0].steps == 6


def test_a_grad_scaler_skips_one_infinite_mini_batch() -> None:
    with pytest.warns(RuntimeWarning, match="a meta-step was skipped since the gradient of"):
        optimizer, end = scaled_run(2)
    assert all(bool(t.isfinite().all()) for t in end)
    assert optimizer.steps == 5, "the scaler does not call step()"
    assert (optimizer.skipped_steps, optimizer.skipped_meta_steps) == (0, 1)
    assert optimizer.meta_steps == 5
