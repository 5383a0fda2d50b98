"""dQ/dφ = (∂Δ/∂φ)ᵀ q at the gradients in `.grad`: no graph through the network is needed.

symbol   here        meaning
g        `grads`     ∇J_B(θ), from the user's backward pass; it does not depend on φ
Δ        `updates`   u(θ, φ, g) − θ, as the rule gives it, with a graph in φ
         `moves`     Δ without a graph; under FSDP2 this rank's shards
q                    ∇_θ' Q

Source: P22 Algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from apo_core.distributed import (
    local,
    mean_over_ranks,
    on_all_ranks,
    own_shards,
    shards,
    whole,
    without_synchronization,
)
from apo_core.lookahead import undisturbed
from apo_core.objective import Passes, ProximalObjective
from apo_core.safety import first_not_finite, norms_of
from apo_core.types import Closure, OutputsClosure, ProximalTerms, State, Tensors
from apo_core.update_rule import UpdateRule


class Proposal(NamedTuple):
    """What a rule proposes at the present gradients."""

    grads: Tensors
    updates: Tensors
    moves: Tensors
    next_state: State


class MetaGradient(NamedTuple):
    """The addends of Q, dQ/dφ by the name of φ, and its norm; means over the ranks.

    `trouble` says what was not finite, in words; then there are no gradients. `looked_ahead` is
    whether g and Δ were finite.
    """

    terms: ProximalTerms
    gradients: dict[str, Tensor]
    norm: Tensor
    trouble: str | None
    looked_ahead: bool


def seen_by(rule: UpdateRule, tensors: Tensors) -> Tensors:
    """θ, g or Δ as the rule reads it: the shards of an elementwise rule, else whole tensors."""
    return local(tensors) if rule.elementwise else whole(tensors)


def gradients_of(named: dict[str, nn.Parameter]) -> Tensors:
    """g, zeros for a parameter without gradient; DTensors under FSDP2.

    Raises:
        RuntimeError: no parameter has a gradient.
    """
    if all(p.grad is None for p in named.values()):
        raise RuntimeError("a parameter must have a gradient, got none; call backward() first.")
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in named.values()]


def propose(rule: UpdateRule, named: dict[str, nn.Parameter], state: State) -> Proposal:
    """g, Δ and the next state. A parameter without gradient stays, and so does its state.

    Raises:
        RuntimeError: no parameter has a gradient.
        ValueError: the rule returned updates of other shapes.
    """
    params: Tensors = list(named.values())
    grads = gradients_of(named)
    seen = seen_by(rule, [p.detach() for p in params])
    updates, next_state = rule(seen, seen_by(rule, grads), state)
    _require_shapes(updates, seen)
    for index, p in enumerate(params):
        if p.grad is None:
            updates[index] = 0.0 * updates[index]  # with a graph: dQ/dφ is 0 there
            for name in next_state.keys() & state.keys():
                next_state[name][index] = state[name][index]
    moves = [u.detach() for u in updates]
    if not rule.elementwise:
        moves = own_shards(moves, params)
    return Proposal(local(grads), updates, moves, next_state)


@final
@dataclass(frozen=True)
class MetaProblem:
    """Q on one pair of mini-batches, at the gradients in `.grad`, as a function of φ.

    θ, `.grad`, buffers and the random state come back as they were.

    Args:
        model: runs in the closures.
        rule: u, with its present φ.
        objective: the form and the weights of Q.
        named: θ, with g in `.grad`.
        state: the rule's, or `{}`.
        loss: as in `APO.meta_step`.
        outputs: as in `APO.meta_step`.
        loss_scale: as in `APO.meta_step`.
    """

    model: nn.Module
    rule: UpdateRule
    objective: ProximalObjective
    named: dict[str, nn.Parameter]
    state: State
    loss: Closure
    outputs: OutputsClosure | None
    loss_scale: float = 1.0

    def gradient(self, step_scale: float = 1.0) -> MetaGradient:
        """Q and dQ/dφ at θ + `step_scale` · Δ.

        Raises:
            RuntimeError: no parameter has a gradient; the update does not depend on φ.
            ValueError: the rule or a closure returned something of the wrong shape.
        """
        with torch.enable_grad():
            grads, updates, moves, _ = propose(self.rule, self.named, self.state)
        finite = norms_of([*grads, *moves]).isfinite().all()
        if not bool(on_all_ranks(self.model, finite)):
            nan = moves[0].new_full((), math.nan)
            trouble = describe(list(self.named), grads, moves)
            return MetaGradient(ProximalTerms(nan, nan, nan), {}, nan, trouble, False)
        terms, q = self._look_ahead(grads, moves, step_scale, derivative=True)
        parts = shards(self.model)
        if not self.rule.elementwise:
            q = whole(q, list(self.named.values()))
        elif parts > 1:
            step_scale *= parts  # the mean below is over shards; their sum is meant
        if step_scale != 1.0:
            q = list(torch._foreach_mul(q, step_scale))
        gradients = _pull_back(self.rule, updates, q)
        *means, value, fsd, wsd = mean_over_ranks(self.model, [*gradients.values(), *terms])
        terms = ProximalTerms(value, fsd, wsd)
        norm = torch.stack(torch._foreach_norm(means)).norm()
        if not bool(norm.isfinite()):
            return MetaGradient(terms, {}, norm, _cause(terms), True)
        return MetaGradient(terms, dict(zip(gradients, means, strict=True)), norm, None, True)

    @torch.no_grad()
    def terms(self, step_scale: float = 1.0) -> ProximalTerms:
        """The addends of Q at θ + `step_scale` · Δ, with the present φ: no backward pass."""
        grads, _, moves, _ = propose(self.rule, self.named, self.state)
        terms, _ = self._look_ahead(grads, moves, step_scale, derivative=False)
        return ProximalTerms(*mean_over_ranks(self.model, list(terms)))

    @torch.no_grad()
    def current_loss(self) -> Tensor:
        """J_B(θ), (), the mean over the ranks."""
        with undisturbed(self.model), without_synchronization(self.model):
            return mean_over_ranks(self.model, [self.loss().detach().reshape(())])[0]

    def _look_ahead(
        self, grads: Tensors, moves: Tensors, step_scale: float, derivative: bool
    ) -> tuple[ProximalTerms, Tensors]:
        """The addends of Q and q = ∇_θ' Q, of this rank."""
        if step_scale != 1.0:
            moves = list(torch._foreach_mul(moves, step_scale))
        with undisturbed(self.model) as rewind, without_synchronization(self.model):
            terms, q = self.objective.look_ahead(
                list(self.named.values()),
                grads,
                moves,
                Passes(self.loss, self.outputs, rewind, self.loss_scale),
                derivative,
            )
        parts = shards(self.model)
        if parts > 1:  # inner products of shards: their sum is meant, not their mean
            linear = self.objective.loss != "exact"
            terms = ProximalTerms(
                terms.loss * (parts if linear else 1), terms.fsd, terms.wsd * parts
            )
        return terms, q


