"""What a run minimizes: mini-batches, their loss, and how the model is judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.seeds import generator

Batch: TypeAlias = tuple[Tensor, ...]
Stream = Literal["loss", "discrepancy", "curvature"]
LossName = Literal["squared_error", "cross_entropy"]


class Problem(ABC):
    """Mini-batches, their loss, and how the model is judged.

    Attributes:
        loss_name: which discrepancy and which Fisher go with the loss: "squared_error" is
            ½‖z − t‖² (summed over outputs), "cross_entropy" −log softmax(z)[label]; both are
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
    that are misclassified ("cross_entropy") or the mean test loss ("squared_error").

    Args:
        train: inputs (n, d) and targets: labels (n,) or values (n, outputs).
        test: the same of the test set, never used for choosing.
        loss_name: "cross_entropy" or "squared_error".
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
        inputs, targets = self.test
        outputs = model(inputs)
        if self.loss_name == "cross_entropy":
            test = (outputs.argmax(dim=1) != targets).double().mean()
        else:
            test = mean_loss(self.loss_name, outputs, targets)
        loss = self.loss(model, self.train)
        model.train()
        return {"loss": loss.item(), "test": test.item()}


def mean_loss(name: LossName, outputs: Tensor, targets: Tensor) -> Tensor:
    """½‖z − t‖² or −log softmax(z)[label], summed over outputs, averaged over examples."""
    if name == "cross_entropy":
        return F.cross_entropy(outputs, targets)
    return 0.5 * (outputs - targets).square().sum(dim=1).mean()


def _epochs(examples: int, size: int, source: torch.Generator) -> Iterator[Tensor]:
    """Indices of mini-batches, without end: one permutation an epoch."""
    while True:
        yield from torch.randperm(examples, generator=source).split(size)
