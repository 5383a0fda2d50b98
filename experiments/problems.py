"""What a run minimizes: mini-batches, their loss, and how the model is judged."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.seeds import generator

Batch: TypeAlias = tuple[Tensor, ...]
Stream = Literal["loss", "discrepancy", "curvature"]
LossName = Literal["squared_error", "cross_entropy", "bernoulli"]

EVALUATED_AT_ONCE = 2_000  # examples in one forward pass: convolutions are slow beyond the cache


class Problem(ABC):
    """Mini-batches, their loss, and how the model is judged.

    Attributes:
        loss_name: which discrepancy and which Fisher go with the loss: "squared_error" is
            ½‖z − t‖², "cross_entropy" −log softmax(z)[label], and "bernoulli" the binary
            cross-entropy −Σ t log σ(z) + (1 − t) log σ(−z) of logits; sums over the outputs,
            averaged over examples.
    """

    loss_name: LossName

    @abstractmethod
    def batch(self, stream: Stream) -> Batch:
        """The next mini-batch of a stream: B ("loss"), B' ("discrepancy"), or one for KFAC."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """J_B(θ), 0-d."""

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """z = f(x, θ) of every example, (batch, outputs)."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """How good the model is, lower is better; "loss" is what the run minimizes."""


@final
class Supervised(Problem):
    """A finite training set in shuffled mini-batches, judged on all of it and on a test set.

    `evaluate` returns "loss", the mean training loss, and "test", the fraction of test examples
    that are misclassified ("cross_entropy") or the mean test loss (of the others).

    Args:
        train: inputs (n, ...) and targets: labels (n,) or values (n, outputs).
        test: the same of the test set, never used for choosing.
        loss_name: "cross_entropy", "squared_error" or "bernoulli".
        batch_size: |B| and |B'|; the last mini-batch of an epoch may be smaller.
        seed: of the order of the examples, one permutation an epoch, each stream its own.
        curvature_size: how many examples a curvature estimate gets.
        device: where the examples are kept.
    """

    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        loss_name: LossName,
        *,
        batch_size: int = 128,
        seed: int,
        curvature_size: int = 512,
        device: str = "cpu",
    ) -> None:
        self.loss_name = loss_name
        self.train = tuple(t.to(device) for t in train)
        self.test = tuple(t.to(device) for t in test)
        sizes: dict[Stream, int] = {
            "loss": batch_size,
            "discrepancy": batch_size,
            "curvature": curvature_size,
        }
        self._streams = {
            name: _epochs(len(train[0]), size, generator(seed, name))
            for name, size in sizes.items()
        }
        self.steps_per_epoch = -(-len(train[0]) // batch_size)

    def batch(self, stream: Stream) -> Batch:
        """The next (inputs, targets) of a stream; a new permutation after each epoch."""
        chosen = next(self._streams[stream]).to(self.train[0].device)
        return tuple(t[chosen] for t in self.train)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of the mini-batch."""
        inputs, targets = batch
        return mean_loss(self.loss_name, model(inputs), targets)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The network's outputs; the targets are not used."""
        return model(batch[0])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The mean training loss, and the error on the test set."""
        model.eval()
        judge = _error if self.loss_name == "cross_entropy" else partial(mean_loss, self.loss_name)
        found = {
            "loss": _mean(model, self.train, partial(mean_loss, self.loss_name)),
            "test": _mean(model, self.test, judge),
        }
        model.train()
        return found


class Wrapped(Problem, ABC):
    """Another problem, all of whose methods are its own but those that a subclass has.

    Args:
        problem: the other.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.loss_name = problem, problem.loss_name

    def batch(self, stream: Stream) -> Batch:
        """The next mini-batch of the other problem."""
        return self.problem.batch(stream)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The other problem's J_B(θ)."""
        return self.problem.loss(model, batch)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The network's outputs."""
        return self.problem.outputs(model, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """What the other problem returns."""
        return self.problem.evaluate(model)


@final
class Judged(Wrapped):
    """Another problem, whose evaluation says more.

    Args:
        problem: what is trained on.
        judge: returns further values of the model, by name.
        names: theirs; all infinite where the problem's own values are not finite.
    """

    def __init__(
        self,
        problem: Problem,
        judge: Callable[[nn.Module], dict[str, float]],
        names: Sequence[str],
    ) -> None:
        super().__init__(problem)
        self.judge, self.names = judge, names

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """What the other problem returns, and what the judge does."""
        values = super().evaluate(model)
        if not all(map(math.isfinite, values.values())):
            return values | dict.fromkeys(self.names, math.inf)
        return values | self.judge(model)


@final
class Regularized(Wrapped):
    """J(θ) + λ/2 ‖θ‖² with the J of another problem: weight decay as a part of the loss.

    Every optimizer sees it alike, in its gradients and in Q's loss term. "loss" includes it.

    Args:
        problem: whose loss is J.
        weight_decay: λ ≥ 0.
    """

    def __init__(self, problem: Problem, weight_decay: float) -> None:
        if weight_decay < 0:
            raise ValueError(
                f"`weight_decay` must be non-negative, got {weight_decay}; 0 leaves it out."
            )
        super().__init__(problem)
        self.weight_decay = weight_decay

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """J_B(θ) + λ/2 ‖θ‖²."""
        return super().loss(model, batch) + self._penalty(model)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """What the other problem returns, with λ/2 ‖θ‖² in "loss"."""
        values = super().evaluate(model)
        return {**values, "loss": values["loss"] + self._penalty(model).item()}

    def _penalty(self, model: nn.Module) -> Tensor:
        squares = [p.square().sum() for p in model.parameters() if p.requires_grad]
        return 0.5 * self.weight_decay * torch.stack(squares).sum()


def mean_loss(name: LossName, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of that name, see `Problem`: summed over outputs, averaged over examples, 0-d."""
    if name == "cross_entropy":
        return F.cross_entropy(outputs, targets)
    if name == "bernoulli":
        total = F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
        return total / len(outputs)
    return 0.5 * (outputs - targets).square().sum(dim=1).mean()


def _error(outputs: Tensor, labels: Tensor) -> Tensor:
    """The fraction of examples whose largest output is not the label's, 0-d."""
    return (outputs.argmax(dim=1) != labels).double().mean()


def _mean(
    model: nn.Module, data: tuple[Tensor, ...], judge: Callable[[Tensor, Tensor], Tensor]
) -> float:
    """The mean of a judgement over all examples, some at a time."""
    chunks = zip(*(t.split(EVALUATED_AT_ONCE) for t in data), strict=True)
    return math.fsum(
        len(inputs) / len(data[0]) * judge(model(inputs), targets).item()
        for inputs, targets in chunks
    )


def _epochs(examples: int, size: int, source: torch.Generator) -> Iterator[Tensor]:
    """Indices of mini-batches, without end: one permutation an epoch."""
    while True:
        yield from torch.randperm(examples, generator=source).split(size)
