"""dQ/dφ without a graph through the network is TorchOpt's, which unrolls one step with it.

TorchOpt takes g anew with a graph, steps with a learning rate that has one, and differentiates
through both. Its networks hold what it stepped to, so that Q is formed by ordinary passes.

symbol   meaning
μ        momentum
t        steps before the one that is unrolled; their state is fixed, as in P22 footnote 1
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import apo_core as apo
from verification.differential.networks import NETWORKS, Task, amplification, task
from verification.profiles import share
from verification.tolerances import FUNCTION, assert_close

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of what it was compiled with
    torchopt: Any = pytest.importorskip(
        "torchopt", reason="TorchOpt is not installed: the extra `peers` has it"
    )

LR, FSD, WSD = 0.05, 0.3, 0.1
EPS = 1e-2  # far from 0, where the first step of Adam is a sign

Build = Callable[[nn.Module], apo.UpdateRule]
Peer = Callable[[nn.Module, Tensor], Any]
RULES: dict[str, tuple[Build, Peer]] = {
    "SGD": (
        lambda model: apo.rules.SGD(model, LR),
        lambda model, lr: torchopt.MetaSGD(model, lr=lr),
    ),
    "heavy ball": (
        lambda model: apo.rules.SGD(model, LR, momentum=0.9, lookahead_momentum=True),
        lambda model, lr: torchopt.MetaSGD(model, lr=lr, momentum=0.9),
    ),
    "Nesterov": (
        lambda model: apo.rules.SGD(
            model, LR, momentum=0.9, nesterov=True, lookahead_momentum=True
        ),
        lambda model, lr: torchopt.MetaSGD(model, lr=lr, momentum=0.9, nesterov=True),
    ),
    "RMSprop": (
        lambda model: apo.rules.RMSprop(model, LR, 0.9, eps=EPS),
        lambda model, lr: torchopt.MetaRMSProp(model, lr=lr, alpha=0.9, eps=EPS),
    ),
    "Adam": (
        lambda model: apo.rules.Adam(model, LR, (0.8, 0.9), EPS),
        lambda model, lr: torchopt.MetaAdam(model, lr=lr, betas=(0.8, 0.9), eps=EPS),
    ),
    "AdamW": (
        lambda model: apo.rules.Adam(model, LR, (0.8, 0.9), EPS, weight_decay=0.1),
        lambda model, lr: torchopt.MetaAdamW(
            model, lr=lr, betas=(0.8, 0.9), eps=EPS, weight_decay=0.1
        ),
    ),
}


ELEMENTARY = ("SGD", "heavy ball", "Nesterov")


def kl(ahead: Tensor, now: Tensor) -> Tensor:
    """KL(softmax(ahead) ‖ softmax(now)), averaged over the mini-batch, ()."""
    ahead, now = ahead.log_softmax(1), now.log_softmax(1)
    return (ahead.exp() * (ahead - now)).sum(1).mean()


@contextmanager
def float64_by_default() -> Iterator[None]:
    """TorchOpt's β ** t of an integer tensor t is in the default dtype, which is float32 else."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@float64_by_default()
def unrolled(t: Task, x_other: Tensor, build: Peer, steps: int) -> tuple[float, float]:
    """Q and dQ/d log η by TorchOpt, at the last of `steps` + 1 steps."""
    model = copy.deepcopy(t.model)
    log_lr = torch.tensor(math.log(LR), dtype=torch.float64, requires_grad=True)
    optimizer = build(model, log_lr.exp())
    for _ in range(steps):
        optimizer.step(cross_entropy(model(t.x), t.y))
        torchopt.stop_gradient(model)
        torchopt.stop_gradient(optimizer)
    theta = [p.detach().clone() for p in model.parameters()]
    now = model(x_other).detach()
    optimizer.step(cross_entropy(model(t.x), t.y))
    moved = sum((p - q).square().sum() for p, q in zip(model.parameters(), theta, strict=True))
    Q = cross_entropy(model(t.x), t.y) + FSD * kl(model(x_other), now) + 0.5 * WSD * moved
    (slope,) = torch.autograd.grad(Q, log_lr)
    return float(Q.detach()), float(slope)


def first_order(t: Task, x_other: Tensor, build: Build, steps: int) -> tuple[float, Tensor]:
    """The same by APO, and ∇_θ' of its terms is never formed through a graph of the step."""
    model = copy.deepcopy(t.model)
    rule = build(model)
    meta_optimizer = torch.optim.SGD(rule.parameters(), lr=0.0)
    objective = apo.ProximalObjective("kl", FSD, WSD)
    optimizer = apo.APO(model, rule, objective, meta_optimizer)
    for step in range(steps + 1):
        optimizer.zero_grad()
        cross_entropy(model(t.x), t.y).backward()
        if step < steps:
            optimizer.step()
    terms = optimizer.meta_backward(
        loss=lambda: cross_entropy(model(t.x), t.y), outputs=lambda: model(x_other)
    )
    slope = dict(rule.named_parameters())["log_lr"].grad
    assert slope is not None
    return float(terms.total), slope


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 2**16))
@share(0.1)
def test_the_meta_gradient_of_one_unrolled_step(
    rule: str, steps: int, name: str, seed: int
) -> None:
    t = task(name, seed)
    x_other = torch.randn(t.x.shape, generator=torch.Generator().manual_seed(seed)).double()
    ours, theirs = RULES[rule]
    q, slope = first_order(t, x_other, ours, steps)
    expected_q, expected = unrolled(t, x_other, theirs, steps)
    # All sums behind an entry are over at most 10 weights or 6 examples. Each step is a pass
    # forward and backward, and so is Q; the slope of η g / (√v + ε) is at most η / ε.
    close = {
        "condition": amplification(t.model) * (1.0 if rule in ELEMENTARY else LR / EPS),
        "size": 10,
        "iterations": 2 * (steps + 2),
    }
    assert_close(q, expected_q, FUNCTION, scale=1.0, what="Q", **close)
    got = float(slope)
    scale = float(np.abs(expected)) + LR
    assert_close(got, expected, FUNCTION, scale=scale, what="dQ/d log η", **close)
