"""16-bit training: what is computed in which dtype, under autocast and with 16-bit parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import apo_core as apo
from apo_core.discrepancies import resolve_discrepancy
from verification.tolerances import FUNCTION, ROUNDING, assert_close

HALVES = (torch.bfloat16, torch.float16)
RULES: dict[str, Callable[[nn.Module], apo.UpdateRule]] = {
    "sgd": lambda model: apo.rules.SGD(model, lr=0.05, momentum=0.9),
    "rmsprop": lambda model: apo.rules.RMSprop(model, 0.01, eps=1e-2),
    "adam": lambda model: apo.rules.Adam(model, 0.01, eps=1e-2),
    "any optimizer": lambda model: apo.rules.LearningRate(
        model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    ),
    "diagonal": lambda model: apo.rules.Preconditioned(model, apo.Diagonal, 0.2),
    "ekfac": lambda model: apo.rules.Preconditioned(model, apo.EKFAC, 0.2),
}


def network() -> nn.Sequential:
    """A small regression network in float32."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def build(model: nn.Module, rule: str) -> apo.APO:
    """An APO with a meta-step at every step."""
    built = RULES[rule](model)
    objective = apo.ProximalObjective("squared_error", 0.1, 0.1)
    return apo.APO(model, built, objective, torch.optim.SGD(built.parameters(), lr=0.05), 1)


