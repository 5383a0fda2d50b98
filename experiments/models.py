"""The experiments' networks, initialized from an explicit seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from experiments.seeds import generator


def mlp(
    widths: Sequence[int],
    *,
    seed: int,
    activation: Callable[[], nn.Module] | None = nn.ReLU,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> nn.Sequential:
    """f(x) = W_L σ(… σ(W_1 x + b_1) …) + b_L; without an activation the product of its matrices.

    Weights and biases are drawn from U(−1/√in, 1/√in), as `nn.Linear` does, but from `seed` alone
    and on the CPU, so that every device and every optimizer starts at the same θ.

    Args:
        widths: numbers of units (in, hidden, ..., out), at least two.
        seed: of the initial weights; the order of the data has its own.
        activation: builds the module after each layer but the last; None for a linear network.
        bias: whether the layers have biases.
        dtype: of the parameters.
        device: where the network goes once it is drawn.
    """
    if len(widths) < 2:
        raise ValueError(f"`widths` must hold at least input and output, got {list(widths)}.")
    source = generator(seed, "initialization")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        if layers and activation is not None:
            layers.append(activation())
        # skip_init leaves torch's global random state alone
        layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=dtype)
        layers.append(_drawn(layer, source))
    return nn.Sequential(*layers).to(device)


def lenet(
    *,
    seed: int,
    channels: int = 3,
    classes: int = 10,
    batch_norm: bool = False,
    device: str = "cpu",
) -> nn.Sequential:
    """LeNet for images of 32 × 32: two convolutions 5 × 5 with max-pooling, then 120, 84, classes.

    ReLU after every layer but the last. (N, channels, 32, 32) -> (N, classes); 62,006 parameters
    for 3 channels and 10 classes, 44 more with batch normalization. Initialized as `mlp` is, with
    in = channels · 25 for a convolution. P22 names LeNet and gives no sizes: these are LeCun's
    (1998), with today's activation and pooling.

    Args:
        seed: of the initial weights.
        channels: of the images.
        classes: number of outputs.
        batch_norm: whether the convolutions are normalized.
        device: where the network goes once it is drawn.
    """
    source = generator(seed, "initialization")
    layers: list[nn.Module] = []
    for inputs, outputs in ((channels, 6), (6, 16)):
        convolution = nn.utils.skip_init(nn.Conv2d, inputs, outputs, kernel_size=5)
        layers.append(_drawn(convolution, source))
        if batch_norm:
            layers.append(nn.BatchNorm2d(outputs))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    layers.append(nn.Flatten())  # 32 -> 28 -> 14 -> 10 -> 5: 16 · 5 · 5 = 400
    for inputs, outputs in ((400, 120), (120, 84)):
        layers += [_drawn(nn.utils.skip_init(nn.Linear, inputs, outputs), source), nn.ReLU()]
    layers.append(_drawn(nn.utils.skip_init(nn.Linear, 84, classes), source))
    return nn.Sequential(*layers).to(device)


def _drawn(layer: nn.Module, source: torch.Generator) -> nn.Module:
    """The layer, its weight and bias drawn from U(−1/√in, 1/√in)."""
    weight = layer.get_parameter("weight")
    bound = 1 / math.sqrt(weight[0].numel())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=source)
    return layer


@final
class Rosenbrock(nn.Module):
    """f(x, y) = (1 − x)² + 100 (y − x²)², a module whose one parameter is the point (x, y).

    Its minimum is f(1, 1) = 0; there the Hessian's condition number is 2508.

    Source: P22 appendix C.1, P18 section 5.1; both start at (1, −1.5).

    Args:
        start: the initial (x, y).
        dtype: of the point; float64 by default, since f falls below float32's resolution.
    """

    def __init__(
        self, start: tuple[float, float] = (1.0, -1.5), dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.tensor(start, dtype=dtype))  # (2,)

    def forward(self) -> Tensor:
        """f at the present point, 0-d."""
        x, y = self.point
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2
