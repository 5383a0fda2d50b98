"""Algorithm 1: every K steps look one step ahead and descend Q(φ); at every step move θ.

symbol   here                meaning
θ        `params`            the model's trainable parameters
φ        `rule.parameters()` the optimizer's own parameters
K        `interval`          steps from one meta-step to the next
α        `meta_optimizer`    its learning rate; any torch.optim object over φ
g        `.grad`             ∇J_B(θ), from the user's backward pass; it does not depend on φ
Δ        `updates`           u(θ, φ, g) − θ
q                            ∇_θ' Q, so that dQ/dφ = (∂Δ/∂φ)ᵀ q: no graph through the network

Source: P22 Algorithm 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from apo_core.diagnostics import describe_phi, describe_q
from apo_core.distributed import mean_over_ranks, without_synchronization
from apo_core.lookahead import undisturbed
from apo_core.objective import ProximalObjective
from apo_core.types import Closure, OutputsClosure, ProximalTerms, State, trainable_parameters
from apo_core.update_rule import UpdateRule


class Warmup(NamedTuple):
    """A base optimizer that moves θ for the first `steps` steps, while φ already learns.

    Source: P22 section 6.1 (3000 iterations of SGD with momentum).
    """

    optimizer: torch.optim.Optimizer
    steps: int


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

    Args:
        model: the module to train. A meta-step leaves its parameters, gradients and buffers and
            torch's random state as they were. Under DistributedDataParallel the wrapped model, on
            which the closures run as well: φ is then the same on every rank, at one all-reduce of
            |φ| + 3 numbers a meta-step.
        rule: u(θ, φ, g), built on the same model.
        objective: Q.
        meta_optimizer: any `torch.optim` object over `rule.parameters()`. P22 uses RMSprop with
            learning rate 0.1 for learning rates and Adam with 1e-4 or 3e-5 for preconditioners;
            L-BFGS is handed a closure and solves to the optimum.
        interval: K ≥ 1; P22 uses 10.
        update_scale: in (0, 1], multiplies the step that is taken (not the one looked ahead to);
            P22 uses 0.9 for preconditioners.
        warmup: `Warmup(optimizer, steps)` or None.

    Attributes:
        steps: steps taken.
        meta_steps: meta-steps that changed φ.
        skipped_meta_steps: meta-steps that found a non-finite meta-gradient and left φ alone.

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
        _require_instance("rule", rule, UpdateRule)
        _require_instance("objective", objective, ProximalObjective)
        _require_instance("meta_optimizer", meta_optimizer, torch.optim.Optimizer)
        _require_phi(rule, meta_optimizer)
        if not (isinstance(interval, int) and interval >= 1):
            raise ValueError(f"`interval` must be an integer of at least 1, got {interval!r}.")
        if not 0 < update_scale <= 1:
            raise ValueError(f"`update_scale` must lie in (0, 1], got {update_scale}.")
        if warmup is not None and warmup.steps < 0:
            raise ValueError(f"`warmup.steps` must be at least 0, got {warmup.steps}.")
        super().__init__([{"params": list(self._named.values())}], {})
        self.model = model
        self.rule = rule
        self.objective = objective
        self.meta_optimizer = meta_optimizer
        self.interval = interval
        self.update_scale = update_scale
        self.warmup = warmup
        self.rule_state = rule.init_state(self._params)
        self.steps = 0
        self.meta_steps = 0
        self.skipped_meta_steps = 0
        self._last_terms: ProximalTerms | None = None

    @property
    def _params(self) -> list[Tensor]:
        return list(self._named.values())

    @property
    def meta_due(self) -> bool:
        """Whether this step is one of every K that has a meta-step: t mod K = 0."""
        return self.steps % self.interval == 0

    def meta_step(self, *, loss: Closure, outputs: OutputsClosure | None = None) -> ProximalTerms:
        """φ ← φ − α ∇Q(φ): one step of the meta-optimizer, at the gradients g now in `.grad`.

        Args:
            loss: runs the model on the mini-batch B that gave g, and returns the mean loss.
            outputs: runs the model on another mini-batch B' and returns its outputs, (batch, ...).
                Not needed where `fsd_weight` is 0.

        Returns:
            The addends of Q, before φ changed.

        Raises:
            RuntimeError: no gradient is there, or one is not finite; the update does not depend on
                φ.
            ValueError: a closure returned something of the wrong shape, or non-finite outputs at θ.
        """
        if isinstance(self.meta_optimizer, torch.optim.LBFGS):
            return self._solve(self.meta_optimizer, loss, outputs)
        self.meta_optimizer.zero_grad()
        terms = self.meta_backward(loss=loss, outputs=outputs)
        self._last_terms = terms
        if self._meta_gradient_is_finite():
            self.meta_optimizer.step()
            self.meta_steps += 1
        else:
            self._skip()
        return terms

    def meta_backward(
        self, *, loss: Closure, outputs: OutputsClosure | None = None, scale: float = 1.0
    ) -> ProximalTerms:
        """Add `scale` · dQ/dφ = (∂Δ/∂φ)ᵀ q to φ's `.grad`; φ and θ stay.

        The pieces for a meta-gradient averaged over several mini-batches: `meta_optimizer.
        zero_grad()`, this with scale 1/n for each, `meta_optimizer.step()`.

        Args:
            loss: as in `meta_step`.
            outputs: as in `meta_step`.
            scale: the factor of the meta-gradient.

        Returns:
            The addends of Q, not scaled.

        Raises:
            RuntimeError: as in `meta_step`.
            ValueError: as in `meta_step`.
        """
        params = self._params
        state = self.rule_state if self.rule.lookahead_from_state else {}
        with torch.enable_grad():
            grads, updates, _ = self._update(state, check_finite=True)
        with undisturbed(self.model) as rewind, without_synchronization(self.model):
            detached = [u.detach() for u in updates]
            terms, q = self.objective.gradient(params, grads, detached, loss, outputs, rewind)
        return self._pull_back(updates, [scale * qi for qi in q] if scale != 1.0 else q, terms)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """θ ← θ + update_scale · (u(θ, φ, g) − θ), or the warm-up optimizer's step.

        Args:
            closure: recomputes the loss and the gradients, and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: every gradient is missing, or one is not finite (seen at once on the CPU,
                on other devices at the next meta-step, to spare a synchronization).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.warmup is not None and self.steps < self.warmup.steps:
            self.warmup.optimizer.step()
        else:
            params = self._params
            on_cpu = params[0].device.type == "cpu"
            _, updates, self.rule_state = self._update(self.rule_state, check_finite=on_cpu)
            torch._foreach_add_(params, updates, alpha=self.update_scale)
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
        counted = ("steps", "meta_steps", "skipped_meta_steps")
        counters = {name: float(getattr(self, name)) for name in counted}
        last = describe_q(self._last_terms, self.rule) if self._last_terms is not None else {}
        return counters | last | describe_phi(self.rule)

    def __getstate__(self) -> dict[str, Any]:
        """All of it: a deep copy or a pickle holds its own model, rule and optimizers."""
        return self.__dict__.copy()

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
            "steps": self.steps,
            "meta_steps": self.meta_steps,
            "skipped_meta_steps": self.skipped_meta_steps,
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
        self.rule_state = {
            name: [t.to(p.device).clone() for t, p in zip(tensors, self._params, strict=True)]
            for name, tensors in state_dict["rule_state"].items()
        }
        self.steps = state_dict["steps"]
        self.meta_steps = state_dict["meta_steps"]
        self.skipped_meta_steps = state_dict["skipped_meta_steps"]

    def _solve(
        self, solver: torch.optim.LBFGS, loss: Closure, outputs: OutputsClosure | None
    ) -> ProximalTerms:
        """A meta-step of a meta-optimizer that evaluates Q several times."""
        phi: list[Tensor] = [p for p in self.rule.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in phi]
        evaluations: list[ProximalTerms] = []

        def evaluate() -> Tensor:
            solver.zero_grad()
            evaluations.append(self.meta_backward(loss=loss, outputs=outputs))
            return evaluations[-1].total

        solver.step(evaluate)  # type: ignore[arg-type]
        if all(bool(p.isfinite().all()) for p in phi):
            self.meta_steps += 1
        else:
            with torch.no_grad():
                torch._foreach_copy_(phi, before)
            self._skip()
        return evaluations[0]

    def _update(self, state: State, check_finite: bool) -> tuple[list[Tensor], list[Tensor], State]:
        """g, Δ and the next state. A parameter without gradient stays, and so does its state."""
        params = [p.detach() for p in self._params]
        grads = self._gradients(check_finite)
        updates, next_state = self.rule(params, grads, state)
        self._require_updates(updates)
        for index, p in enumerate(self._params):
            if p.grad is None:
                updates[index] = 0.0 * updates[index]  # with a graph: dQ/dφ is 0 there
                for name in next_state.keys() & state.keys():
                    next_state[name][index] = state[name][index]
        return grads, updates, next_state

    def _gradients(self, check_finite: bool) -> list[Tensor]:
        """g, one for each parameter, zero for one that has none."""
        if all(p.grad is None for p in self._params):
            raise RuntimeError("a parameter must have a gradient, got none; call backward() first.")
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
        if check_finite:
            norms = torch.stack(torch._foreach_norm(grads))
            if not bool(norms.isfinite().all()):
                worst = norms.isfinite().tolist().index(False)
                raise RuntimeError(
                    f"the gradient of parameter `{list(self._named)[worst]}` must be finite, got "
                    "NaN or infinity; check the mini-batch and the loss. Neither θ nor φ changed."
                )
        return grads

    def _require_updates(self, updates: list[Tensor]) -> None:
        got = [tuple(u.shape) for u in updates]
        expected = [tuple(p.shape) for p in self._params]
        if got != expected:
            raise ValueError(
                f"`rule` must return one update of the shape of each parameter, {expected}, got "
                f"{got}; build the rule on the model that APO trains."
            )

    def _pull_back(
        self, updates: list[Tensor], q: list[Tensor], terms: ProximalTerms
    ) -> ProximalTerms:
        """φ.grad += (∂Δ/∂φ)ᵀ q; the gradient, and the terms, are means over the ranks."""
        phi = {name: p for name, p in self.rule.named_parameters() if p.requires_grad}
        reached = [(u, qi) for u, qi in zip(updates, q, strict=True) if u.requires_grad]
        pulled: tuple[Tensor | None, ...] = (None,) * len(phi)
        if reached:
            outputs, weights = zip(*reached, strict=True)
            pulled = torch.autograd.grad(outputs, list(phi.values()), weights, allow_unused=True)
        gradients: list[Tensor] = []
        for name, gradient in zip(phi, pulled, strict=True):
            if gradient is None:
                raise RuntimeError(
                    f"the update of {type(self.rule).__name__} must be differentiable in φ, got "
                    f"one that does not depend on `{name}`; compute it from the parameter itself "
                    "(no .data, .item() or detach()) or freeze it with requires_grad_(False)."
                )
            gradients.append(gradient)
        *gradients, loss, fsd, wsd = mean_over_ranks(self.model, [*gradients, *terms])
        for p, gradient in zip(phi.values(), gradients, strict=True):
            p.grad = gradient if p.grad is None else p.grad + gradient
        return ProximalTerms(loss, fsd, wsd)

    def _meta_gradient_is_finite(self) -> bool:
        grads = [p.grad for p in self.rule.parameters() if p.grad is not None]
        return bool(torch.stack(torch._foreach_norm(grads)).isfinite().all())

    def _skip(self) -> None:
        """Count a meta-step that left φ alone, and warn of the first."""
        if self.skipped_meta_steps == 0:
            warnings.warn(
                "a meta-gradient was not finite (the lookahead diverged), so φ stayed as it was; "
                "lower the initial learning rate or `initial_scale`, or raise `wsd_weight`. Later "
                "ones are only counted, in `skipped_meta_steps`.",
                RuntimeWarning,
                stacklevel=3,
            )
        self.skipped_meta_steps += 1


def _require_instance(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be a {kind.__name__}, got {type(value).__name__}.")


def _require_phi(rule: UpdateRule, meta_optimizer: torch.optim.Optimizer) -> None:
    phi = {id(p) for p in rule.parameters() if p.requires_grad}
    if not phi:
        raise ValueError(
            "`rule` must have a parameter φ with requires_grad, got none: nothing is left to learn."
        )
    held = {id(p) for group in meta_optimizer.param_groups for p in group["params"]}
    if not phi <= held:
        raise ValueError(
            f"`meta_optimizer` must hold every φ of the rule, got {len(phi & held)} of {len(phi)}; "
            "build it as torch.optim.RMSprop(rule.parameters(), lr=0.1)."
        )
