"""The conformance kit passes the README's rule, and catches what is wrong with broken ones."""

import copy

import pytest
import torch
from torch import Tensor, nn

import apo_core as apo
import apo_core.testing
from verification.examples.softsign import Softsign


def linear(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_softsign_conforms(dtype: torch.dtype) -> None:
    model = linear(dtype)
    apo_core.testing.check_update_rule(Softsign(model), model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "build",
    [
        lambda m: apo.rules.SGD(m),
        lambda m: apo.rules.SGD(m, momentum=0.9, lookahead_momentum=True),
        lambda m: apo.rules.SGD(m, momentum=0.9, nesterov=True, per_layer=True),
        lambda m: apo.rules.Preconditioned(m, apo.Dense),
        lambda m: apo.rules.Preconditioned(m, apo.Diagonal),
        lambda m: apo.rules.Preconditioned(m, apo.EKFAC, initial_scale=0.3),
    ],
    ids=["sgd", "heavy-ball", "nesterov-per-layer", "dense", "diagonal", "ekfac"],
)
def test_own_rules_conform(build: type, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 4, dtype=dtype), nn.Tanh(), nn.Linear(4, 2, dtype=dtype))
    apo_core.testing.check_update_rule(build(model), model)


def test_softsign_trains_through_apo() -> None:
    """One meta-step moves both φ; 200 steps with them lower a quadratic loss by half at least."""
    model = linear()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(3, 2, generator=generator, dtype=torch.float64)

    def loss() -> Tensor:
        return 0.5 * (model(x) - y).square().sum(1).mean()

    rule = Softsign(model)
    phi = copy.deepcopy(rule.state_dict())
    meta = torch.optim.RMSprop(rule.parameters(), lr=0.1)
    optimizer = apo.APO(model, rule, apo.ProximalObjective("squared_error", 0.1), meta)
    start = float(loss().detach())
    for _ in range(200):
        optimizer.zero_grad()
        loss().backward()
        if optimizer.meta_due:
            optimizer.meta_step(loss=loss, outputs=lambda: model(x))
        optimizer.step()
    assert all(not torch.equal(phi[name], p) for name, p in rule.state_dict().items())
    assert float(loss().detach()) < 0.5 * start


class _Broken(apo.UpdateRule):
    """−η g, with one flaw."""

    def __init__(self, model: nn.Module, flaw: str) -> None:
        super().__init__()
        self.flaw = flaw
        self.log_lr = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def init_state(self, params: list[Tensor]) -> dict[str, list[Tensor]]:
        return {}

    def forward(
        self, params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]]
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        lr = self.log_lr.exp()
        if self.flaw == "shape":
            return [-lr * g.reshape(-1) for g in grads], state
        if self.flaw == "dtype":
            return [(-lr * g).float() for g in grads], state
        if self.flaw == "in place":
            return [-lr * g.mul_(2.0) for g in grads], state
        if self.flaw == "random":
            return [-lr * g * torch.rand((), dtype=g.dtype) for g in grads], state
        if self.flaw == "detached":
            return [-self.log_lr.detach().exp() * g for g in grads], state
        if self.flaw == "wrong derivative":
            return [-(lr + lr.detach()) * g for g in grads], state
        norm = torch.stack([g.norm() for g in grads]).norm()  # "zero": 0 / 0
        return [-lr * g / norm for g in grads], state


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("shape", r"fails `updates`: the update of `weight` must have shape \(2, 3\)"),
        ("dtype", "fails `updates`: .* must be torch.float64, got torch.float32"),
        ("in place", "fails `purity`: params, grads and state must not be changed"),
        ("random", "fails `purity`: the update must draw no random numbers"),
        ("detached", "fails `meta-gradient`: the updates must be differentiable in φ"),
        ("wrong derivative", "fails `meta-gradient`: the derivative in `log_lr` must agree"),
        ("zero", "fails `zero gradient`: a zero gradient must give finite updates"),
    ],
)
def test_broken_rules_are_caught(flaw: str, message: str) -> None:
    model = linear()
    with pytest.raises(AssertionError, match=message):
        apo_core.testing.check_update_rule(_Broken(model, flaw), model)


def test_only_rules_are_checked() -> None:
    model = linear()
    with pytest.raises(TypeError, match="`rule` must be an UpdateRule, got Linear"):
        apo_core.testing.check_update_rule(model, model)  # pyright: ignore[reportArgumentType]
