"""What is not finite reaches neither θ nor φ: it is skipped, counted, and told once."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import apo_core as apo
from apo_core.safety import choose_state, masked, norms_of
from verification.engine.scenes import RULES, Scene, scene, values

NOT_FINITE = [math.nan, math.inf]


@contextmanager
def unchanged(s: Scene) -> Iterator[None]:
    """θ, φ, the rule's state, the meta-optimizer's, buffers: bit for bit as before."""

    def everything() -> list[Tensor]:
        states = [s.optimizer.rule_state, *s.optimizer.meta_optimizer.state.values()]
        held = [
            v
            for state in states
            for vs in state.values()
            for v in (vs if isinstance(vs, list) else [vs])
        ]
        kept = [*s.model.parameters(), *s.model.buffers(), *s.optimizer.rule.parameters(), *held]
        return [torch.as_tensor(v).detach().clone() for v in kept]

    before = everything()
    yield
    after = everything()
    assert len(before) == len(after)
    assert all(map(torch.equal, before, after))


def spoil(s: Scene, value: float) -> None:
    """One entry of one gradient."""
    first = next(s.model.parameters()).grad
    assert first is not None
    first.view(-1)[0] = value


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("rule", RULES)
def test_a_non_finite_gradient_changes_nothing_and_the_run_goes_on(rule: str, value: float) -> None:
    s = scene(rule)
    s.run(3)
    twin = copy.deepcopy(s)
    s.backward()
    spoil(s, value)
    with unchanged(s):
        with pytest.warns(
            RuntimeWarning, match="a meta-step was skipped since the gradient of par"
        ):
            terms = s.meta_step()
        with pytest.warns(
            RuntimeWarning, match="a step was skipped since the gradient of parameter `0.w"
        ):
            s.optimizer.step()
    assert all(bool(torch.isnan(term)) for term in terms)
    assert (s.optimizer.skipped_steps, s.optimizer.skipped_meta_steps) == (1, 1)
    assert (s.optimizer.steps, s.optimizer.meta_steps) == (4, 2)
    # What came in between left no trace: both go on alike.
    s.optimizer.steps = 3
    for one in (s, twin):
        torch.manual_seed(1)
        one.run(3)
    assert all(map(torch.equal, values(s.model), values(twin.model)))
    assert all(map(torch.equal, values(s.optimizer.rule), values(twin.optimizer.rule)))


def test_only_the_first_is_told() -> None:
    s = scene("adamw", interval=1)
    s.backward()
    spoil(s, math.nan)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            s.meta_step()
            s.optimizer.step()
    assert len(told) == 2
    assert (s.optimizer.skipped_steps, s.optimizer.skipped_meta_steps) == (3, 3)
    shown = s.optimizer.diagnostics
    assert (shown["skipped_steps"], shown["skipped_meta_steps"]) == (3.0, 3.0)


def test_the_counters_are_saved() -> None:
    s = scene("adamw", interval=1)
    s.backward()
    spoil(s, math.nan)
    with pytest.warns(RuntimeWarning, match="a meta-step was skipped"):
        s.meta_step()
    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        s.optimizer.step()
    other = scene("adamw", interval=1)
    other.optimizer.load_state_dict(s.optimizer.state_dict())
    assert (other.optimizer.skipped_steps, other.optimizer.skipped_meta_steps) == (1, 1)


def test_a_nan_in_the_other_mini_batch() -> None:
    s = scene()
    s.backward()
    s.x_other[0, 0, 0, 0] = math.nan
    message = r"a meta-step was skipped since the FSD \(the outputs on the mini-batch B'\) was not"
    with unchanged(s), pytest.warns(RuntimeWarning, match=message):
        s.meta_step()
    assert s.optimizer.skipped_meta_steps == 1


def test_a_non_finite_update_of_a_finite_gradient() -> None:
    s = scene()
    s.backward()
    assert isinstance(s.optimizer.rule, apo.rules.SGD)
    with torch.no_grad():
        s.optimizer.rule.log_lr.fill_(800.0)
    with unchanged(s):
        with pytest.warns(
            RuntimeWarning, match="skipped since the update of parameter `0.weight` w"
        ):
            s.meta_step()
        with pytest.warns(
            RuntimeWarning, match="skipped since the update of parameter `0.weight` w"
        ):
            s.optimizer.step()


@pytest.mark.parametrize("solver", [torch.optim.LBFGS, torch.optim.RMSprop])
def test_an_infinite_meta_gradient_of_a_finite_q(
    solver: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
) -> None:
    """2√θ has an infinite slope where a learning rate of 1 leads to: from 1, with slope 1, to 0."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(1.0)
    rule = apo.rules.SGD(model, 1.0)
    optimizer = apo.APO(model, rule, apo.ProximalObjective(), solver(rule.parameters()))

    def loss() -> Tensor:
        return 2.0 * model.weight.sum().sqrt()

    loss().backward()
    before = rule.log_lr.detach().clone()
    with pytest.warns(RuntimeWarning, match="a meta-step was skipped since the meta-gradient was"):
        terms = optimizer.meta_step(loss=loss)
    assert terms.loss.item() == 0.0
    assert torch.equal(before, rule.log_lr)
    assert not optimizer.meta_optimizer.state


