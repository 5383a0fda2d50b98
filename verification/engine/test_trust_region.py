"""The trust region: neither a lookahead nor a meta-step raises Q by more than it may."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import apo_core as apo
from apo_core.trust_region import MOVE_HALVINGS
from verification.engine.scenes import Quadratic, scene
from verification.profiles import share
from verification.tolerances import FUNCTION, ROUNDING, assert_close


def build(
    model: Quadratic,
    rule: apo.UpdateRule,
    meta_lr: float = 0.1,
    factor: float | None = 2.0,
    **objective: object,
) -> apo.APO:
    """A meta-step at every step, by plain gradient descent on φ."""
    q = apo.ProximalObjective(trust_factor=factor, **objective)  # pyright: ignore[reportArgumentType]
    return apo.APO(model, rule, q, torch.optim.SGD(rule.parameters(), lr=meta_lr), interval=1)


def meta_step(optimizer: apo.APO, model: Quadratic) -> apo.ProximalTerms:
    """With the gradient of the present θ."""
    optimizer.zero_grad()
    model.loss().backward()
    return optimizer.meta_step(loss=model.loss)


@given(exponent=st.integers(-6, 60))
def test_the_step_scale_is_the_largest_power_of_two_within_the_region(exponent: int) -> None:
    """From θ = 1 with h = 1: ½(1 − sη)² ≤ κ·½ where sη ≤ 1 + √κ."""
    rate = 2.0 ** (exponent / 2)
    model = Quadratic([1.0])
    optimizer = build(model, apo.rules.SGD(model, rate), meta_lr=0.0, factor=2.0)
    meta_step(optimizer, model)
    needed = max(0, math.ceil(math.log2(rate / (1 + math.sqrt(2.0)))))
    assert optimizer.trust.scale == 2.0**-needed


@share(0.5)
@given(
    rate=st.floats(-4, 6).map(lambda e: 10.0**e),
    meta_lr=st.sampled_from([0.0, 0.1, 10.0]),
    factor=st.floats(1.1, 4.0),
    curvature=st.lists(st.floats(0.1, 100.0), min_size=1, max_size=4),
)
def test_the_loss_never_rises_by_more_than_twice_what_is_allowed(
    rate: float, meta_lr: float, factor: float, curvature: list[float]
) -> None:
    """A step takes the φ that the meta-step has left: (κ − 1)·J for the lookahead, and again."""
    model = Quadratic(curvature)
    optimizer = build(model, apo.rules.SGD(model, rate), meta_lr, factor)
    for _ in range(8):
        before = float(model.loss().detach())
        meta_step(optimizer, model)
        optimizer.step()
        # θ is rounded once, and J to first order by |∇J||θ| ε, at most 2 J κ(diag h) ε.
        slack = 64 * torch.finfo(torch.float64).eps * max(curvature) / min(curvature)
        assert float(model.loss().detach()) <= (2 * factor - 1) * before * (1 + slack)
    assert optimizer.skipped_steps == optimizer.skipped_meta_steps == 0


def test_the_meta_gradient_is_that_of_the_shortened_lookahead() -> None:
    """dQ(φ; s)/dφ = −(1 − sη)·sη for h = 1 at θ = 1, and λ_WSD (sη)² of the WSD."""
    model = Quadratic([1.0])
    rule = apo.rules.SGD(model, 5.0)
    optimizer = build(model, rule, meta_lr=0.0, wsd_weight=0.1)
    terms = meta_step(optimizer, model)
    step = optimizer.trust.scale * 5.0
    assert optimizer.trust.scale == 0.25
    assert rule.log_lr.grad is not None
    q = 0.5 * (1 - step) ** 2 + 0.05 * step**2
    slope = -(1 - step) * step + 0.1 * step**2
    got = torch.stack([terms.total, rule.log_lr.grad])
    assert_close(got.numpy(), torch.tensor([q, slope]).numpy(), FUNCTION, size=4, what="Q, dQ/dφ")
    optimizer.step()
    theta = model.theta.detach().numpy()
    assert_close(theta, 1 - torch.tensor([step]).numpy(), ROUNDING, size=2, scale=1.0, what="θ")


def test_the_step_scale_comes_back_when_phi_is_small() -> None:
    model = Quadratic([1.0])
    rule = apo.rules.SGD(model, 1e3)
    optimizer = build(model, rule, meta_lr=0.0)
    meta_step(optimizer, model)
    assert optimizer.trust.scale == 2.0**-9
    with torch.no_grad():
        rule.log_lr.fill_(math.log(0.5))
    seen = []
    for _ in range(11):
        meta_step(optimizer, model)
        seen.append(optimizer.trust.scale)
    assert seen == [2.0**e for e in range(-8, 0)] + [1.0] * 3


@pytest.mark.parametrize(("meta_lr", "halvings"), [(4.0, 0), (40.0, 3), (1e6, MOVE_HALVINGS)])
def test_a_move_of_phi_is_halved_until_q_is_within_the_region(
    meta_lr: float, halvings: int
) -> None:
    """At η = ½: dQ/dφ = −¼, Q = ⅛ and J = ½, so that Q may become ⅝.

    φ may grow by 1.25 (Q = 0.28), but not by 2.5 (Q = 12.9); 2.5e5 is too far after ten halvings.
    """
    model = Quadratic([1.0])
    rule = apo.rules.SGD(model, 0.5)
    optimizer = build(model, rule, meta_lr)
    meta_step(optimizer, model)
    assert optimizer.trust.halvings == halvings
    moved = 0.0 if halvings == MOVE_HALVINGS else 0.25 * meta_lr / 2**halvings
    phi = rule.log_lr.detach().exp().numpy()
    assert_close(phi, 0.5 * torch.tensor(moved).double().exp().numpy(), FUNCTION, size=4, what="η")


@pytest.mark.parametrize("loss", ["exact", "linear", "quadratic"])
@pytest.mark.parametrize("fsd", ["exact", "quadratic"])
@pytest.mark.parametrize("factor", [None, 2.0])
def test_it_serves_every_form_of_the_objective(loss: str, fsd: str, factor: float | None) -> None:
    """A, B and S of 30 I make a preconditioner of 30⁶ I: far outside, but for the region."""
    objective = apo.ProximalObjective("kl", 0.3, 0.1, trust_factor=factor)
    objective.loss, objective.fsd = loss, fsd  # pyright: ignore[reportAttributeAccessIssue]
    s = scene("ekfac", objective=objective, interval=1, meta_lr=1e-3)
    s.model.eval()
    with torch.no_grad():
        for p in s.optimizer.rule.parameters():
            p.mul_(30.0)
    rises = []
    for _ in range(5):
        s.x, s.x_other = torch.randn_like(s.x), torch.randn_like(s.x_other)
        value = float(s.loss().detach())
        s.backward()
        q = float(s.meta_step().total)
        rises.append((q - value if loss == "exact" else q) / value)
        s.optimizer.step()
    assert max(rises) <= 1.0 if factor is not None else rises[0] > 1e6


def test_a_mini_batch_that_is_not_finite_leaves_the_step_scale() -> None:
    s = scene(objective=apo.ProximalObjective("kl", 0.3, 0.1, trust_factor=2.0), interval=1)
    s.run(2)
    s.optimizer.trust.scale = 0.25
    s.backward()
    s.x[0, 0, 0, 0] = math.nan
    with pytest.warns(RuntimeWarning, match="a meta-step was skipped since the loss at the look"):
        s.meta_step()
    assert s.optimizer.trust.scale == 0.25
    s.backward()
    s.meta_step()
    assert s.optimizer.trust.scale == 0.25
    assert s.optimizer.skipped_meta_steps == 2


@pytest.mark.parametrize(("factor", "passes"), [(None, 3), (2.0, 7)])
def test_it_costs_four_forward_passes(factor: float | None, passes: int) -> None:
    """J_B(θ), and after the move of φ the outputs at θ and both passes at θ' once more."""
    s = scene(objective=apo.ProximalObjective("kl", 0.3, 0.1, trust_factor=factor))
    s.backward()
    calls: list[int] = []
    s.model.register_forward_hook(lambda *_: calls.append(1))
    s.meta_step()
    assert len(calls) == passes
    assert s.optimizer.trust.scale == 1.0


