"""Algorithm 1's order, interval, warm-up and scales; what happens when a meta-gradient diverges."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import apo_core as apo
from verification.engine.scenes import RULES, Quadratic, classifier, scene, values
from verification.tolerances import MINIMIZER, ROUNDING, assert_close

DECADES = st.floats(-4, 0)


@given(interval=st.integers(1, 7), steps=st.integers(1, 20))
def test_a_meta_step_is_due_where_t_mod_K_is_0(interval: int, steps: int) -> None:
    s = scene(interval=interval)
    due = []
    for _ in range(steps):
        due.append(s.optimizer.meta_due)
        s.backward()
        s.optimizer.step()
    assert due == [t % interval == 0 for t in range(steps)]


@given(seed=st.integers(0, 2**16), scale=st.floats(0.1, 1.9))
def test_the_step_follows_the_meta_step_and_is_scaled(seed: int, scale: float) -> None:
    """θ ← θ − scale · η g with the η that the meta-step has just found."""
    s = scene(seed=seed, update_scale=scale)
    s.backward()
    lr = s.lr
    theta, grads = values(s.model), [p.grad for p in s.model.parameters()]
    s.meta_step()
    assert s.lr != lr
    s.optimizer.step()
    for p, before, g in zip(s.model.parameters(), theta, grads, strict=True):
        assert g is not None
        moved = before - scale * s.lr * g
        assert_close(
            p.detach().numpy(), moved.numpy(), ROUNDING, size=1, scale=float(before.norm())
        )


@pytest.mark.parametrize("structure", [apo.Dense, apo.Diagonal, apo.EKFAC])
@given(log_scale=DECADES)
def test_the_initial_preconditioner_is_s_squared_I(
    structure: type[apo.Preconditioner], log_scale: float
) -> None:
    """P = s²I, so that the first step is that of SGD with learning rate s²."""
    torch.manual_seed(0)
    model = classifier()
    rule = apo.rules.Preconditioned(model, structure, 10.0**log_scale)
    n = sum(p.numel() for p in model.parameters())
    P = 10.0 ** (2 * log_scale) * torch.eye(n, dtype=torch.float64)
    assert_close(rule.dense().detach().numpy(), P.numpy(), ROUNDING, size=1)
    params = [p.detach() for p in model.parameters()]
    grads = [torch.randn_like(p) for p in params]
    sgd, _ = apo.rules.SGD(model, 10.0 ** (2 * log_scale))(params, grads, {})
    for got, expected in zip(rule(params, grads, {})[0], sgd, strict=True):
        # exp(log s²) carries the rounding of the logarithm, |log s²| eps.
        assert_close(
            got.detach().numpy(), expected.detach().numpy(), ROUNDING, iterations=2, condition=20.0
        )


@given(seed=st.integers(0, 2**16), warmup_steps=st.integers(0, 6))
def test_warm_up_moves_theta_by_the_base_optimizer_while_phi_learns(
    seed: int, warmup_steps: int
) -> None:
    # a small meta-rate: a large φ could overshoot to where no gradient is left to learn from
    s = scene("ekfac", seed=seed, interval=1, warmup_steps=warmup_steps, meta_lr=1e-3)
    torch.manual_seed(seed)
    twin = classifier()
    twin.load_state_dict(s.model.state_dict())
    base = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for step in range(6):
        phi, theta = values(s.optimizer.rule), values(s.model)
        s.backward()
        grads = [p.grad.clone() for p in s.model.parameters() if p.grad is not None]
        s.meta_step()
        assert not all(map(torch.equal, phi, s.optimizer.rule.parameters()))
        s.optimizer.step()
        if step < warmup_steps:
            for p, g in zip(twin.parameters(), grads, strict=True):
                p.grad = g
            base.step()
            expected = values(twin)
        else:
            updates, _ = s.optimizer.rule(theta, grads, {})
            expected = [p + u for p, u in zip(theta, updates, strict=True)]
        assert all(map(torch.equal, expected, s.model.parameters()))


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 2**16))
def test_meta_backward_averages_and_leaves_phi(rule: str, seed: int) -> None:
    """Two halves of dQ/dφ add up to it, and φ stays until the meta-optimizer steps."""
    s = scene(rule, seed=seed)
    s.backward()
    phi = values(s.optimizer.rule)
    s.optimizer.meta_optimizer.zero_grad()
    s.optimizer.meta_backward(loss=s.loss, outputs=s.outputs)
    whole = [p.grad for p in s.optimizer.rule.parameters()]
    s.optimizer.meta_optimizer.zero_grad()
    for _ in range(2):
        s.optimizer.meta_backward(loss=s.loss, outputs=s.outputs, weight=0.5)
    for p, w in zip(s.optimizer.rule.parameters(), whole, strict=True):
        assert p.grad is not None
        assert w is not None
        assert torch.equal(p.grad, w)  # halving is exact in binary
    assert all(map(torch.equal, phi, s.optimizer.rule.parameters()))


def test_step_takes_a_closure_and_returns_its_loss() -> None:
    s = scene()
    losses = []

    def closure() -> float:
        s.backward()
        losses.append(s.loss().item())
        return losses[-1]

    before = values(s.model)
    assert s.optimizer.step(closure) == losses[0]
    assert len(losses) == 1
    assert not all(map(torch.equal, before, s.model.parameters()))


@given(
    curvature=st.lists(st.floats(0.5, 2.0), min_size=1, max_size=5),
    wsd_weight=st.sampled_from([0.0, 0.1, 1.0]),
    lr=st.floats(0.3, 2.0),
)
def test_LBFGS_solves_for_the_learning_rate(
    curvature: list[float], wsd_weight: float, lr: float
) -> None:
    """One meta-step finds η* = gᵀg / gᵀ(H + λ_WSD I)g, the minimizer of Q on a quadratic."""
    model = Quadratic(curvature)
    h = model.h
    rule = apo.rules.SGD(model, lr)
    solver = torch.optim.LBFGS(
        rule.parameters(), max_iter=200, tolerance_grad=0, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    optimizer = apo.APO(model, rule, apo.ProximalObjective(wsd_weight=wsd_weight), solver)
    model.loss().backward()
    optimizer.meta_step(loss=model.loss)
    best = (h * h).sum() / (h * h * (h + wsd_weight)).sum()
    curve = (h * h * (h + wsd_weight)).sum() * best**2  # Q'' in log η at the optimum
    value = model.loss().detach().item()
    assert_close(
        rule.log_lr.detach().numpy(),
        best.log().numpy(),
        MINIMIZER,
        size=2 * len(curvature) + 8,
        condition=max(1.0, value / curve.item()),
        scale=1.0,
    )


def test_a_diverging_lookahead_leaves_phi_is_counted_and_warned_of_once() -> None:
    model = Quadratic([1.0])
    rule = apo.rules.SGD(model, 1e200)
    optimizer = apo.APO(
        model, rule, apo.ProximalObjective(), torch.optim.RMSprop(rule.parameters(), lr=0.1)
    )
    model.loss().backward()
    before, theta = rule.log_lr.item(), model.theta.detach().clone()
    with pytest.warns(RuntimeWarning, match="skipped since the loss at the lookahead was not"):
        terms = optimizer.meta_step(loss=model.loss)
    assert not math.isfinite(terms.loss.item())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.meta_step(loss=model.loss)
    assert (optimizer.meta_steps, optimizer.skipped_meta_steps) == (0, 2)
    assert rule.log_lr.item() == before
    assert torch.equal(theta, model.theta)
    state = optimizer.meta_optimizer.state_dict()["state"]
    assert state == {}, "the meta-optimizer must not have seen the gradient"


def test_a_diverging_LBFGS_puts_phi_back() -> None:
    model = Quadratic([1.0])
    rule = apo.rules.SGD(model, 1e200)
    solver = torch.optim.LBFGS(rule.parameters())
    optimizer = apo.APO(model, rule, apo.ProximalObjective(), solver)
    model.loss().backward()
    before = rule.log_lr.item()
    with pytest.warns(RuntimeWarning, match="a meta-step was skipped since"):
        optimizer.meta_step(loss=model.loss)
    assert rule.log_lr.item() == before
    assert optimizer.skipped_meta_steps == 1
