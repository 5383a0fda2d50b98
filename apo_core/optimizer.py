"""Algorithm 1: every K steps look one step ahead and descend Q(φ); at every step move θ.

symbol   here                meaning
θ        `params`            the model's trainable parameters
φ        `rule.parameters()` the optimizer's own parameters
K        `interval`          steps from one meta-step to the next
α        `meta_optimizer`    its learning rate; any torch.optim object over φ
g        `.grad`             ∇J_B(θ), from the user's backward pass
Δ        `moves`             u(θ, φ, g) − θ

Source: P22 Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor, nn

from apo_core.compatibility import require_instance, require_phi, require_shardable
from apo_core.diagnostics import describe_phi, describe_q
from apo_core.distributed import is_sharded, local, on_all_ranks, sum_over_shards
from apo_core.meta_gradient import (
    MetaGradient,
    MetaProblem,
    describe,
    gradients_of,
    propose,
    seen_by,
)
from apo_core.objective import ProximalObjective
from apo_core.safety import choose_state, masked, norms_of, warn_of_meta_step, warn_of_step
from apo_core.trust_region import TrustRegion
from apo_core.types import (
    Closure,
    OutputsClosure,
    ProximalTerms,
    Tensors,
    Warmup,
    trainable_parameters,
)
from apo_core.update_rule import UpdateRule

COUNTERS = ("steps", "meta_steps", "skipped_meta_steps")


@final
class APO(torch.optim.Optimizer):
    """Amortized Proximal Optimization of the parameters φ of an update rule.

    ```python
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    if optimizer.meta_due:
        optimizer.meta_step(
            loss=lambda: F.cross_entropy(model(x), y), outputs=lambda: model(x_other)
        )
    optimizer.step()
    ```

    A gradient, lookahead, loss or meta-gradient that is not finite changes neither θ nor φ: the
    step or the meta-step is left out, counted, and the first of each kind warned of.

    Its one parameter group has `update_scale` as "lr": a scheduler of `torch.optim` scales the step
    that is taken, on top of the φ that is learned.

    Args:
        model: the module to train. A meta-step leaves its parameters, gradients and buffers and
            torch's random state as they were. Under DistributedDataParallel the wrapped model, on
            which the closures run as well; under FSDP2 the model after `fully_shard`.
        rule: u(θ, φ, g), built on the same model.
        objective: Q.
        meta_optimizer: any `torch.optim` object over `rule.parameters()`. P22 uses RMSprop with
            learning rate 0.1 for learning rates and Adam with 1e-4 or 3e-5 for preconditioners;
            L-BFGS is handed a closure and solves to the optimum.
        interval: K ≥ 1; P22 uses 10.
        update_scale: in (0, 2), multiplies the step that is taken (not the one looked ahead to).
            P22 uses 0.9 for preconditioners; above 1 it over-relaxes: see `trust_region`.
        warmup: `Warmup(optimizer, steps)` or None.

    Attributes:
        steps: calls of `step`.
        meta_steps: meta-steps that changed φ.
        skipped_meta_steps: meta-steps that found something not finite and left φ alone.
        trust: the trust region, in effect where the objective has a `trust_factor`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range; φ and the meta-optimizer's parameters differ.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: UpdateRule,
        objective: ProximalObjective,
        meta_optimizer: torch.optim.Optimizer,
        interval: int = 10,
        update_scale: float = 1.0,
        warmup: Warmup | None = None,
    ) -> None:
        self._named = trainable_parameters(model)
        require_instance("rule", rule, UpdateRule)
        require_instance("objective", objective, ProximalObjective)
        require_instance("meta_optimizer", meta_optimizer, torch.optim.Optimizer)
        require_phi(rule, meta_optimizer)
        if not (isinstance(interval, int) and interval >= 1):
            raise ValueError(f"`interval` must be an integer of at least 1, got {interval!r}.")
        if not 0 < update_scale < 2:
            raise ValueError(f"`update_scale` must lie in (0, 2), got {update_scale}.")
        if warmup is not None and warmup.steps < 0:
            raise ValueError(f"`warmup.steps` must be at least 0, got {warmup.steps}.")
        params: Tensors = list(self._named.values())
        if any(map(is_sharded, params)):
            require_shardable(rule, objective)
        super().__init__([{"params": params}], {"lr": update_scale})
        self.model = model
        self.rule = rule
        self.objective = objective
        self.meta_optimizer = meta_optimizer
        self.interval = interval
        self.warmup = warmup
        self.rule_state = rule.init_state(seen_by(rule, params))
        self.steps = 0
        self.meta_steps = 0
        self.skipped_meta_steps = 0
        self.trust = TrustRegion(params[0].device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=params[0].device)
        self._warned_of_step = False
        self._last: MetaGradient | None = None

    @property
    def meta_due(self) -> bool:
        """Whether this step is one of every K that has a meta-step: t mod K = 0."""
        return self.steps % self.interval == 0

    @property
    def update_scale(self) -> float:
        """What multiplies the step that is taken: the "lr" of the one parameter group."""
        return float(self.param_groups[0]["lr"])

    @update_scale.setter
    def update_scale(self, value: float) -> None:
        self.param_groups[0]["lr"] = value

    @property
    def skipped_steps(self) -> int:
        """Steps that found something not finite and left θ alone; reading it waits for the device.

        The steps of the warm-up are among them.
        """
        return int(self._skipped)

    def meta_step(
        self, *, loss: Closure, outputs: OutputsClosure | None = None, loss_scale: float = 1.0
    ) -> ProximalTerms:
        """φ ← φ − α ∇Q(φ): one step of the meta-optimizer, at the gradients g now in `.grad`.

        Args:
            loss: runs the model on the mini-batch B that gave g, and returns the mean loss.
            outputs: runs the model on another mini-batch B' and returns its outputs, (batch, ...).
                Not needed where `fsd_weight` is 0.
            loss_scale: multiplies what goes backward at θ' and is divided out of the result; with
                float16 give `GradScaler.get_scale()`, after `GradScaler.unscale_` of `.grad`.

        Returns:
            The addends of Q, before φ changed; not finite where the meta-step was skipped.

        Raises:
            RuntimeError: no gradient is there; the update does not depend on φ.
            ValueError: a closure returned something of the wrong shape.
        """
        problem = self._problem(loss, outputs, loss_scale)
        if isinstance(self.meta_optimizer, torch.optim.LBFGS):
            return self._solve(self.meta_optimizer, problem)
        found = self._meta_gradient(problem)
        if found.trouble is None:
            phi: Tensors = [self.rule.get_parameter(name) for name in found.gradients]
            before = [p.detach().clone() for p in phi] if self.objective.trust_factor else []
            self.meta_optimizer.zero_grad()
            for p, gradient in zip(phi, found.gradients.values(), strict=True):
                p.grad = gradient
            self.meta_optimizer.step()
            self.trust.shorten_move(problem, phi, before)
            self.meta_steps += 1
        return found.terms

    def meta_backward(
        self,
        *,
        loss: Closure,
        outputs: OutputsClosure | None = None,
        loss_scale: float = 1.0,
        weight: float = 1.0,
    ) -> ProximalTerms:
        """Add `weight` · dQ/dφ = (∂Δ/∂φ)ᵀ q to φ's `.grad`; φ and θ stay.

        The pieces for a meta-gradient averaged over several mini-batches: `meta_optimizer.
        zero_grad()`, this with weight 1/n for each, `meta_optimizer.step()`. What is not finite is
        not added, and counted as a skipped meta-step.

        Args:
            loss, outputs, loss_scale: as in `meta_step`.
            weight: the factor of the meta-gradient.

        Returns:
            The addends of Q, not weighted.

        Raises:
            RuntimeError, ValueError: as in `meta_step`.
        """
        found = self._meta_gradient(self._problem(loss, outputs, loss_scale))
        for name, gradient in found.gradients.items():
            p = self.rule.get_parameter(name)
            p.grad = weight * gradient if p.grad is None else p.grad + weight * gradient
        return found.terms

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """θ ← θ + update_scale · (u(θ, φ, g) − θ), or the warm-up optimizer's step.

        Neither θ nor the rule's state changes where the gradient or the update is not finite. That
        is decided on the device: no synchronization, but in the warm-up.

        Args:
            closure: recomputes the loss and the gradients, and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: every gradient is missing.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.warmup is not None and self.steps < self.warmup.steps:
            self._warm_up(self.warmup.optimizer)
        else:
            grads, _, moves, next_state = propose(self.rule, self._named, self.rule_state)
            norms = norms_of([*grads, *moves])
            finite = on_all_ranks(self.model, norms.isfinite().all())
            self._count(finite, grads, moves)
            self.rule_state = choose_state(finite, next_state, self.rule_state)
            params = local(list(self._named.values()))
            scale = self.update_scale * self.trust.scale
            if self.objective.trust_factor is not None:
                squared = sum_over_shards(self.model, norms[len(grads) :].square().sum())
                length = scale * squared.sqrt()
                moves = self.trust.within_radius(moves, length, renew=self.meta_due)
            torch._foreach_add_(params, masked(finite, moves), alpha=scale)
        self.steps += 1
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer is built: φ belongs to the parameters the rule was built on.

        Raises:
            RuntimeError: always, after construction.
        """
        if self.param_groups:
            raise RuntimeError(
                "`param_groups` of APO must stay as they were built, got another group; build a "
                "new rule and a new APO once the model has all its parameters."
            )
        super().add_param_group(param_group)

    @property
    def diagnostics(self) -> dict[str, float]:
        """What a log shows, as numbers; reading them waits for the device.

        The counters; after a meta-step Q and its addends before φ changed, and the norm of the
        meta-gradient; the least, mean and largest entry of every φ, in its own coordinates.
        """
        counters = {name: float(getattr(self, name)) for name in (*COUNTERS, "skipped_steps")}
        last = describe_q(self._last.terms, self._last.norm) if self._last is not None else {}
        return counters | self.trust.numbers() | last | describe_phi(self.rule)

    def __getstate__(self) -> dict[str, Any]:
        """All but the last meta-step: a copy or a pickle has its own model, rule and optimizers."""
        return self.__dict__ | {"_last": None}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on: φ, the rule's state, all optimizers, the counters.

        Plain tensors, numbers and lists: `torch.load(..., weights_only=True)` reads it.
        """
        warm = self.warmup.optimizer.state_dict() if self.warmup is not None else None
        return super().state_dict() | {
            "rule": self.rule.state_dict(),
            "rule_state": self.rule_state,
            "meta_optimizer": self.meta_optimizer.state_dict(),
            "warmup": warm,
            "skipped_steps": self.skipped_steps,
            "trust": self.trust.numbers(),
            **{name: getattr(self, name) for name in COUNTERS},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the argument is not changed.

        Raises:
            ValueError: it was not taken from an APO of this form.
        """
        missing = sorted({"rule", "rule_state", "meta_optimizer", "warmup"} - set(state_dict))
        if missing:
            raise ValueError(
                f"`state_dict` must come from APO.state_dict(), got one without {missing}."
            )
        if (state_dict["warmup"] is None) != (self.warmup is None):
            raise ValueError(
                "`state_dict` must be loaded with a warm-up exactly if it was saved with one, got "
                f"saved: {state_dict['warmup'] is not None}, here: {self.warmup is not None}."
            )
        super().load_state_dict(state_dict)
        self.rule.load_state_dict(state_dict["rule"])
        self.meta_optimizer.load_state_dict(state_dict["meta_optimizer"])
        if self.warmup is not None:
            self.warmup.optimizer.load_state_dict(state_dict["warmup"])
        params = self._named.values()
        self.rule_state = {
            name: [t.to(p.device).clone() for t, p in zip(tensors, params, strict=True)]
            for name, tensors in state_dict["rule_state"].items()
        }
        self._skipped.fill_(state_dict["skipped_steps"])
        self.trust.load(state_dict["trust"])
        for name in COUNTERS:
            setattr(self, name, state_dict[name])

    def _problem(
        self, loss: Closure, outputs: OutputsClosure | None, loss_scale: float
    ) -> MetaProblem:
        """Q on these mini-batches."""
        if self._skipped.device.type != "cpu":
            self._report_steps("a gradient or an update")
        state = self.rule_state if self.rule.lookahead_from_state else {}
        return MetaProblem(
            self.model, self.rule, self.objective, self._named, state, loss, outputs, loss_scale
        )

    def _meta_gradient(self, problem: MetaProblem) -> MetaGradient:
        """Q and dQ/dφ within the trust region; what is not finite is counted and warned of."""
        found = self._last = self.trust.fit_step(problem)
        if found.trouble is not None:
            self._skip_meta_step(found.trouble)
        return found

    def _solve(self, solver: torch.optim.LBFGS, problem: MetaProblem) -> ProximalTerms:
        """A meta-step of a meta-optimizer that evaluates Q several times, in the same region."""
        phi = {name: p for name, p in self.rule.named_parameters() if p.requires_grad}
        before = [p.detach().clone() for p in phi.values()]
        first = self._meta_gradient(problem)
        if first.trouble is not None:
            return first.terms
        given: Iterator[MetaGradient] = iter([first])

        def evaluate() -> Tensor:
            found = next(given, None) or problem.gradient(self.trust.scale)
            if found.trouble is not None:
                raise FloatingPointError(found.trouble)
            for name, p in phi.items():
                p.grad = found.gradients[name]
            return found.terms.total

        try:
            solver.step(evaluate)  # type: ignore[arg-type]
            self.meta_steps += 1
        except FloatingPointError as trouble:
            with torch.no_grad():
                torch._foreach_copy_(list(phi.values()), before)
            solver.state.clear()  # it may hold what is not finite
            self._skip_meta_step(str(trouble))
        return first.terms

    def _warm_up(self, base: torch.optim.Optimizer) -> None:
        """A step of the user's own optimizer, which knows no finiteness of its own."""
        grads = local(gradients_of(self._named))
        finite = on_all_ranks(self.model, norms_of(grads).isfinite().all())
        self._count(finite, grads, grads)
        if bool(finite):
            base.step()

    def _count(self, finite: Tensor, grads: Tensors, moves: Tensors) -> None:
        """Count a step that is skipped; warn of the first at once where that costs no waiting."""
        self._skipped += ~finite
        if finite.device.type == "cpu" and not bool(finite):
            self._report_steps(describe(list(self._named), grads, moves))

    def _skip_meta_step(self, trouble: str) -> None:
        if self.skipped_meta_steps == 0:
            warn_of_meta_step(trouble)
        self.skipped_meta_steps += 1

    def _report_steps(self, what: str) -> None:
        if not self._warned_of_step and self.skipped_steps:
            self._warned_of_step = True
            warn_of_step(what)
