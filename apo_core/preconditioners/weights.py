"""Which parameters are weights of layers, and the matrices (out, in) that they are."""

from __future__ import annotations

from torch import Tensor, nn

_MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_layer_weight(owner: nn.Module, parameter: Tensor) -> bool:
    """Whether `parameter` is the weight of a Linear or Conv layer."""
    return isinstance(owner, _MATRIX_LAYERS) and parameter.dim() >= 2


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """(out, in) of a weight (out, in), or of a kernel (out, in / groups, k, ...) with in·k... .

    Padding, dilation and stride change no shape. The groups of a grouped convolution lie along
    out, and share the input side.

    Raises:
        ValueError: fewer than two dimensions.
    """
    if parameter.dim() < 2:
        raise ValueError(
            "`parameter` must be a weight (out, in, ...), got shape "
            f"{tuple(parameter.shape)}; use Diagonal for vectors."
        )
    outputs, inputs = parameter.flatten(1).shape
    return outputs, inputs
