"""On a GPU: an ordinary step never makes the host wait, and the numbers are those of the CPU."""

from __future__ import annotations

import warnings

import pytest
import torch

from verification.engine.scenes import RULES, Scene, scene, values
from verification.tolerances import FUNCTION, assert_close

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that torch can use"
)


def on_gpu(rule: str, interval: int) -> Scene:
    """The scene with its model on the GPU, without dropout, whose draws differ there."""
    torch.backends.cuda.matmul.allow_tf32 = False
    s = scene(rule, interval=interval)
    s.model[3] = torch.nn.Identity()
    other = scene(rule, interval=interval, device="cuda")
    other.model[3] = torch.nn.Identity()
    other.x, other.y, other.x_other = (t.cuda() for t in (s.x, s.y, s.x_other))
    return other


@pytest.mark.parametrize("rule", RULES)
def test_an_ordinary_step_does_not_wait_for_the_device(rule: str) -> None:
    s = on_gpu(rule, interval=100)
    s.backward()
    s.meta_step()
    s.optimizer.step()  # first allocations, and the state
    s.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        s.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", RULES)
def test_a_run_is_that_of_the_cpu(rule: str) -> None:
    gpu, cpu = on_gpu(rule, interval=1), scene(rule, interval=1)
    cpu.model[3] = torch.nn.Identity()
    for s in (gpu, cpu):
        for _ in range(3):
            s.backward()
            s.meta_step()
            s.optimizer.step()
    for ours, theirs, what in (
        (values(gpu.model), values(cpu.model), "θ"),
        (values(gpu.optimizer.rule), values(cpu.optimizer.rule), "φ"),
    ):
        for a, b in zip(ours, theirs, strict=True):
            # Three steps with a pass there and back each, and three of a meta-step.
            assert_close(a.cpu().numpy(), b.numpy(), FUNCTION, size=36, iterations=36, what=what)


@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_that_is_not_finite_is_skipped_on_the_device(rule: str) -> None:
    s = on_gpu(rule, interval=100)
    s.backward()
    s.optimizer.step()
    s.backward()
    theta = values(s.model)
    first = next(s.model.parameters()).grad
    assert first is not None
    first.view(-1)[0] = torch.nan
    torch.cuda.set_sync_debug_mode("error")
    try:
        s.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, theta, s.model.parameters()))
    assert s.optimizer.skipped_steps == 1
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        s.backward()
        s.meta_step()
    assert "a step was skipped" in str(told[0].message)
