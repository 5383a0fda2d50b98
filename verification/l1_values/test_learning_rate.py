"""The universal rule: any optimizer's own steps, and the hand-written rules' φ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import apo_core as apo
from apo_core.testing import check_update_rule
from verification import bridge
from verification.l1_values.twins import engine, meta_backward
from verification.profiles import share
from verification.strategies import MetaCase, meta_cases
from verification.tolerances import FUNCTION, PROPAGATED, assert_close

STEPS = 5
seeds = st.integers(0, 2**16)
Base = Callable[[nn.Module], torch.optim.Optimizer]
Build = Callable[[nn.Module], Any]

# Every optimizer of torch.optim that steps without a closure, and is linear in its rate.
LINEAR: dict[str, Base] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), 0.02),
    "SGD momentum": lambda m: torch.optim.SGD(m.parameters(), 0.02, momentum=0.9),
    "SGD nesterov, decay": lambda m: torch.optim.SGD(
        m.parameters(), 0.02, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), 0.02),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), 0.02, weight_decay=0.1),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters(), 0.02),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), 0.02),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters(), 0.02),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), 0.02, momentum=0.5),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), 0.02, lr_decay=0.1),
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters(), 0.5),
}
# The hand-written rules beside the optimizers whose steps they take.
PAIRS: dict[str, tuple[Build, Base]] = {
    "SGD": (
        lambda m: apo.rules.SGD(m, 0.02, momentum=0.9, lookahead_momentum=True),
        LINEAR["SGD momentum"],
    ),
    "Adam": (lambda m: apo.rules.Adam(m, 0.02), LINEAR["Adam"]),
    "AdamW": (lambda m: apo.rules.Adam(m, 0.02, weight_decay=0.1), LINEAR["AdamW"]),
    "RMSprop": (
        lambda m: apo.rules.RMSprop(m, 0.02),
        lambda m: torch.optim.RMSprop(m.parameters(), 0.02),
    ),
}


class Counting(torch.optim.Optimizer):
    """A third party's optimizer: a Python counter in the state, another in the group."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "k": 0, "scale": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """θ ← θ − lr g / (steps of this parameter · all steps)."""
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                self.state[p]["count"] = self.state[p].get("count", 0) + 1
                p.sub_(group["lr"] * p.grad / (self.state[p]["count"] * group["k"]))


