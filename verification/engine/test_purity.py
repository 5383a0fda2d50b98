"""A meta-step changes φ and nothing else: θ, gradients, buffers, random state, modes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import apo_core as apo
from verification.engine.scenes import MODES, RULES, Scene, classifier, scene, values
from verification.profiles import share
from verification.tolerances import ROUNDING, assert_close


def trace(s: Scene) -> list[Tensor]:
    """All that a meta-step must leave as it was, bit for bit."""
    grads = [p.grad.clone() for p in s.model.parameters() if p.grad is not None]
    buffers = [b.clone() for b in s.model.buffers()]
    return [*values(s.model), *grads, *buffers, torch.get_rng_state()]


def assert_untouched(s: Scene, before: list[Tensor]) -> None:
    after = trace(s)
    assert len(after) == len(before)
    assert [i for i, (a, b) in enumerate(zip(after, before, strict=True)) if not a.equal(b)] == []


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("loss", "fsd"), MODES)
@share(0.2)
@given(seed=st.integers(0, 2**16))
def test_a_meta_step_leaves_no_trace(rule: str, loss: str, fsd: str, seed: int) -> None:
    objective = apo.ProximalObjective("kl", 0.3, 0.1, loss, fsd)  # pyright: ignore[reportArgumentType]
    s = scene(rule, seed=seed, objective=objective)
    s.backward()
    phi, before = values(s.optimizer.rule), trace(s)
    modes = [m.training for m in s.model.modules()]
    s.meta_step()
    assert_untouched(s, before)
    assert modes == [m.training for m in s.model.modules()]
    assert not all(map(torch.equal, phi, s.optimizer.rule.parameters())), "φ must have moved"


@pytest.mark.parametrize("failing", ["loss", "outputs at θ", "outputs at θ'"])
def test_an_exception_in_a_closure_leaves_no_trace(failing: str) -> None:
    s = scene("ekfac")
    s.backward()
    before, calls = trace(s), 0

    def outputs() -> Tensor:
        nonlocal calls
        calls += 1
        if failing == ("outputs at θ" if calls == 1 else "outputs at θ'"):
            torch.rand(3)
            raise KeyError("the user's own")
        return s.outputs()

    def loss() -> Tensor:
        if failing == "loss":
            raise KeyError("the user's own")
        return s.loss()

    with pytest.raises(KeyError, match="the user's own"):
        s.optimizer.meta_step(loss=loss, outputs=outputs)
    assert_untouched(s, before)


@pytest.mark.parametrize(
    "discrepancy",
    [
        "kl",
        "squared_error",
        apo.CategoricalKL("current_lookahead"),
        apo.SquaredEuclidean(half=False),
        apo.Bregman("cross_entropy"),
        apo.Bregman("squared_error"),
    ],
    ids=["kl", "squared_error", "kl reversed", "no half", "bregman ce", "bregman se"],
)
@pytest.mark.parametrize("fsd", ["exact", "quadratic"])
@given(seed=st.integers(0, 2**16))
def test_no_step_is_no_discrepancy(discrepancy: str | apo.Discrepancy, fsd: str, seed: int) -> None:
    """D_F(θ, θ) = 0 exactly, with dropout and BatchNorm in training mode."""
    objective = apo.ProximalObjective(discrepancy, 0.3, 0.1, fsd=fsd)  # pyright: ignore[reportArgumentType]
    s = scene(seed=seed, objective=objective)
    for p in s.model.parameters():
        p.grad = torch.zeros_like(p)
    terms = s.meta_step()
    assert terms.fsd.item() == 0.0
    assert terms.wsd.item() == 0.0


def test_the_dropout_mask_follows_the_random_state() -> None:
    """The mask is shared by two passes, not frozen: the same random state gives the same Q."""
    s = scene(meta_lr=0.0)
    s.backward()
    first, second = s.meta_step(), s.meta_step()
    torch.manual_seed(1)
    third = s.meta_step()
    assert all(map(torch.equal, first, second))
    assert third.fsd.item() != second.fsd.item()
    assert third.loss.item() != second.loss.item()


@given(seed=st.integers(0, 2**16), fsd_weight=st.sampled_from([0.0, 0.3]))
def test_passes_and_where_they_run(seed: int, fsd_weight: float) -> None:
    """P22 section 4.5: three forward passes, of which the loss and one output at θ' = θ + Δ."""
    objective = apo.ProximalObjective("kl", fsd_weight)
    s = scene(seed=seed, objective=objective)
    s.backward()
    theta = values(s.model)
    ahead = [p.detach() - s.lr * p.grad for p in s.model.parameters() if p.grad is not None]
    seen: list[str] = []

    def where(name: str) -> None:
        if all(map(torch.equal, theta, s.model.parameters())):
            seen.append(f"{name} at θ")
        elif all(torch.equal(a, p) for a, p in zip(ahead, s.model.parameters(), strict=True)):
            seen.append(f"{name} at θ'")
        else:
            seen.append(f"{name} elsewhere")

    def loss() -> Tensor:
        where("loss")
        return s.loss()

    def outputs() -> Tensor:
        where("outputs")
        return s.outputs()

    s.optimizer.meta_step(loss=loss, outputs=outputs)
    fsd_passes = ["outputs at θ", "outputs at θ'"] if fsd_weight else []
    assert sorted(seen) == sorted(["loss at θ'", *fsd_passes])


def test_frozen_and_tied_parameters() -> None:
    """A frozen parameter has no φ and stays; a tied one is moved once."""
    torch.manual_seed(0)
    model = classifier()
    model[0].requires_grad_(False)
    last, first = nn.Linear(3, 3, dtype=torch.float64), model[0]
    assert isinstance(first, nn.Conv2d)
    tied = nn.Sequential(model, last, last)
    rule = apo.rules.Preconditioned(tied, apo.EKFAC, 0.2)
    assert len(rule.preconditioners) == 2 + 2 + 2  # BatchNorm, the last Linear, the tied Linear
    optimizer = apo.APO(
        tied, rule, apo.ProximalObjective("kl", 0.1), torch.optim.Adam(rule.parameters())
    )
    frozen = first.weight.detach().clone()
    x = torch.randn(6, 1, 3, 3, dtype=torch.float64)
    loss = tied(x).square().mean()
    loss.backward()
    assert last.weight.grad is not None
    before, grad = last.weight.detach().clone(), last.weight.grad.clone()
    optimizer.step()
    assert torch.equal(frozen, first.weight)
    step = before - 0.2**2 * grad
    assert_close(last.weight.detach().numpy(), step.numpy(), ROUNDING, scale=float(before.norm()))
