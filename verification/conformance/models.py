"""Small networks of every kind, each with mini-batches B and B' and a loss: float64, smooth."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import apo_core as apo
from apo_core.testing import Task

CLASSES, TOKENS, EXAMPLES = 3, 3, 4


@final
class Transformer(nn.Module):
    """Tokens (batch, tokens) -> logits (batch, tokens, vocabulary), with dropout.

    The embedding and the last layer are one weight, (vocabulary, dim).
    """

    def __init__(self, vocabulary: int = 4, dim: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.block = nn.TransformerEncoderLayer(
            dim, nhead=2, dim_feedforward=3, dropout=0.2, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every token."""
        return self.head(self.block(self.embedding(tokens)))


@final
class Perceptron(nn.Module):
    """(batch, inputs) -> (batch, classes), times the exponential of a 0-d parameter."""

    def __init__(self, inputs: int = 3, hidden: int = 3, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden, bias)
        self.last = nn.Linear(hidden, CLASSES, bias)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.log_scale.exp() * self.last(self.first(x).tanh())


def convolutional() -> nn.Module:
    """(batch, 1, 3, 3) -> (batch, 3), with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, CLASSES)
    )


class Network(NamedTuple):
    """What makes a network; (generator, examples) -> inputs; the labels of one example, a shape."""

    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator, int], Tensor]
    labels: tuple[int, ...]


NETWORKS: dict[str, Network] = {
    "perceptron": Network(Perceptron, lambda g, n: _normal(g, n, 3), ()),
    "convolutional": Network(convolutional, lambda g, n: _normal(g, n, 1, 3, 3), ()),
    "transformer": Network(
        Transformer, lambda g, n: torch.randint(4, (n, TOKENS), generator=g), (TOKENS,)
    ),
}


def network(kind: Network, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network of that kind, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind.make().to(dtype)


def task(
    kind: Network,
    objective: apo.ProximalObjective,
    *,
    seed: int = 0,
    examples: int = EXAMPLES,
    dtype: torch.dtype = torch.float64,
) -> Task:
    """Classification of random inputs, under `objective`."""
    generator = torch.Generator().manual_seed(seed)
    x, x_other = (_to(kind.inputs(generator, examples), dtype) for _ in range(2))
    y = torch.randint(CLASSES, (examples, *kind.labels), generator=generator)

    def loss(model: nn.Module) -> Tensor:
        return cross_entropy(model(x).flatten(0, -2), y.flatten())

    return Task(loss, lambda model: model(x_other), objective)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _to(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    return inputs.to(dtype) if inputs.is_floating_point() else inputs