def describe(names: list[str], grads: Tensors, moves: Tensors) -> str:
    """Which gradient or update is not finite, in words."""
    name = first_not_finite(names, grads)
    if name is not None:
        return f"the gradient of parameter `{name}`"
    name = first_not_finite(names, moves)
    return "a gradient on another rank" if name is None else f"the update of parameter `{name}`"


def _cause(terms: ProximalTerms) -> str:
    """Which part of a meta-step was not finite, in words."""
    if not bool(terms.loss.isfinite()):
        return "the loss at the lookahead"
    if not bool(terms.fsd.isfinite()):
        return "the FSD (the outputs on the mini-batch B')"
    return "the meta-gradient"


def _pull_back(rule: UpdateRule, updates: Tensors, q: Tensors) -> dict[str, Tensor]:
    """(∂Δ/∂φ)ᵀ q, by the name of φ."""
    phi = {name: p for name, p in rule.named_parameters() if p.requires_grad}
    reached = [(u, qi) for u, qi in zip(updates, q, strict=True) if u.requires_grad]
    pulled: tuple[Tensor | None, ...] = (None,) * len(phi)
    if reached:
        outputs, weights = zip(*reached, strict=True)
        pulled = torch.autograd.grad(outputs, list(phi.values()), weights, allow_unused=True)
    gradients: dict[str, Tensor] = {}
    for name, gradient in zip(phi, pulled, strict=True):
        if gradient is None:
            raise RuntimeError(
                f"the update of {type(rule).__name__} must be differentiable in φ, got one that "
                f"does not depend on `{name}`; compute it from the parameter itself (no .data, "
                ".item() or detach()) or freeze it with requires_grad_(False)."
            )
        gradients[name] = gradient
    return gradients


def _require_shapes(updates: Tensors, params: Tensors) -> None:
    got, expected = ([tuple(t.shape) for t in ts] for ts in (updates, params))
    if got != expected:
        raise ValueError(
            f"`rule` must return one update of the shape of each parameter, {expected}, got "
            f"{got}; build the rule on the model that APO trains."
        )
