"""The networks that peers are compared on: a multi-layer perceptron and a small LeNet."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

NETWORKS = ("mlp", "lenet")
CLASSES = 3


class Task(NamedTuple):
    """A float64 classifier at random parameters, and a mini-batch."""

    model: nn.Sequential
    x: Tensor  # (6, ...)
    y: Tensor  # (6,)


def task(name: str, seed: int) -> Task:
    """The network of that name, with random images or vectors and labels.

    LeNet's parts in its order, on 8 by 8 pixels: twice a convolution and a pooling, then Linear.
    """
    torch.manual_seed(seed)
    y = torch.randint(CLASSES, (6,))
    if name == "mlp":
        model = nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)
        )
        return Task(model.double(), torch.randn(6, 4, dtype=torch.float64), y)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(2, 3, 2, stride=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(3, 4),
        nn.Tanh(),
        nn.Linear(4, CLASSES),
    )
    return Task(model.double(), torch.randn(6, 1, 8, 8, dtype=torch.float64), y)


def amplification(model: nn.Module) -> float:
    """How much larger an error anywhere in a pass forward and backward arrives; |tanh'| ≤ 1.

    A convolution reads a pixel in at most ⌈kernel / stride⌉ patches a side, so its norm is at most
    that many times the norm of its matrix.
    """
    norms = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            norm = float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2))
            if isinstance(layer, nn.Conv2d):
                norm *= math.ceil(layer.kernel_size[0] / layer.stride[0])
            norms.append(max(1.0, norm))
    return math.prod(norms) ** 2