class Clipped(Counting):
    """Its rate is cut at 0.03, so that it is linear below and not above."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """θ ← θ − min(lr, 0.03) g."""
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(min(group["lr"], 0.03) * p.grad)


def universal(base: Base) -> Build:
    """The rule on that optimizer."""
    return lambda model: apo.rules.LearningRate(model, base(model))


@pytest.mark.parametrize("name", LINEAR)
@share(0.2)
@given(case=meta_cases(), seed=seeds)
def test_it_takes_the_optimizers_own_steps(name: str, case: MetaCase, seed: int) -> None:
    """Also with a meta-step, whose lookahead must leave no trace, before each of them."""
    network = case.problem.network
    optimizer = engine(case, universal(LINEAR[name]))
    optimizer.meta_optimizer = torch.optim.SGD(optimizer.rule.parameters(), lr=0.0)
    theirs = bridge.twin(network, case.theta)
    base = LINEAR[name](theirs)
    before, error = case.theta, 0.0
    for number, g in enumerate(np.random.default_rng(seed).standard_normal((STEPS, network.size))):
        for model in (optimizer.model, theirs):
            bridge.set_gradients(model, g, network)
        meta_backward(optimizer, case)
        optimizer.step()
        base.step()
        # θ' rounds, as a copy of θ that moves and as θ + (θ' − θ); exp(log η) is η to 8 units, for
        # log η >= -4. A tenth more for what comes back with a decay, ηλ/(1 − μ) = 0.02 a step.
        after = bridge.parameters_of(theirs, network)
        error += 1.1 * float(2 * np.linalg.norm(after) + 8 * np.linalg.norm(after - before))
        before = after
        assert_close(
            bridge.parameters_of(optimizer.model, network),
            after,
            PROPAGATED,
            size=1,
            scale=error,
            what=f"θ after step {number + 1}",
        )


@pytest.mark.parametrize("name", PAIRS)
@share(0.2)
@given(case=meta_cases(), seed=seeds)
def test_its_meta_gradient_is_that_of_the_hand_written_rule(
    name: str, case: MetaCase, seed: int
) -> None:
    network = case.problem.network
    by_hand, base = PAIRS[name]
    pair = [engine(case, by_hand), engine(case, universal(base))]
    g = np.random.default_rng(seed).standard_normal((STEPS, network.size))
    slopes = []
    for optimizer in pair:
        for gradient in g[:-1]:
            bridge.set_gradients(optimizer.model, gradient, network)
            optimizer.step()
        bridge.load(optimizer.model, case.theta, network)
        bridge.set_gradients(optimizer.model, g[-1], network)
        optimizer.objective = apo.ProximalObjective(fsd_weight=0.0, wsd_weight=1.0, loss="linear")
        optimizer.meta_backward(loss=lambda: torch.zeros(()))
        slopes.append(
            sum(bridge.phi_gradient(p) for p in optimizer.rule.parameters() if p.requires_grad)
        )
    # ⟨Δ, g + Δ⟩, where the subtraction θ' − θ errs by u ‖θ‖. A step is at most 0.02 Σ ‖g‖ long with
    # momentum, 0.2 in each coordinate with second moments, and 0.002 ‖θ‖ more with the decay.
    n, theta, last = network.size, float(np.linalg.norm(case.theta)), float(np.linalg.norm(g[-1]))
    step = 0.02 * float(np.linalg.norm(g, axis=1).sum()) + 0.2 * np.sqrt(n) + 0.002 * theta
    scale = theta * (last + 2.0 * step) + (n + 20) * step * (last + step)
    assert_close(
        np.asarray(slopes[1]),
        np.asarray(slopes[0]),
        PROPAGATED,
        size=1,
        scale=float(scale),
        what="dQ/d log η",
    )


@pytest.mark.parametrize("name", LINEAR)
def test_it_passes_the_conformance_kit(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    check_update_rule(apo.rules.LearningRate(model, LINEAR[name](model)), model)


def test_each_parameter_group_has_its_rate() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters()}]
    rule = apo.rules.LearningRate(model, torch.optim.SGD(groups, lr=0.02))
    assert rule.lr.tolist() == pytest.approx([0.1, 0.02])
    grads = [torch.ones_like(p) for p in model.parameters()]
    updates, _ = rule([p.detach() for p in model.parameters()], grads, {})
    assert [float(u.detach().flatten()[0]) for u in updates] == pytest.approx(
        [-0.1] * 2 + [-0.02] * 2
    )
    torch.autograd.backward([u.sum() for u in updates])
    assert rule.log_lr.grad is not None
    assert rule.log_lr.grad.tolist() == pytest.approx([-0.1 * 8, -0.02 * 3])


def test_numbers_in_the_state_and_in_the_groups_are_state() -> None:
    """A lookahead leaves them; a step takes them along; a checkpoint holds them."""
    model, twin = (nn.Linear(2, 1, dtype=torch.float64) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    rule = apo.rules.LearningRate(model, Counting(model.parameters(), 0.1))
    objective = apo.ProximalObjective(fsd_weight=0.0)
    optimizer = apo.APO(model, rule, objective, torch.optim.SGD(rule.parameters(), lr=0.0))
    base = Counting(twin.parameters(), 0.1)
    for _ in range(3):
        for m in (model, twin):
            for p in m.parameters():
                p.grad = torch.ones_like(p)
        optimizer.meta_step(loss=lambda: model(torch.ones(2, dtype=torch.float64)).sum())
        optimizer.step()
        base.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-15, atol=1e-15)
    state = optimizer.state_dict()["rule_state"]
    assert [int(k) for k in state["group.int.k"]] == [3, 3]
    assert [int(count) for count in state["state.int.count"]] == [3, 3]
    assert rule.optimizer.param_groups[0]["k"] == 0  # the optimizer itself was only borrowed


def test_settings_of_a_group_are_no_memory_and_may_be_changed() -> None:
    model = nn.Linear(2, 1, dtype=torch.float64)
    base = torch.optim.AdamW(model.parameters(), 0.5, weight_decay=0.0)
    rule = apo.rules.LearningRate(model, base)
    params, zeros = [[f(p) for p in model.parameters()] for f in (torch.clone, torch.zeros_like)]
    with torch.no_grad():
        _, state = rule(params, zeros, rule.init_state(params))
        assert {key.split(".")[0] for key in state} == {"state"}
        base.param_groups[0]["weight_decay"] = 0.25
        updates, _ = rule(params, zeros, state)
    for p, update in zip(params, updates, strict=True):
        # θ(1 − ηλ) − θ rounds twice, on the scale of θ.
        assert_close(update.numpy(), -0.125 * p.detach().numpy(), FUNCTION, condition=8.0)


def test_a_learning_rate_may_be_a_tensor() -> None:
    """φ sets the rate of every step, and the tensor stays as it was."""
    model = nn.Linear(2, 1, dtype=torch.float64)
    rate = torch.tensor(0.5)
    rule = apo.rules.LearningRate(model, torch.optim.SGD(model.parameters(), lr=rate))
    params, g = [[f(p) for p in model.parameters()] for f in (torch.zeros_like, torch.ones_like)]
    with torch.no_grad():
        rule.log_lr.sub_(np.log(2.0))
        _, state = rule(params, g, rule.init_state(params))
        updates, _ = rule(params, g, state)
    for update in updates:
        assert_close(update.numpy(), -0.25 * np.ones(update.shape), FUNCTION)
    assert rule.optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


def test_a_step_that_is_not_linear_is_refused() -> None:
    model = nn.Linear(2, 1, dtype=torch.float64)
    rule = apo.rules.LearningRate(model, Clipped(model.parameters(), 0.01))
    grads, params = [torch.ones_like(p) for p in model.parameters()], list(model.parameters())
    rule([p.detach() for p in params], grads, {})
    with torch.no_grad():
        rule.log_lr.fill_(np.log(0.02))
    with pytest.raises(RuntimeError, match="steps that are linear in its learning rate"):
        rule([p.detach() for p in params], grads, {})


@pytest.mark.parametrize("name", ["Rprop", "ASGD"])
def test_torchs_own_exceptions_are_refused(name: str) -> None:
    """Rprop's rate only sets its first step sizes; ASGD's enters a schedule of its own."""
    model = nn.Linear(2, 1, dtype=torch.float64)
    base = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    rule = apo.rules.LearningRate(model, base)
    params = [p.detach() for p in model.parameters()]
    grads = [torch.ones_like(p) for p in params]
    with torch.no_grad():  # an ordinary step is not checked
        state = rule(params, grads, rule.init_state(params))[1]
    with pytest.raises(RuntimeError, match="linear in its learning rate"):
        rule(params, grads, state)


def test_what_it_cannot_drive_is_refused() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match="without a closure, got LBFGS"):
        apo.rules.LearningRate(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got Linear"):
        apo.rules.LearningRate(model, model)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="must hold the model's 2 trainable parameters, got 1"):
        apo.rules.LearningRate(model, torch.optim.SGD([model.weight], lr=0.1))
    with pytest.raises(ValueError, match="must have positive learning rates, got"):
        apo.rules.LearningRate(model, torch.optim.SGD(model.parameters(), lr=0.0))
