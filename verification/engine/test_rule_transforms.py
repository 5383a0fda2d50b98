"""Every way to call a rule gives one step: with a graph, without, by torch.func and in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import apo_core as apo
from apo_core.types import State
from verification.engine import scenes
from verification.profiles import share
from verification.tolerances import BITWISE, FUNCTION, ROUNDING, assert_close

MEMBERS = 3
seeds = st.integers(0, 2**16)
Build = Callable[[nn.Module], apo.UpdateRule]


def by_shape(name: str, parameter: nn.Parameter) -> str:
    """Weights and the rest."""
    return "matrices" if parameter.dim() > 1 else "rest"


RULES: dict[str, Build] = {
    # An optimizer's own step is in place, which torch.func cannot follow.
    **{
        name: build
        for name, build in scenes.RULES.items()
        if name not in ("any optimizer", "grouped")
    },
    "rmsprop at half": lambda m: apo.rules.RMSprop(m, 0.01),
    "adam per layer": lambda m: apo.rules.Adam(m, 0.01, learn=("lr", "eps"), per_layer=True),
    "kfac": lambda m: observed(m, apo.rules.KFAC(m, per_layer=True)),
    "grouped": lambda m: apo.rules.Grouped(
        m, by_shape, matrices=apo.rules.Preconditioned, rest=partial(apo.rules.Adam, lr=0.01)
    ),
}


class Network(nn.Module):
    """Two layers and a temperature, a parameter without dimension; float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.temperature = nn.Parameter(torch.ones(()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, (batch, 2)."""
        return self.temperature * self.layers(x)


def observed(model: nn.Module, rule: apo.rules.KFAC) -> apo.rules.KFAC:
    """K-FAC with factors."""
    with rule.observe(model):
        model(torch.randn(6, 3, dtype=torch.float64)).square().mean().backward()
    return rule


def case(name: str, seed: int) -> tuple[apo.UpdateRule, list[Tensor], list[Tensor], State]:
    """A rule with φ moved at random, θ, g, and the state that a step on another g left."""
    torch.manual_seed(seed)
    model = Network()
    rule = RULES[name](model)
    with torch.no_grad():
        for phi in rule.parameters():
            if phi.requires_grad:
                phi.add_(0.1 * torch.randn_like(phi))
    params = [p.detach() for p in model.parameters()]
    first, g = ([torch.randn_like(p) for p in params] for _ in range(2))
    with torch.no_grad():
        _, state = rule(params, first, rule.init_state(params))
    return rule, params, g, state


def flat(tensors: list[Tensor]) -> Tensor:
    """All entries, (n,)."""
    return torch.cat([t.reshape(-1) for t in tensors])


@pytest.mark.parametrize("name", RULES)
@share(0.25)
@given(seed=seeds)
def test_a_step_is_the_same_with_a_graph_and_without(name: str, seed: int) -> None:
    """Without one it is batched and overwrites its temporaries; neither may change an argument."""
    rule, params, g, state = case(name, seed)
    before = [t.clone() for t in [*params, *g, *(t for ts in state.values() for t in ts)]]
    updates, after = rule(params, g, state)
    with torch.no_grad():
        plain, plain_after = rule(params, g, state)
    assert all(u.requires_grad for u in updates)
    assert [u.shape for u in plain] == [p.shape for p in params]
    now = [*params, *g, *(t for ts in state.values() for t in ts)]
    assert all(map(torch.equal, before, now))
    # The same operations on the same numbers, one tensor after the other.
    assert_close(flat(plain).numpy(), flat(updates).detach().numpy(), BITWISE)
    for key, tensors in after.items():
        assert all(map(torch.equal, tensors, plain_after[key]))


@pytest.mark.parametrize("name", RULES)
@share(0.1)
@given(seed=seeds)
def test_vmap_over_phi_steps_as_each_member_does(name: str, seed: int) -> None:
    """A population of φ at one θ: the updates, and dQ/dφ for a given q, of every member."""
    rule, params, g, state = case(name, seed)
    q = [torch.randn_like(p) for p in params]
    phi = {
        key: torch.stack([p.detach() + 0.1 * member for member in range(MEMBERS)])
        for key, p in rule.named_parameters()
    }

    def step(member: dict[str, Tensor]) -> list[Tensor]:
        return functional_call(rule, member, (params, g, state))[0]

    def pulled(member: dict[str, Tensor]) -> Tensor:
        return torch.stack([(u * w).sum() for u, w in zip(step(member), q, strict=True)]).sum()

    slopes = vmap(grad(pulled))(phi)
    with torch.no_grad():
        together = vmap(step)(phi)
    for member in range(MEMBERS):
        with torch.no_grad():
            for key, p in rule.named_parameters():
                p.copy_(phi[key][member])
        updates, _ = rule(params, g, state)
        got = flat([u[member] for u in together])
        assert_close(got.detach().numpy(), flat(updates).detach().numpy(), FUNCTION, size=8)
        learned = {key: p for key, p in rule.named_parameters() if p.requires_grad}
        total = flat(updates) @ flat(q)
        for key, expected in zip(
            learned, torch.autograd.grad(total, list(learned.values())), strict=True
        ):
            # A sum over the update's entries, of terms that may cancel.
            scale = float(flat(updates).detach().abs() @ flat(q).abs())
            assert_close(
                slopes[key][member].numpy(),
                expected.numpy(),
                FUNCTION,
                iterations=4,
                size=len(flat(q)),
                scale=scale,
                what=f"dQ/d{key}",
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sgd", "heavy ball", "rmsprop", "rmsprop at half", "adamw"])
def test_sixteen_bit_updates_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    """The step of 16-bit θ, g and state is that of their float32 copies, rounded."""
    torch.manual_seed(0)
    halves = Network().to(dtype)
    rule = RULES[name](halves)
    params = [p.detach() for p in halves.parameters()]
    # At least ½ in size, so that Adam's (1 − β₂) g² is a normal number of float16.
    g = [(torch.rand_like(p) + 0.5) * torch.randn_like(p).sign() for p in params]
    wide = RULES[name](Network().float())
    expected, _ = wide([p.float() for p in params], [x.float() for x in g], {})
    updates, _ = rule(params, g, {})
    with torch.no_grad():
        plain, _ = rule(params, g, {})
    assert all(u.dtype == dtype for u in updates)
    assert all(map(torch.equal, plain, updates))
    if name in ("sgd", "heavy ball"):
        assert all(map(torch.equal, updates, [u.detach().to(dtype) for u in expected]))
    # Roundings to 16 bits, of ½ eps each: of m, of v (half of it through the root), of the root, of
    # its bias correction, and of the result; and as much as a tenth of that in higher orders.
    allowed = 1.1 * 4.5 * 0.5 * torch.finfo(dtype).eps
    for got, wanted in zip(updates, expected, strict=True):
        assert bool(((got.float() - wanted).abs() <= allowed * wanted.abs()).all())


def test_one_minus_beta_to_the_t_keeps_its_digits_in_32_bits() -> None:
    """1 − 0.999 in float32 would be off by 5e-5: Adam's first step is η to all digits."""
    model = nn.Linear(40, 30)
    rule = apo.rules.Adam(model, lr=0.125, eps=1e-30)
    g = [torch.randn_like(p) for p in model.parameters()]
    with torch.no_grad():
        updates, _ = rule([p.detach() for p in model.parameters()], g, {})
    for update, x in zip(updates, g, strict=True):
        expected = (-0.125 * x.sign()).numpy()
        assert_close(update.numpy(), expected, ROUNDING.at("float32"), size=8, iterations=2)
