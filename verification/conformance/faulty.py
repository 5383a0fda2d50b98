"""A rule that is right, and faults to plant in it, one at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor, nn

import apo_core as apo

State: TypeAlias = dict[str, list[Tensor]]
Step: TypeAlias = Callable[["HeavyBall", list[Tensor], list[Tensor], State], tuple[Any, State]]


@final
class HeavyBall(apo.UpdateRule):
    """θ' − θ = −ηv, v ← 0.9v + g, with φ = log η (`log_lr`, η in weight over gradient).

    Args:
        model: what it is for.
        step: (rule, params, grads, state) -> (updates, state), which a fault replaces.
        claims: what it claims.
    """

    def __init__(
        self, model: nn.Module, step: Step | None = None, claims: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        like = next(model.parameters())
        self.log_lr = nn.Parameter(like.new_tensor(-1.0, dtype=torch.promote_types(like.dtype, F)))
        self.register_buffer("calls", like.new_zeros(()))
        self.notes: dict[Any, Any] = {}
        self.step = step or momentum
        self.claims = claims

    def init_state(self, params: list[Tensor]) -> State:
        """v = 0."""
        return {"v": [torch.zeros_like(p) for p in params]}

    def forward(
        self, params: list[Tensor], grads: list[Tensor], state: State
    ) -> tuple[list[Tensor], State]:
        """What `step` says."""
        return self.step(self, params, grads, state)


F = torch.float32
HONEST = frozenset(
    {
        "descent",
        "psd",
        "scale equivariant",
        "translation invariant",
        "permutation equivariant",
        "rotation equivariant",
    }
)


def momentum(
    rule: HeavyBall, params: list[Tensor], grads: list[Tensor], state: State
) -> tuple[list[Tensor], State]:
    """The right step."""
    v = [0.9 * before + g for before, g in zip(state["v"], grads, strict=True)]
    return [(-rule.log_lr.exp() * vi).to(vi.dtype) for vi in v], {"v": v}


def mapped(function: Callable[[Tensor], Tensor]) -> Step:
    """The right step, and then `function` of each update."""

    def step(rule: HeavyBall, params: Any, grads: Any, state: State) -> tuple[Any, State]:
        updates, after = momentum(rule, params, grads, state)
        return [function(u) for u in updates], after

    return step


def with_state(function: Callable[[State, State], State]) -> Step:
    """The right step, and another next state: `function` of the last and of the next one."""

    def step(rule: HeavyBall, params: Any, grads: Any, state: State) -> tuple[Any, State]:
        updates, after = momentum(rule, params, grads, state)
        return updates, function(state, after)

    return step


def with_gradient(function: Callable[[Tensor], Tensor]) -> Step:
    """−η times a function of each gradient, without momentum."""

    def step(rule: HeavyBall, params: Any, grads: Any, state: State) -> tuple[Any, State]:
        after = momentum(rule, params, grads, state)[1]
        return [(-rule.log_lr.exp() * function(g)).to(g.dtype) for g in grads], after

    return step


def with_rate(function: Callable[[HeavyBall], Tensor]) -> Step:
    """−η v with another η."""

    def step(rule: HeavyBall, params: Any, grads: Any, state: State) -> tuple[Any, State]:
        after = momentum(rule, params, grads, state)[1]
        return [(-function(rule) * v).to(v.dtype) for v in after["v"]], after

    return step


def _in_place(rule: HeavyBall, params: Any, grads: Any, state: State) -> tuple[Any, State]:
    for g in grads:
        g.mul_(0.5)
    return momentum(rule, params, grads, state)


def _counts(rule: HeavyBall, params: Any, grads: Any, state: State) -> tuple[Any, State]:
    rule.notes["calls"] = rule.notes.get("calls", 0) + 1
    return mapped(lambda u: u / rule.notes["calls"])(rule, params, grads, state)


def _counts_in_a_buffer(
    rule: HeavyBall, params: Any, grads: Any, state: State
) -> tuple[Any, State]:
    rule.get_buffer("calls").add_(1)
    return momentum(rule, params, grads, state)


def _remembers_in_attributes(
    rule: HeavyBall, params: Any, grads: Any, state: State
) -> tuple[Any, State]:
    """v under the number of steps taken: equal calls agree, and a checkpoint lacks it."""
    count = int(state["v"][0].reshape(-1)[0])
    before = rule.notes.get(count, [torch.zeros_like(g) for g in grads])
    v = [0.9 * b + g for b, g in zip(before, grads, strict=True)]
    rule.notes[count + 1] = v
    return [-rule.log_lr.exp() * vi for vi in v], {"v": [t + 1 for t in state["v"]]}


def _remembers_the_largest(
    rule: HeavyBall, params: Any, grads: Any, state: State
) -> tuple[Any, State]:
    """A running maximum in an attribute, which a NaN never leaves."""
    after = momentum(rule, params, grads, state)[1]
    largest = torch.stack([g.abs().max() for g in grads]).max()
    rule.notes["most"] = torch.maximum(largest, rule.notes.get("most", largest)).detach()
    lr = rule.log_lr.exp() / (1 + rule.notes["most"])
    return [-lr * g for g in grads], after


def _decays(rule: HeavyBall, params: Any, grads: Any, state: State) -> tuple[Any, State]:
    updates, after = momentum(rule, params, grads, state)
    return [u - 0.1 * p for u, p in zip(updates, params, strict=True)], after


def _normalized(rule: HeavyBall, params: Any, grads: Any, state: State) -> tuple[Any, State]:
    norm = torch.stack([g.norm() for g in grads]).norm()
    return with_gradient(lambda g: g / norm)(rule, params, grads, state)


def _averaged(rule: HeavyBall, params: Any, grads: Any, state: State) -> tuple[Any, State]:
    mean = torch.stack([g.abs().mean() for g in grads]).mean()
    return with_gradient(lambda g: g / (1 + mean))(rule, params, grads, state)


_copies = itertools.count()


def _differs_by_copy(rule: HeavyBall, params: Any, grads: Any, state: State) -> tuple[Any, State]:
    number = rule.notes.setdefault("copy", next(_copies))
    return mapped(lambda u: u * (1 + 0.1 * number))(rule, params, grads, state)


class Fault(NamedTuple):
    """A faulty step, the check that must catch it, and what the message must say (a pattern)."""

    step: Step
    check: str
    message: str
    claims: frozenset[str] = frozenset()


FAULTS: dict[str, Fault] = {
    "flat updates": Fault(
        mapped(lambda u: u.reshape(-1)), "updates", r"must have shape \(3, 2\), got \(6,\)"
    ),
    "float32 updates": Fault(
        mapped(lambda u: u.float()), "updates", "must be torch.float64, got torch.float32"
    ),
    "an update too few": Fault(
        lambda *args: (momentum(*args)[0][:-1], momentum(*args)[1]),
        "updates",
        "one update for each of the 4 parameters is needed, got 3",
    ),
    "infinite updates": Fault(mapped(lambda u: u / 0), "updates", "must be finite at a finite"),
    "changes g in place": Fault(_in_place, "purity", "must not be changed in place: the same"),
    "draws random numbers": Fault(
        mapped(lambda u: u * torch.rand((), dtype=u.dtype)), "purity", "must draw no random"
    ),
    "counts its calls": Fault(_counts, "purity", "two calls with equal arguments must agree"),
    "counts in a buffer": Fault(_counts_in_a_buffer, "purity", "φ and buffers must not change"),
    "a graph in the state": Fault(
        with_state(lambda before, after: {"v": momentum_graph(after)}), "state", "have no graph"
    ),
    "one tensor for all": Fault(
        with_state(lambda before, after: {"v": after["v"][:1]}),
        "state",
        "must hold one tensor for each of the 4 parameters, got 1",
    ),
    "drops its state": Fault(
        with_state(lambda before, after: {}), "state", r"got one without \['v'\]; .* forget"
    ),
    "returns the old state": Fault(
        with_state(lambda before, after: before), "state", "must differ from the first one"
    ),
    "detached φ": Fault(
        with_rate(lambda rule: rule.log_lr.detach().exp()),
        "differentiability",
        "must depend on `log_lr`, got no graph",
    ),
    "φ without effect": Fault(
        with_rate(lambda rule: 0.1 + 0.0 * rule.log_lr),
        "differentiability",
        "`log_lr` must have an effect on the update, got a derivative of 0",
    ),
    "an infinite derivative": Fault(
        with_rate(lambda rule: rule.log_lr.exp() + (0 * rule.log_lr).abs().sqrt()),
        "differentiability",
        "the derivative in `log_lr` must be finite",
    ),
    "half the derivative": Fault(
        with_rate(lambda rule: 0.5 * (rule.log_lr.exp() + rule.log_lr.detach().exp())),
        "meta-gradient",
        "the derivative in `log_lr` must agree with central differences",
    ),
    "0 / 0 at a zero gradient": Fault(
        _normalized, "zero gradient", "before the first step must give finite|after a step must"
    ),
    "an unknown claim": Fault(
        momentum, "claims", r"must be chosen from .* got \['fast'\]", frozenset({"fast"})
    ),
    "the wrong sign": Fault(
        mapped(torch.neg), "descent", "must be a descent direction at its φ", frozenset({"descent"})
    ),
    "an indefinite P": Fault(
        with_gradient(lambda g: torch.linspace(-0.1, 1, g.numel()).to(g).view(g.shape) * g),
        "psd",
        "must be positive semidefinite at its φ, got the eigenvalue -",
        frozenset({"psd"}),
    ),
    "P definite at its φ alone": Fault(
        with_rate(lambda rule: -rule.log_lr),
        "psd",
        "must be positive semidefinite at −φ",
        frozenset({"psd"}),
    ),
    "a skew P": Fault(
        with_gradient(lambda g: g + 0.1 * g.roll(1, 0)),
        "psd",
        "P must be symmetric",
        frozenset({"psd"}),
    ),
    "no P": Fault(with_gradient(torch.tanh), "psd", "must be linear in g", frozenset({"psd"})),
    "exp φ as linear": Fault(
        momentum, "linear in phi", "must be affine in φ", frozenset({"linear in phi"})
    ),
    "an optimum that is none": Fault(
        with_rate(lambda rule: 0.1 * torch.sigmoid(rule.log_lr)),
        "optimum",
        "must reach the optimum over φ",
        frozenset({"linear in phi"}),
    ),
    "−ηg as scale invariant": Fault(
        momentum, "scale invariance", "the update for 0.001·g", frozenset({"scale invariant"})
    ),
    "saturates": Fault(
        with_gradient(torch.tanh),
        "scale equivariance",
        "the update for 0.001·g",
        frozenset({"scale equivariant"}),
    ),
    "decays": Fault(
        _decays, "translation invariance", "for θ [+] a", frozenset({"translation invariant"})
    ),
    "knows places": Fault(
        with_gradient(lambda g: g.cumsum(0)),
        "permutation equivariance",
        "for permuted θ and g",
        frozenset({"permutation equivariant"}),
    ),
    "knows axes": Fault(
        with_gradient(torch.sign),
        "rotation equivariance",
        "for rotated θ and g",
        frozenset({"rotation equivariant"}),
    ),
    "moves nothing": Fault(mapped(lambda u: 0 * u), "step", "a step must move θ"),
    "another step each time": Fault(_counts, "step", "must add the update of `forward` to θ bit"),
    "forgets its state": Fault(
        _remembers_in_attributes, "resume", "θ after 2 steps, a checkpoint and 2 steps must be"
    ),
    "a buffer moved by a lookahead": Fault(
        _counts_in_a_buffer, "meta-step", "must leave the rule's buffers alone"
    ),
    "a NaN where a gradient is missing": Fault(
        with_gradient(lambda g: g / g.norm()),
        "missing gradient",
        "RuntimeWarning: a meta-step was skipped since the update of parameter `2.bias`",
    ),
    "keeps a NaN": Fault(_remembers_the_largest, "non-finite gradient", "training must go on"),
    "a wrong dQ/dφ": Fault(
        with_rate(lambda rule: 0.5 * (rule.log_lr.exp() + rule.log_lr.detach().exp())),
        "gradient of Q",
        "dQ/dφ must agree with central differences",
    ),
    "replicas differ": Fault(_differs_by_copy, "replicas", "must average|must take equal steps"),
    "a mean over nothing": Fault(_averaged, "empty parameter", "a mean over no entries is NaN"),
}
"""Faults of the step."""


def _in_16_bits(model: nn.Module) -> HeavyBall:
    rule = HeavyBall(model)
    rule.log_lr = nn.Parameter(rule.log_lr.detach().to(next(model.parameters()).dtype))
    return rule


def _undocumented(model: nn.Module) -> HeavyBall:
    rule = HeavyBall(model, with_rate(lambda rule: rule.log_lr.exp() + rule.get_parameter("k")))
    rule.register_parameter("k", nn.Parameter(torch.zeros_like(rule.log_lr)))
    return rule


def _another_dense(model: nn.Module) -> HeavyBall:
    rule = HeavyBall(model)
    size = sum(p.numel() for p in model.parameters())
    object.__setattr__(rule, "dense", lambda: torch.eye(size, dtype=torch.float64))
    return rule


def _unsaved(model: nn.Module) -> HeavyBall:
    rule = HeavyBall(model)
    rule.register_state_dict_post_hook(lambda module, saved, *_: saved.clear())
    return rule


def _shared_by_copies(model: nn.Module) -> HeavyBall:
    rule = HeavyBall(model)
    object.__setattr__(rule, "__deepcopy__", lambda memo: rule)
    return rule


def _needs_a_state(model: nn.Module) -> HeavyBall:
    rule = HeavyBall(model)
    rule.lookahead_from_state = False
    return rule


FAULTY_RULES: dict[str, tuple[Callable[[nn.Module], HeavyBall], str, str]] = {
    "φ in 16 bits": (
        _in_16_bits,
        "dtypes",
        "φ `log_lr` must be float32 or float64 for torch.bfloat16 parameters, got torch.bfloat16",
    ),
    "φ without a word": (_undocumented, "documentation", "must say what `k` is, and its unit"),
    "another P": (_another_dense, "dense", r"dense\(\) must be the P of the update −Pg at its φ"),
    "φ is not saved": (_unsaved, "save and load", "RuntimeError: .*Missing key"),
    "copies share φ": (_shared_by_copies, "deep copy", "must take the step of the original"),
    "no step without a state": (_needs_a_state, "empty state", "KeyError: 'v' .The check demands"),
}
"""Faults outside the step: what makes the rule, its check, and a pattern of the message."""


def momentum_graph(after: State) -> list[Tensor]:
    """v with a graph."""
    return [v * torch.ones((), dtype=v.dtype, requires_grad=True) for v in after["v"]]