@pytest.mark.parametrize("without", [False, True])
def test_the_warm_up_skips_as_well(without: bool) -> None:
    """Also where another parameter has no gradient."""
    s = scene("heavy ball", warmup_steps=5)
    s.run(2)
    s.backward()
    spoil(s, math.inf)
    if without:
        list(s.model.parameters())[-1].grad = None
    with unchanged(s), pytest.warns(RuntimeWarning, match="a step was skipped since the gradient"):
        s.optimizer.step()
    assert s.optimizer.skipped_steps == 1
    s.run(2)
    assert all(bool(p.isfinite().all()) for p in s.model.parameters())


def test_a_bad_part_of_an_averaged_meta_gradient_is_left_out() -> None:
    s = scene()
    s.backward()
    s.optimizer.meta_optimizer.zero_grad()
    s.optimizer.meta_backward(loss=s.loss, outputs=s.outputs)
    (phi,) = s.optimizer.rule.parameters()
    assert phi.grad is not None
    before = phi.grad.clone()
    s.x_other[0, 0, 0, 0] = math.nan
    with pytest.warns(RuntimeWarning, match="a meta-step was skipped since the FSD"):
        s.optimizer.meta_backward(loss=s.loss, outputs=s.outputs)
    assert torch.equal(before, phi.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_finiteness_in_every_dtype(dtype: torch.dtype, value: float | None) -> None:
    """Also of 16-bit tensors whose norm leaves the 16-bit range, and beside empty ones."""
    tensors = [
        torch.full((40,), 60000.0, dtype=dtype),
        torch.zeros(0),
        torch.zeros((), dtype=dtype),
    ]
    if value is not None:
        tensors[2].fill_(value)
    assert bool(norms_of(tensors).isfinite().all()) == (value is None)


@pytest.mark.parametrize("finite", [True, False])
def test_on_a_device_the_choice_is_made_there(finite: bool) -> None:
    """On "meta", the one other device that is always there, a bool cannot be read at all."""
    flag = torch.tensor(finite, device="meta")
    updates = masked(flag, [torch.ones(2, device="meta")])
    state = {"m": [torch.ones(2, device="meta")]}
    assert updates[0].shape == (2,)
    assert choose_state(flag, state, state)["m"][0].device.type == "meta"
    with pytest.raises(RuntimeError):
        bool(flag)


def test_skipping_does_not_warn_where_all_is_finite() -> None:
    s = scene("ekfac")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s.run(6)
    assert (s.optimizer.skipped_steps, s.optimizer.skipped_meta_steps) == (0, 0)
