"""Groups of parameters with a rule each: against torch.optim, unrolled autograd and one rule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, log_softmax

import apo_core as apo
from apo_core.rules import SGD, Adam, Grouped, LearningRate, Preconditioned
from apo_core.testing import check_update_rule
from verification.engine.scenes import RULES, scene, values
from verification.examples.softsign import Softsign
from verification.profiles import share
from verification.tolerances import FUNCTION, MINIMIZER, ROUNDING, assert_close

seeds = st.integers(0, 2**16)
rates = st.floats(1e-3, 0.3)
Build = Callable[[nn.Module], apo.UpdateRule]


def by_shape(name: str, parameter: nn.Parameter) -> str:
    """Weights and the rest."""
    return "matrices" if parameter.dim() > 1 else "rest"


def network(seed: int = 0) -> nn.Sequential:
    """Two layers in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def inputs(rule: apo.UpdateRule, model: nn.Module) -> tuple[list[Tensor], list[Tensor], Any]:
    """θ, g, and the state after a step on another g."""
    params = [p.detach() for p in model.parameters()]
    first, grads = ([torch.randn_like(p) for p in params] for _ in range(2))
    with torch.no_grad():
        _, state = rule(params, first, rule.init_state(params))
    return params, grads, state


def flat(tensors: list[Tensor]) -> Any:
    """All entries, (n,), in NumPy."""
    return torch.cat([t.detach().reshape(-1) for t in tensors]).numpy()


@pytest.mark.loose(
    "‖H‖ ≤ 10 is for inputs of order 3 that all point one way; random ones bend the loss far less, "
    "and nearly all operations are the same on both sides."
)
@share(0.5)
@given(seed=seeds, slow=rates, fast=rates, nesterov=st.booleans())
def test_with_phi_frozen_two_rates_are_torchs_parameter_groups(
    seed: int, slow: float, fast: float, nesterov: bool
) -> None:
    """Step by step, with a meta-step before each, which must leave no trace in any group."""
    ours, theirs = network(seed), network(seed)
    sgd = partial(SGD, momentum=0.9, nesterov=nesterov)
    rule = Grouped(ours, by_shape, matrices=partial(sgd, lr=slow), rest=partial(sgd, lr=fast))
    objective = apo.ProximalObjective("squared_error", 0.1)
    frozen = torch.optim.SGD(rule.parameters(), lr=0.0)
    optimizer = apo.APO(ours, rule, objective, frozen, interval=1)
    matrices, rest = ([p for p in theirs.parameters() if (p.dim() > 1) == m] for m in (True, False))
    groups = [{"params": matrices, "lr": slow}, {"params": rest, "lr": fast}]
    base = torch.optim.SGD(groups, momentum=0.9, nesterov=nesterov)
    x = torch.randn(5, 3, dtype=torch.float64)
    for number in range(4):
        for model, step in ((ours, optimizer), (theirs, base)):
            step.zero_grad()
            model(x + number).square().mean().backward()
            if step is optimizer:
                optimizer.meta_step(
                    loss=lambda: ours(x).square().mean(), outputs=lambda: ours(2.0 * x)
                )
            step.step()
        # η is exp(log η); each step's passes are sums over at most 5 examples and 4 units.
        assert_close(
            flat(list(ours.parameters())),
            flat(list(theirs.parameters())),
            FUNCTION,
            iterations=4 * (number + 1),
            condition=10.0,  # the gradient changes by at most ‖H‖ ‖Δθ‖, inputs being of order 3
            what=f"θ after step {number + 1}",
        )


@pytest.mark.parametrize("name", RULES)
@share(0.1)
@given(seed=seeds)
def test_one_group_is_the_rule_itself_bit_for_bit(name: str, seed: int) -> None:
    alone, grouped = scene(name, seed=seed), scene("sgd", seed=seed)
    rule = Grouped(grouped.model, lambda name, p: "all", all=RULES[name])
    assert rule.lookahead_from_state == alone.optimizer.rule.lookahead_from_state or not (
        alone.optimizer.rule_state
    )
    grouped.optimizer = apo.APO(
        grouped.model,
        rule,
        alone.optimizer.objective,
        torch.optim.RMSprop(rule.parameters(), lr=0.05),
        alone.optimizer.interval,
    )
    results = []
    for s in (alone, grouped):
        torch.manual_seed(seed)
        s.run(3)
        s.backward()
        s.meta_step()
        slopes = [p.grad for p in s.optimizer.rule.parameters() if p.grad is not None]
        results.append([*values(s.model), *values(s.optimizer.rule), *slopes])
    assert len(results[0]) == len(results[1])
    assert all(map(torch.equal, *results))


