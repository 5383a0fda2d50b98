"""Layers and networks whose K-FAC factors are compared, on both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

import apo_core as apo
from apo_core.rules.kfac_factors import Factors
from reference.arrays import Array
from reference.convolution import ConvNet
from reference.networks import MLP, Network
from verification import bridge

# One layer each, with the input that it reads, (N, ...).
LAYERS: dict[str, tuple[Callable[[bool], nn.Linear | nn.Conv2d], tuple[int, ...]]] = {
    "linear": (lambda bias: nn.Linear(3, 2, bias), (5, 3)),
    "linear on sequences": (lambda bias: nn.Linear(3, 2, bias), (3, 4, 3)),
    "conv": (lambda bias: nn.Conv2d(2, 2, 2, bias=bias), (3, 2, 4, 3)),
    "conv 1x1": (lambda bias: nn.Conv2d(2, 3, 1, bias=bias), (3, 2, 2, 2)),
    "conv oblong": (lambda bias: nn.Conv2d(2, 2, (1, 3), (2, 1), (0, 1), bias=bias), (2, 2, 3, 4)),
    "conv stride": (lambda bias: nn.Conv2d(1, 2, 2, 2, 1, bias=bias), (3, 1, 4, 5)),
    "conv dilation": (lambda bias: nn.Conv2d(1, 2, 2, dilation=2, bias=bias), (3, 1, 4, 4)),
    "conv same": (lambda bias: nn.Conv2d(1, 2, (2, 3), padding="same", bias=bias), (2, 1, 3, 3)),
    "conv same dilated": (
        lambda bias: nn.Conv2d(1, 2, 2, padding="same", dilation=(1, 3), bias=bias),
        (2, 1, 4, 4),
    ),
    "conv valid": (lambda bias: nn.Conv2d(1, 2, 2, padding="valid", bias=bias), (2, 1, 3, 3)),
    "conv reflect": (
        lambda bias: nn.Conv2d(1, 2, 3, padding=(1, 2), padding_mode="reflect", bias=bias),
        (2, 1, 4, 4),
    ),
}


# Kernel, stride and padding of the convolutions; None for a multi-layer perceptron.
NETWORKS: dict[str, tuple[int, int, int] | None] = {
    "mlp": None,
    "conv": (2, 1, 0),
    "conv stride padding": (2, 2, 1),
    "conv 1x1": (1, 1, 0),
}


def both(name: str, bias: bool, seed: int) -> tuple[Network, Array, nn.Module]:
    """The oracle's network, θ, and the torch module of the same function at θ."""
    torch.manual_seed(seed)
    geometry = NETWORKS[name]
    if geometry is None:
        network: Network = MLP([3, 4, 3, 2], "tanh", bias)
        linear = (nn.Linear(3, 4, bias), nn.Linear(4, 3, bias), nn.Linear(3, 2, bias))
        model = nn.Sequential(linear[0], nn.Tanh(), linear[1], nn.Tanh(), linear[2])
    else:
        kernel, stride, padding = geometry
        net = ConvNet((2, 3, 3), [2, 2], 3, kernel, stride, padding, "tanh", bias)
        network = net
        first, second = (nn.Conv2d(2, 2, *geometry, bias=bias) for _ in range(2))
        last = nn.Linear(net.layers[-1].shape[1], 3, bias)
        pixels = nn.Unflatten(1, tuple(net.images[0]))
        model = nn.Sequential(pixels, first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), last)
    model.double()
    flat = [p.detach().flatten(1) if p.dim() > 1 else p.detach() for p in model.parameters()]
    return network, bridge.to_vector(flat, network), model


def reach(model: nn.Module) -> float:
    """An error anywhere in a pass, or in a slope (|σ''| ≤ 1), is amplified at most so much."""
    norms = [max(1.0, float(p.detach().norm())) for p in model.parameters() if p.dim() > 1]
    return float(np.prod(norms)) ** 2


def factors_of(rule: apo.rules.KFAC) -> list[Factors]:
    """The factors of each layer, in order."""
    return [cast(Factors, factors) for factors in rule.factors]


def observed(
    model: nn.Module, loss: Callable[[], Tensor], smoothing: float = 0.95, interval: int = 10
) -> apo.rules.KFAC:
    """A rule that saw one mini-batch."""
    rule = apo.rules.KFAC(model, smoothing=smoothing, interval=interval)
    with rule.observe(model):
        loss().backward()
    return rule


def halved_square(z: Tensor) -> Tensor:
    """The mean over examples of ½‖z‖², so that Ds = z at the last layer."""
    return 0.5 * z.square().sum() / len(z)