def test_lbfgs_solves_at_the_shortened_step() -> None:
    """The best η for θ − sηg with h = 1 is 1/s."""
    model = Quadratic([1.0])
    rule = apo.rules.SGD(model, 8.0)
    solver = torch.optim.LBFGS(rule.parameters(), max_iter=30, line_search_fn="strong_wolfe")
    optimizer = apo.APO(model, rule, apo.ProximalObjective(trust_factor=2.0), solver, interval=1)
    meta_step(optimizer, model)
    assert optimizer.trust.scale == 0.25
    assert float(rule.lr) == pytest.approx(4.0, rel=1e-4)  # LBFGS stops at a gradient of 1e-7


def test_between_meta_steps_no_step_is_longer_than_twice_the_last_ones() -> None:
    """Gradients a hundred times as large move θ by 2 ‖Δ‖; as large ones are taken as they are."""
    torch.manual_seed(0)
    model = Quadratic([1.0, 1.0])
    rule = apo.rules.SGD(model, 0.1)
    objective = apo.ProximalObjective(trust_factor=1.1)
    meta_optimizer = torch.optim.SGD(rule.parameters(), lr=0.0)
    optimizer = apo.APO(model, rule, objective, meta_optimizer, interval=4, update_scale=0.5)
    taken = []
    for t, size in enumerate([1.0, 1.5, 100.0, 0.5, 100.0, 100.0, 1.0]):
        before = model.theta.detach().clone()
        model.theta.grad = torch.tensor([0.6, 0.8], dtype=torch.float64) * size
        if t == 0:
            meta_step(optimizer, model)
            model.theta.grad = torch.tensor([0.6, 0.8], dtype=torch.float64) * size
        optimizer.step()
        taken.append(float((model.theta.detach() - before).norm()) / 0.05)
    # the step of the second meta-step, the fifth, is bound by the first's radius, and doubles it
    assert taken == pytest.approx([1.0, 1.5, 2.0, 0.5, 2.0, 4.0, 1.0], rel=1e-14)


