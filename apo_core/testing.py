"""The conformance kit: does a third party's update rule keep the engine's contract?

```python
def test_my_rule():
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    apo_core.testing.check_update_rule(MyRule(model), model)
```

Each check is a function here whose first docstring line is what it demands; its message says what
was expected, what came, and why it matters. Needs torch alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from apo_core.objective import ProximalObjective
from apo_core.optimizer import APO
from apo_core.types import State, Tensors, trainable_parameters
from apo_core.update_rule import UpdateRule


def check_update_rule(rule: UpdateRule, model: nn.Module, seed: int = 0) -> None:
    """Run every check of `CHECKS` on copies of `rule` and `model`.

    Args:
        rule: the rule under test, built on `model`, φ at values where it is differentiable.
        model: any small module; its parameters in float64 make the checks sharpest.
        seed: of the random gradients.

    Raises:
        AssertionError: a check failed; the message names it.
        TypeError: `rule` is no UpdateRule.
    """
    if not isinstance(rule, UpdateRule):
        raise TypeError(f"`rule` must be an UpdateRule, got {type(rule).__name__}.")
    for name, check in CHECKS.items():
        try:
            check(copy.deepcopy(rule), copy.deepcopy(model), torch.Generator().manual_seed(seed))
        except AssertionError as failure:
            raise AssertionError(f"{type(rule).__name__} fails `{name}`: {failure}") from failure


def check_updates(rule: UpdateRule, model: nn.Module, generator: torch.Generator) -> None:
    """One finite update for each parameter, of its shape and dtype."""
    params, grads, state = _inputs(rule, model, generator)
    updates, _ = rule(params, grads, state)
    for name, p, u in zip(trainable_parameters(model), params, updates, strict=True):
        assert u.shape == p.shape, (
            f"the update of `{name}` must have shape {tuple(p.shape)}, got {tuple(u.shape)}; it is "
            "added to the parameter."
        )
        assert u.dtype == p.dtype, f"the update of `{name}` must be {p.dtype}, got {u.dtype}."
        assert bool(u.isfinite().all()), f"the update of `{name}` must be finite, got {u}."


def check_purity(rule: UpdateRule, model: nn.Module, generator: torch.Generator) -> None:
    """Neither the arguments, nor φ, nor the random state change, and a second call agrees."""
    params, grads, state = _inputs(rule, model, generator)
    phi = [p.detach().clone() for p in rule.parameters()]
    before = _copies(params, grads, state)
    random_state = torch.get_rng_state()
    first, _ = rule(params, grads, state)
    second, _ = rule(params, grads, state)
    assert torch.equal(random_state, torch.get_rng_state()), (
        "the update must draw no random numbers: the lookahead and the step must be the same."
    )
    after = _copies(params, grads, state)
    assert all(map(torch.equal, before, after)), (
        "params, grads and state must not be changed in place: the same gradients serve the "
        "lookahead and the step."
    )
    assert all(map(torch.equal, phi, rule.parameters())), "φ must not change in `forward`."
    assert all(map(torch.equal, first, second)), "two calls with equal arguments must agree."


def check_meta_gradient(rule: UpdateRule, model: nn.Module, generator: torch.Generator) -> None:
    """(∂u/∂φ)ᵀ w agrees with central differences for every φ, in a random direction each."""
    params, grads, state = _inputs(rule, model, generator)
    weights = [_normal_like(p, generator) for p in params]

    def pulled() -> Tensor:
        updates, _ = rule(params, grads, state)
        return torch.stack([(w * u).sum() for w, u in zip(weights, updates, strict=True)]).sum()

    with torch.no_grad():
        scale = torch.stack([w.norm() for w in weights]).norm() * torch.stack(
            [u.norm() for u in rule(params, grads, state)[0]]
        ).norm().clamp_min(1.0)
    for name, phi in rule.named_parameters():
        if not phi.requires_grad:
            continue  # a hyperparameter that is not learned
        assert pulled().requires_grad, "the updates must be differentiable in φ, got no graph."
        (gradient,) = torch.autograd.grad(pulled(), phi, allow_unused=True)
        assert gradient is not None, (
            f"the updates must depend on `{name}`; compute them from the parameter itself, without "
            ".data, .item() or detach(), or APO cannot learn it."
        )
        direction = _normal_like(phi, generator)
        # With h = eps^(1/3), truncation and rounding are both of the order eps^(2/3) of the
        # update's scale; eps^(1/2) leaves a factor eps^(-1/6) for larger third derivatives.
        eps = max(torch.finfo(p.dtype).eps for p in (phi, *params))
        h = eps ** (1 / 3) * max(1.0, float(phi.detach().abs().max()))
        with torch.no_grad():
            centre = phi.detach().clone()
            phi.copy_(centre + h * direction)
            above = pulled()
            phi.copy_(centre - h * direction)
            below = pulled()
            phi.copy_(centre)
        expected = float((above - below) / (2 * h))
        got = float((gradient * direction).sum())
        allowed = eps**0.5 * float(scale) * float(direction.norm())
        assert abs(got - expected) <= allowed, (
            f"the derivative in `{name}` must agree with central differences, expected {expected}, "
            f"got {got}, allowed error {allowed}; a wrong one sends the meta-optimizer astray."
        )


def check_zero_gradient(rule: UpdateRule, model: nn.Module, generator: torch.Generator) -> None:
    """Finite updates and finite φ-gradients at g = 0, as in a dead unit."""
    params, grads, state = _inputs(rule, model, generator)
    updates, _ = rule(params, [torch.zeros_like(g) for g in grads], state)
    total = torch.stack([u.sum() for u in updates]).sum()
    learned = [phi for phi in rule.parameters() if phi.requires_grad]
    pulled = torch.autograd.grad(total, learned, allow_unused=True)
    for value in [*updates, *(p for p in pulled if p is not None)]:
        assert bool(value.isfinite().all()), (
            f"a zero gradient must give finite updates and derivatives, got {value}; add an ε "
            "under the root or the fraction."
        )


def check_save_load(rule: UpdateRule, model: nn.Module, generator: torch.Generator) -> None:
    """φ is all in `state_dict`: a loaded rule takes the same step."""
    params, grads, state = _inputs(rule, model, generator)
    saved = copy.deepcopy(rule.state_dict())
    expected, _ = rule(params, grads, state)
    with torch.no_grad():
        for phi in rule.parameters():
            phi.add_(0.5)
    rule.load_state_dict(saved)
    got, _ = rule(params, grads, state)
    assert all(map(torch.equal, expected, got)), (
        "a rule with its `state_dict` loaded must take the step that it took when it was saved; "
        "keep φ in nn.Parameters and other tensors in buffers."
    )


def check_meta_step(rule: UpdateRule, model: nn.Module, generator: torch.Generator) -> None:
    """A meta-step of APO changes φ, leaves θ and `.grad` bit for bit, and a step moves θ."""
    named = trainable_parameters(model)
    target, weight = ([_normal_like(p, generator) for p in named.values()] for _ in range(2))

    def loss() -> Tensor:  # curvatures differ, so that no step is optimal by chance
        triples = zip(weight, named.values(), target, strict=True)
        return torch.stack([(w * (p - t)).square().sum() for w, p, t in triples]).sum()

    optimizer = APO(
        model, rule, ProximalObjective(), torch.optim.SGD(rule.parameters(), lr=1e-3), interval=1
    )
    loss().backward()
    theta = [p.detach().clone() for p in model.parameters()]
    phi = [p.detach().clone() for p in rule.parameters()]
    optimizer.meta_step(loss=loss)
    assert all(map(torch.equal, theta, model.parameters())), "a meta-step must leave θ alone."
    assert not all(map(torch.equal, phi, rule.parameters())), "a meta-step must change φ."
    optimizer.step()
    assert not all(map(torch.equal, theta, model.parameters())), "a step must move θ."


CHECKS: dict[str, Callable[[UpdateRule, nn.Module, torch.Generator], None]] = {
    "updates": check_updates,
    "purity": check_purity,
    "meta-gradient": check_meta_gradient,
    "zero gradient": check_zero_gradient,
    "save and load": check_save_load,
    "meta-step": check_meta_step,
}
"""The checks by name, in the order in which they run."""


def _inputs(
    rule: UpdateRule, model: nn.Module, generator: torch.Generator
) -> tuple[Tensors, Tensors, State]:
    """θ, g, and the state after one step, so that a memory is not empty."""
    params = [p.detach() for p in trainable_parameters(model).values()]
    first, grads = ([_normal_like(p, generator) for p in params] for _ in range(2))
    with torch.no_grad():
        _, state = rule(params, first, rule.init_state(params))
    return params, grads, state


def _copies(params: Tensors, grads: Tensors, state: State) -> Tensors:
    return [t.clone() for t in [*params, *grads, *(t for ts in state.values() for t in ts)]]


def _normal_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, drawn on the CPU so that they are the same on every device."""
    draw = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return draw.to(tensor.device, tensor.dtype)