@pytest.mark.loose(
    "‖H‖ ≤ 10 is for inputs of order 3 that all point one way; random ones bend the loss far less, "
    "and nearly all operations are the same on both sides."
)
@given(seed=seeds, slow=rates, fast=rates)
def test_the_meta_gradient_is_that_of_the_unrolled_step(
    seed: int, slow: float, fast: float
) -> None:
    """dQ/d(log η, s) through the whole network by autograd: −ηg for weights, −s²g for the rest."""
    model = network(seed)
    rule = Grouped(
        model,
        by_shape,
        matrices=partial(SGD, lr=slow),
        rest=partial(Preconditioned, structure=apo.Diagonal, initial_scale=fast),
    )
    objective = apo.ProximalObjective("kl", 0.3, 0.1)
    optimizer = apo.APO(model, rule, objective, torch.optim.SGD(rule.parameters(), lr=0.1))
    x, other = torch.randn(2, 5, 3, dtype=torch.float64)
    y = torch.randint(2, (5,))
    cross_entropy(model(x), y).backward()
    optimizer.meta_backward(loss=lambda: cross_entropy(model(x), y), outputs=lambda: model(other))
    got = [p.grad for p in rule.parameters() if p.grad is not None]

    log_lr = torch.tensor(slow, dtype=torch.float64).log().requires_grad_()
    scales = [torch.full((n,), fast, dtype=torch.float64, requires_grad=True) for n in (4, 2)]
    theta = {name: p.detach() for name, p in model.named_parameters()}
    g = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    factors = {
        "0.weight": log_lr.exp(),
        "2.weight": log_lr.exp(),
        "0.bias": scales[0] ** 2,
        "2.bias": scales[1] ** 2,
    }
    ahead = {name: theta[name] - factors[name] * g[name] for name in theta}
    now, then = (log_softmax(functional_call(model, at, other), -1) for at in (theta, ahead))
    fsd = (then.exp() * (then - now)).sum(-1).mean()
    wsd = torch.stack([(ahead[name] - theta[name]).square().sum() for name in theta]).sum()
    q = cross_entropy(functional_call(model, ahead, x), y) + 0.3 * fsd + 0.05 * wsd
    expected = torch.autograd.grad(q, [log_lr, *scales])
    assert len(got) == len(expected)
    # Five chained passes of sums over 5 examples or 4 units; inputs are of order 3, rates below 1.
    scale = float(torch.cat([gradient.reshape(-1) for gradient in g.values()]).norm())
    assert_close(
        flat(got), flat(list(expected)), FUNCTION, iterations=10, condition=10.0, scale=scale
    )