def cross_entropy_of(model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean over the mini-batch."""
    return torch.nn.functional.cross_entropy(model(x), y)


def test_a_rate_a_hundred_thousand_times_too_large_trains() -> None:
    """Ten steps between two meta-steps; without the region θ leaves the range of numbers."""
    ends = []
    for factor in (None, 1.1):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
        ).double()
        x = torch.randn(200, 6, dtype=torch.float64)
        y = (x @ torch.randn(6, 3, dtype=torch.float64)).argmax(1)
        rule = apo.rules.SGD(model, 1e4)
        optimizer = apo.APO(
            model,
            rule,
            apo.ProximalObjective("kl", 0.01, trust_factor=factor),
            torch.optim.RMSprop(rule.parameters(), lr=0.1),
        )
        for t in range(200):
            part = slice(20 * (t % 10), 20 * (t % 10) + 20)

            loss = partial(cross_entropy_of, model, x[part], y[part])

            optimizer.zero_grad()
            loss().backward()
            if optimizer.meta_due:
                optimizer.meta_step(loss=loss, outputs=lambda model=model, x=x: model(x[:40]))
            optimizer.step()
        ends.append(float(torch.nn.functional.cross_entropy(model(x), y).detach()))
    assert ends[1] < 0.9 < 100.0 < ends[0]


def test_it_is_saved_and_shown() -> None:
    objective = apo.ProximalObjective("kl", 0.3, 0.1, trust_factor=2.0)
    s, other = scene(objective=objective), scene(objective=objective)
    s.optimizer.trust.scale, s.optimizer.trust.halvings = 0.125, 3
    s.optimizer.trust.radius.fill_(0.5)
    other.optimizer.load_state_dict(s.optimizer.state_dict())
    shown = other.optimizer.diagnostics
    assert [shown[f"trust_{name}"] for name in ("scale", "radius")] == [0.125, 0.5]
    assert shown["halvings"] == 3.0


@pytest.mark.parametrize("factor", [1.0, 0.5, math.inf, math.nan])
def test_a_bad_factor(factor: float) -> None:
    with pytest.raises(ValueError, match="`trust_factor` must be None, or finite and above 1, got"):
        apo.ProximalObjective(trust_factor=factor)
