"""What one check works on: its own copies of a rule and a model, a task, and random numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeAlias, final

import torch
from torch import Tensor, nn

from apo_core.objective import ProximalObjective
from apo_core.optimizer import APO
from apo_core.types import (
    Closure,
    Outputs,
    OutputsClosure,
    State,
    Tensors,
    trainable_parameters,
)
from apo_core.update_rule import UpdateRule

Build: TypeAlias = Callable[[nn.Module], UpdateRule]
"""model -> a rule for it: a class, or a function that gives a class its arguments."""

MAX_SIZE = 600
"""Entries of θ up to which a check forms a matrix (n, n)."""


class NotApplicable(Exception):
    """A check that says nothing about this rule; its text is the reason."""


@final
@dataclass(frozen=True)
class Task:
    """What the rule is trained on: passes of the model on B and on B', and Q.

    ```python
    Task(
        loss=lambda model: F.cross_entropy(model(x), y),
        outputs=lambda model: model(x_other),
        objective=apo.ProximalObjective("kl", fsd_weight=0.3),
    )
    ```

    Functions of the model, since each check works on a copy of it. A rule that reads the passes
    themselves, as `rules.KFAC` does, has a method `observe(model)`, a context manager: the kit runs
    the passes on B inside it.

    Args:
        loss: model -> J_B at its present parameters, a scalar.
        outputs: model -> the outputs on B'; not needed where the FSD's weight is 0.
        objective: Q.
    """

    loss: Callable[[nn.Module], Tensor]
    outputs: Callable[[nn.Module], Outputs] | None = None
    objective: ProximalObjective = field(default_factory=ProximalObjective)


@final
@dataclass(frozen=True)
class Trial:
    """One check's own copies, with the draws and passes that checks have in common.

    Attributes:
        rule: the rule under test.
        model: the model it was built on.
        generator: the source of every random number that a check draws.
        build: makes the rule anew on another model; None where only an instance was given.
        given: the user's task; None leaves the kit's own, which runs no pass of the model.
        gradient_scale: the standard deviation of the entries of a drawn gradient.
    """

    rule: UpdateRule
    model: nn.Module
    generator: torch.Generator
    build: Build | None = None
    given: Task | None = None
    gradient_scale: float = 1.0

    def copy(self) -> Trial:
        """Copies of rule and model that belong together, and share nothing with these."""
        rule, model = copy.deepcopy((self.rule, self.model))
        return replace(self, rule=rule, model=model)

    @property
    def params(self) -> Tensors:
        """θ, without a graph; shares the model's memory."""
        return [p.detach() for p in trainable_parameters(self.model).values()]

    @property
    def phi(self) -> dict[str, nn.Parameter]:
        """The learned φ by name."""
        return {name: p for name, p in self.rule.named_parameters() if p.requires_grad}

    def draw(self, like: Tensor) -> Tensor:
        """Standard normal numbers, drawn on the CPU so that they are the same on every device."""
        numbers = torch.randn(like.shape, generator=self.generator, dtype=torch.float64)
        return numbers.to(like.device, like.dtype)

    def gradients(self) -> Tensors:
        """A random gradient."""
        return [self.gradient_scale * self.draw(p) for p in self.params]

    def start(self, params: Tensors) -> State:
        """The state before the first step at θ, for a rule that has seen a pass if it needs one."""
        if self.given is not None and hasattr(self.rule, "observe"):
            self.backward(self.given)
        return self.rule.init_state(params)

    def inputs(self) -> tuple[Tensors, Tensors, State]:
        """θ, g, and the state after one step, so that a memory is not empty."""
        params = self.params
        state = self.start(params)
        with torch.no_grad():
            _, state = self.rule(params, self.gradients(), state)
        return params, self.gradients(), state

    def task(self) -> Task:
        """The user's task, or the kit's own."""
        return self.given or self.synthetic()

    def synthetic(self) -> Task:
        """J = ½ Σ c (θ − t)² of `quadratic`, an FSD of θ itself, and Q of both."""

        def outputs(model: nn.Module) -> Tensor:
            return torch.cat([p.reshape(-1) for p in trainable_parameters(model).values()])[None]

        loss = quadratic(*self.coefficients())
        return Task(loss, outputs, ProximalObjective("squared_error", 0.3, 0.1))

    def coefficients(self) -> tuple[Tensors, Tensors]:
        """Random curvatures c in [½, 3/2] and targets t of a quadratic loss, shaped as θ.

        Curvatures differ, so that no step is optimal by chance, and are near 1, so that a learning
        rate of 1 does not diverge.
        """
        curvatures = [0.5 + torch.sigmoid(self.draw(p)) for p in self.params]
        return curvatures, [self.draw(p) for p in self.params]

    def optimizer(self, task: Task) -> APO:
        """An APO with a meta-step at every step; Adam moves φ by 0.01 whatever the gradient."""
        meta = torch.optim.Adam(self.rule.parameters(), lr=1e-2)
        return APO(self.model, self.rule, task.objective, meta, interval=1)

    def backward(self, task: Task) -> None:
        """g of J_B into `.grad`; a rule with `observe` sees the pass, if it is one of the model."""
        self.model.zero_grad()
        with self._observed(task):
            task.loss(self.model).backward()

    def meta_step(self, optimizer: APO, task: Task) -> None:
        """A meta-step on the task."""
        loss, outputs = self.closures(task)
        optimizer.meta_step(loss=loss, outputs=outputs)

    def closures(self, task: Task) -> tuple[Closure, OutputsClosure | None]:
        """The task's passes of this model."""
        outputs = task.outputs
        return (
            lambda: task.loss(self.model),
            None if outputs is None else lambda: outputs(self.model),
        )

    def train(self, optimizer: APO, task: Task, steps: int) -> None:
        """`steps` steps of Algorithm 1."""
        for _ in range(steps):
            self.backward(task)
            if optimizer.meta_due:
                self.meta_step(optimizer, task)
            optimizer.step()

    def _observed(self, task: Task) -> AbstractContextManager[object]:
        observe = getattr(self.rule, "observe", None)
        if observe is None or task is not self.given:
            return nullcontext()
        return observe(self.model)