class TwoScales(nn.Module):
    """½ h_a ‖a‖² + ½ h_b ‖b‖²."""

    def __init__(self, h_a: float, h_b: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.b = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.h = (h_a, h_b)

    def loss(self) -> Tensor:
        """The loss at the present parameters."""
        return 0.5 * (self.h[0] * self.a.square().sum() + self.h[1] * self.b.square().sum())


@share(0.5)
@given(h=st.tuples(st.floats(0.5, 2.0), st.floats(0.5, 2.0)), wsd=st.sampled_from([0.0, 0.1, 1.0]))
def test_every_group_learns_its_own_best_rate(h: tuple[float, float], wsd: float) -> None:
    """η_k = 1 / (h_k + λ_WSD), where Q's part of group k has its minimum."""
    model = TwoScales(*h)
    rule = Grouped(model, lambda name, p: name, a=partial(SGD, lr=0.3), b=partial(SGD, lr=0.5))
    solver = torch.optim.LBFGS(
        rule.parameters(), max_iter=200, tolerance_grad=0, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    optimizer = apo.APO(model, rule, apo.ProximalObjective(wsd_weight=wsd), solver)
    model.loss().backward()
    optimizer.meta_step(loss=model.loss)
    best = torch.tensor([1.0 / (one + wsd) for one in h], dtype=torch.float64)
    curves = [n * one**2 / (one + wsd) for n, one in zip((2, 3), h, strict=True)]  # Q'' in log η
    assert_close(
        torch.stack([phi.detach() for phi in rule.parameters()]).numpy(),
        best.log().numpy(),
        MINIMIZER,
        size=18,
        condition=max(1.0, model.loss().item() / min(curves)),
        scale=1.0,
    )


COMBINATIONS: dict[str, Build] = {
    "ekfac and adam": lambda m: Grouped(
        m, by_shape, matrices=Preconditioned, rest=partial(Adam, lr=0.1, eps=0.1)
    ),
    "dense and any optimizer": lambda m: Grouped(
        m,
        by_shape,
        matrices=lambda m: LearningRate(m, torch.optim.AdamW(m.parameters(), 0.1)),
        rest=partial(Preconditioned, structure=apo.Dense),
    ),
    "a third party's and heavy balls": lambda m: Grouped(
        m, by_shape, matrices=Softsign, rest=partial(SGD, momentum=0.9, per_layer=True)
    ),
    "groups in a group": lambda m: Grouped(
        m,
        by_shape,
        matrices=lambda m: Grouped(
            m, lambda name, p: "first" if name[0] == "0" else "last", first=Adam, last=Adam
        ),
        rest=SGD,
    ),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_it_passes_the_conformance_kit(name: str) -> None:
    model = network()
    check_update_rule(COMBINATIONS[name](model), model)


@pytest.mark.parametrize("chosen", ["all parameters", "its own"])
def test_an_optimizer_in_a_group_leaves_the_parameters_of_the_others(chosen: str) -> None:
    """AdamW moves its own group as torch's, also when it was handed the whole model."""
    ours, theirs = network(), network()

    def adamw(m: nn.Module) -> LearningRate:
        own = [p for p in m.parameters() if p.requires_grad or chosen == "all parameters"]
        return LearningRate(m, torch.optim.AdamW(own, lr=0.01, weight_decay=0.1))

    rule = Grouped(ours, by_shape, matrices=adamw, rest=partial(SGD, lr=0.1))
    frozen = torch.optim.SGD(rule.parameters(), lr=0.0)
    optimizer = apo.APO(ours, rule, apo.ProximalObjective(), frozen, interval=1)
    matrices, rest = ([p for p in theirs.parameters() if (p.dim() > 1) == m] for m in (True, False))
    base = (
        torch.optim.AdamW(matrices, lr=0.01, weight_decay=0.1),
        torch.optim.SGD(rest, lr=0.1),
    )
    for number in range(3):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        kept = [p.grad for p in ours.parameters()]
        optimizer.meta_step(loss=lambda: ours(torch.ones(3, dtype=torch.float64)).sum())
        optimizer.step()
        assert all(p.grad is g for p, g in zip(ours.parameters(), kept, strict=True))
        for step in base:
            step.step()
        # θ + (θ' − θ) rounds once more than θ' itself; the learning rate is exp(log η).
        assert_close(
            flat(list(ours.parameters())),
            flat(list(theirs.parameters())),
            FUNCTION,
            iterations=number + 1,
            size=4,
            what=f"θ after step {number + 1}",
        )


def test_K_FAC_in_a_group_is_K_FAC_with_the_others_frozen() -> None:
    ours, theirs = network(), network()
    for layer in (theirs[0], theirs[2]):
        layer.get_parameter("bias").requires_grad_(False)
    rule = Grouped(ours, by_shape, matrices=partial(apo.rules.KFAC, lr=0.1), rest=SGD)
    alone, x = apo.rules.KFAC(theirs, lr=0.1), torch.randn(6, 3, dtype=torch.float64)
    inner = rule.rules["matrices"]
    assert isinstance(inner, apo.rules.KFAC)
    for factored, model in ((inner, ours), (alone, theirs)):
        with factored.observe(model):
            model(x).square().mean().backward()
    pairs = {
        name: (p.detach(), p.grad) for name, p in ours.named_parameters() if p.grad is not None
    }
    updates, _ = rule([p for p, _ in pairs.values()], [g for _, g in pairs.values()], {})
    own = [pairs[name] for name in rule.names["matrices"]]
    expected, _ = alone([p for p, _ in own], [g for _, g in own], {})
    for got, wanted in zip((updates[0], updates[2]), expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_joint_structure_is_one_matrix_over_its_group() -> None:
    """Biases 0 and 2, 4 + 2 entries: −P g of them, whatever the weights are."""
    model = network()
    rule = Grouped(model, by_shape, matrices=SGD, rest=partial(Preconditioned, structure=apo.Dense))
    P = torch.randn(6, 6, dtype=torch.float64)
    (phi,) = rule.rules["rest"].parameters()
    with torch.no_grad():
        phi.copy_(P)
    params, grads, _ = inputs(rule, model)
    updates, _ = rule(params, grads, {})
    g = flat([grads[1], grads[3]])
    assert_close(flat([updates[1], updates[3]]), -P.numpy() @ g, ROUNDING, condition=10.0)


def test_the_state_is_under_the_groups_names_and_empty_elsewhere() -> None:
    model = network()
    rule = COMBINATIONS["ekfac and adam"](model)
    _, _, state = inputs(rule, model)
    assert sorted(state) == ["rest.exp_avg", "rest.exp_avg_sq", "rest.step"]
    shapes = [tuple(t.shape) for t in state["rest.exp_avg"]]
    assert shapes == [(0,), (4,), (0,), (2,)]


def test_groups_are_named_and_reached() -> None:
    model = network()
    rule = Grouped(
        model, by_shape, matrices=partial(SGD, lr=0.5), rest=partial(SGD, per_layer=True)
    )
    assert rule.names == {"matrices": ("0.weight", "2.weight"), "rest": ("0.bias", "2.bias")}
    inner = rule.rules["rest"]
    assert isinstance(inner, SGD)
    assert inner.layers == ("0", "2")
    assert [name for name, _ in rule.named_parameters()] == [
        "rules.matrices.log_lr",
        "rules.rest.log_lr",
    ]
    assert rule.elementwise
    assert not Grouped(model, by_shape, matrices=Preconditioned, rest=SGD).elementwise


@pytest.mark.parametrize("ahead", [False, True])
def test_rules_with_a_memory_look_ahead_in_one_way(ahead: bool) -> None:
    model, heavy = network(), partial(SGD, momentum=0.9)
    rule = Grouped(model, by_shape, matrices=partial(heavy, lookahead_momentum=ahead), rest=SGD)
    assert rule.lookahead_from_state is ahead
    mixed = partial(Grouped, model, by_shape, rest=Adam)
    assert mixed(matrices=partial(heavy, lookahead_momentum=True)).lookahead_from_state
    with pytest.raises(ValueError, match="`lookahead_from_state` must be the same for all rules"):
        mixed(matrices=heavy)


@pytest.mark.parametrize(
    ("assign", "factories", "error", "message"),
    [
        (by_shape, {"matrices": SGD}, ValueError, r"return one of .*, got 'rest' for `0\.bias`"),
        (lambda n, p: "a", {"a": SGD, "b": SGD}, ValueError, "a parameter, got none for 'b'"),
        (by_shape, {}, ValueError, "`factories` must name at least one group, got none"),
        (lambda n, p: "keys", {"keys": SGD}, ValueError, "nn.ModuleDict can hold, got 'keys'"),
        (lambda n, p: "a", {"a": lambda m: None}, TypeError, "`a` must build an .*, got NoneType"),
    ],
)
def test_bad_groups_are_refused(
    assign: Any, factories: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = network()
    with pytest.raises(error, match=message):
        Grouped(model, assign, **factories)
    assert all(p.requires_grad for p in model.parameters())


def test_after_an_exception_in_a_factory_all_is_trainable_that_was() -> None:
    model = network()
    model[0].get_parameter("bias").requires_grad_(False)
    with pytest.raises(ValueError, match="`lr` must be positive"):
        Grouped(model, by_shape, matrices=partial(SGD, lr=-1.0), rest=SGD)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    rule = Grouped(model, by_shape, matrices=SGD, rest=SGD)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert rule.names["rest"] == ("2.bias",)