def train(optimizer: apo.APO, forward: Callable[[Tensor], Tensor], steps: int) -> list[float]:
    """Fit a fixed linear map; the loss in float32 at every step."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(4, 2, generator=generator)
    losses = []
    for _ in range(steps):
        x, other = torch.randn(2, 16, 4, generator=generator)

        def loss(x: Tensor = x) -> Tensor:
            return (forward(x).float() - x @ target).square().mean()

        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        optimizer.meta_step(loss=loss, outputs=lambda other=other: forward(other).float())
        optimizer.step()
    return losses


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rule", RULES)
def test_sixteen_bit_parameters_have_a_32_bit_phi_and_learn(rule: str, dtype: torch.dtype) -> None:
    """Parameters, gradients and state are stored in 16 bits, φ and the meta-optimizer in 32."""
    model = network().to(dtype)
    optimizer = build(model, rule)
    before = [p.detach().clone() for p in optimizer.rule.parameters() if p.requires_grad]
    losses = train(optimizer, lambda x: model(x.to(dtype)), 60)
    assert all(p.dtype == dtype for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in optimizer.rule.parameters())
    state = [
        t
        for name, ts in optimizer.rule_state.items()
        if name in ("momentum", "square_avg", "exp_avg")
        for t in ts
    ]
    assert all(t.dtype == dtype for t in state)
    assert optimizer.skipped_meta_steps == 0
    after = [p for p in optimizer.rule.parameters() if p.requires_grad]
    assert all(bool(p.isfinite().all()) for p in after)
    assert not all(map(torch.equal, before, after))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize("dtype", HALVES)
def test_a_32_bit_learning_rate_is_not_rounded_to_16(dtype: torch.dtype) -> None:
    """−ηg is formed in 32 bits and rounded once; so is ⟨q, g⟩, of which η's gradient is made."""
    model = nn.Linear(50, 4).to(dtype)
    rule = apo.rules.SGD(model, lr=0.0123456)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(p.shape, generator=generator).to(dtype) for p in model.parameters()]
    updates, _ = rule([p.detach() for p in model.parameters()], grads, {})
    eta = rule.log_lr.detach().exp()
    for update, g in zip(updates, grads, strict=True):
        assert torch.equal(update, (-eta * g.float()).to(dtype))
    torch.autograd.backward([u.float().sum() for u in updates])
    expected = -eta * torch.cat([g.float().reshape(-1) for g in grads]).sum()
    assert rule.log_lr.grad is not None
    torch.testing.assert_close(rule.log_lr.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_autocast_to_bfloat16_learns_with_32_bit_parameters(rule: str) -> None:
    model = network()
    optimizer = build(model, rule)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    losses = train(optimizer, forward, 60)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert optimizer.skipped_meta_steps == 0
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize("rule", ["sgd", "ekfac"])
def test_gradients_may_be_accumulated_over_parts_of_a_batch(rule: str) -> None:
    """Two halves of B, and of B', give the step and the meta-gradient of the whole."""
    generator = torch.Generator().manual_seed(2)
    x, other = torch.randn(2, 8, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    results = []
    for parts in ([slice(0, 8)], [slice(0, 4), slice(4, 8)]):
        model = network().double()
        optimizer = build(model, rule)
        optimizer.zero_grad()
        share = 1.0 / len(parts)
        for part in parts:
            (share * (model(x[part]) - y[part]).square().mean()).backward()
        optimizer.meta_optimizer.zero_grad()
        for part in parts:
            optimizer.meta_backward(
                loss=lambda part=part, model=model: (model(x[part]) - y[part]).square().mean(),
                outputs=lambda part=part, model=model: model(other[part]),
                weight=share,
            )
        grads = [p.grad for p in optimizer.rule.parameters() if p.grad is not None]
        optimizer.step()
        tensors = [*grads, *(p.detach() for p in model.parameters())]
        results.append(torch.cat([t.reshape(-1) for t in tensors]).numpy())
    scale = float(np.linalg.norm(results[0]))
    # Sums over eight examples and eight units, in another order; the WSD term's halves are equal.
    assert_close(results[1], results[0], ROUNDING, iterations=4, size=64, scale=scale)


def test_gradients_may_be_clipped_before_the_meta_step() -> None:
    """The rule sees what stands in `.grad`, and steps along the clipped g."""
    model = network().double()
    optimizer = build(model, "sgd")
    x = torch.randn(8, 4, dtype=torch.float64)
    (100.0 * model(x)).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    rule = optimizer.rule
    assert isinstance(rule, apo.rules.SGD)
    optimizer.step()
    moved = torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - theta
    assert float(moved.norm()) == pytest.approx(0.1 * float(rule.lr), rel=1e-5)


def test_the_meta_learning_rate_may_be_scheduled() -> None:
    """A schedule belongs on the meta-optimizer; the learning rate itself is φ."""
    model = network()
    optimizer = build(model, "sgd")
    schedule = torch.optim.lr_scheduler.StepLR(optimizer.meta_optimizer, 1, gamma=0.0)
    rule = optimizer.rule
    assert isinstance(rule, apo.rules.SGD)
    train(optimizer, model, 1)
    schedule.step()
    frozen = rule.log_lr.detach().clone()
    train(optimizer, model, 3)
    assert torch.equal(rule.log_lr, frozen)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["kl", "squared_error", "bernoulli_kl"])
def test_the_terms_of_16_bit_tensors_are_formed_in_32(name: str, dtype: torch.dtype) -> None:
    """ρ of the outputs, ‖Δ‖² and ⟨g, Δ⟩: as in float64 from the same 16-bit numbers."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 4, bias=False).to(dtype)
    rule = apo.rules.SGD(model, lr=1e-4)  # squares of Δ leave float16's range
    table = torch.randn(2, 5, 4, generator=generator).to(dtype)
    passes = iter(table)

    def outputs() -> Tensor:
        return next(passes) + 0.0 * model.weight.sum()

    optimizer = apo.APO(
        model,
        rule,
        apo.ProximalObjective(name, 1.0, 1.0, loss="linear"),
        torch.optim.SGD(rule.parameters(), lr=0.1),
    )
    model.weight.grad = torch.randn(4, 3, generator=generator).to(dtype)
    lr = rule.lr
    terms = optimizer.meta_step(loss=lambda: torch.zeros(()), outputs=outputs)
    assert all(term.dtype == torch.float32 for term in terms)
    z0, z = table.double()
    g = model.weight.grad.double()
    step = (-lr * g.float()).to(dtype).double()
    expected = [(g * step).sum(), resolve_discrepancy(name)(z, z0), 0.5 * step.square().sum()]
    for term, value in zip(terms, expected, strict=True):
        assert_close(
            term.numpy(),
            value.float().numpy(),
            FUNCTION.at(np.float32),
            size=20,
            scale=float(table.float().square().sum()) if value is expected[1] else 0.0,
            what="a term of Q",
        )


@pytest.mark.parametrize("rule", RULES)
def test_autocast_to_float16_learns_under_a_grad_scaler(rule: str) -> None:
    """Gradients are unscaled before the meta-step, whose own passes are scaled as well."""
    model = network()
    optimizer = build(model, rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=5)
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(4, 2, generator=generator)
    losses = []
    for _ in range(60):
        x, other = torch.randn(2, 16, 4, generator=generator)

        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.float16):
                return model(x)

        def loss(x: Tensor = x) -> Tensor:
            return (forward(x).float() - x @ target).square().mean()

        optimizer.zero_grad()
        value = loss()
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        losses.append(value.item())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a scale that is too large at first
            optimizer.meta_step(
                loss=loss, outputs=lambda other=other: forward(other), loss_scale=scaler.get_scale()
            )
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.meta_steps > 40
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_loss_scale_keeps_what_float16_would_lose() -> None:
    """dQ/dφ of a loss of 1e-7: its derivatives in float16 are 0, but for the scale."""
    slopes = []
    for scale in (1.0, 2.0**20):
        model = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[0.5, -0.25]]))
        rule = apo.rules.SGD(model, lr=1.0)
        optimizer = apo.APO(
            model, rule, apo.ProximalObjective(), torch.optim.SGD(rule.parameters(), lr=0.1)
        )
        x = torch.tensor([[1.0, 2.0]])

        def loss(model: nn.Module = model, x: Tensor = x) -> Tensor:
            with torch.autocast("cpu", torch.float16):
                return model(x).float().add(1.0).square().mean() * 1e-9

        model.weight.grad = torch.tensor([[1e-3, 2e-3]])
        optimizer.meta_step(loss=loss, loss_scale=scale)
        assert rule.log_lr.grad is not None
        slopes.append(float(rule.log_lr.grad))
    # 2e-9 (1 + z) x, at θ' = θ − g in float16; φ's gradient is −⟨g, q⟩.
    z = float(((torch.tensor([[0.5, -0.25]]) - torch.tensor([[1e-3, 2e-3]])) @ x.T).sum())
    expected = -2e-9 * (1 + z) * (1e-3 + 4e-3)
    assert slopes[0] == 0.0
    # float16 rounds θ', its product with x and three factors of the derivative by 2⁻¹¹ each
    assert slopes[1] == pytest.approx(expected, rel=8 * 2.0**-11)