def quadratic(curvatures: Tensors, targets: Tensors) -> Callable[[nn.Module], Tensor]:
    """model -> ½ Σ c (θ − t)², without a pass of the model."""

    def loss(model: nn.Module) -> Tensor:
        triples = zip(curvatures, trainable_parameters(model).values(), targets, strict=True)
        return torch.stack([0.5 * (c * (p - t).square()).sum() for c, p, t in triples]).sum()

    return loss


@contextmanager
def at(rule: UpdateRule, phi: Tensors) -> Iterator[None]:
    """The rule with these values of its learned φ, in order; its own are back afterwards."""
    learned: Tensors = [p for p in rule.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in learned]
    with torch.no_grad():
        torch._foreach_copy_(learned, phi)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(learned, kept)


def norm(tensors: Sequence[Tensor]) -> float:
    """‖·‖ over all tensors, in float64."""
    return float(torch.stack([t.detach().double().norm() for t in tensors]).norm())


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries as one vector (n,), in float64."""
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def eps_of(tensors: Sequence[Tensor]) -> float:
    """Spacing at 1 of the coarsest of the tensors' dtypes."""
    return max(torch.finfo(t.dtype).eps for t in tensors)


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return len(left) == len(right) and all(map(torch.equal, left, right))


def tensors_of(state: State) -> Tensors:
    """The tensors of a state, in its order."""
    return [t for tensors in state.values() for t in tensors]


def clones(tensors: Sequence[Tensor]) -> Tensors:
    """Copies without a graph."""
    return [t.detach().clone() for t in tensors]
