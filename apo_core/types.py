"""The few types that every layer of the engine speaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

Tensors: TypeAlias = list[Tensor]
"""One tensor for each trainable parameter of the model, in the order of `trainable_parameters`."""

State: TypeAlias = dict[str, Tensors]
"""What an update rule remembers between steps (a momentum buffer); fixed for φ (P22 footnote 1)."""

Closure: TypeAlias = Callable[[], Tensor]
"""A forward pass of the user's model at its present parameters: the loss, or the outputs."""


class Masked(NamedTuple):
    """Outputs of which some positions do not count: D_F = Σ w ρ / Σ w over the positions.

    Args:
        outputs: (batch, ..., outputs), as the network returns them; what stands at a position of
            weight 0 is never looked at, and may be NaN.
        mask: w, bool or non-negative weights, some of them positive: (batch,) for one an example,
            (batch, tokens) for one a token. Its shape begins that of `outputs`, and says what a
            position is: without a mask ρ is summed over the tokens of an example instead.
    """

    outputs: Tensor
    mask: Tensor


Outputs: TypeAlias = Tensor | Masked | Sequence[Tensor | Masked] | Mapping[str, Tensor | Masked]
"""What the network returns for B', (batch, ..., outputs): one tensor or several, each its own."""

OutputsClosure: TypeAlias = Callable[[], Outputs]
"""A forward pass of the user's model on B' at its present parameters."""


class ProximalTerms(NamedTuple):
    """Q(φ) = loss + fsd + wsd: the three addends, weights included, as detached 0-d tensors.

    Source: P22 eq. 8.
    """

    loss: Tensor
    fsd: Tensor
    wsd: Tensor

    @property
    def total(self) -> Tensor:
        """Q(φ), a 0-d tensor."""
        return self.loss + self.fsd + self.wsd


class Warmup(NamedTuple):
    """A base optimizer that moves θ for the first `steps` steps, while φ already learns.

    Source: P22 section 6.1 (3000 iterations of SGD with momentum).
    """

    optimizer: torch.optim.Optimizer
    steps: int


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name and value of each parameter that has `requires_grad`; a tied one appears once.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: `model` has no trainable parameter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, got {type(model).__name__}; "
            "wrap loose tensors in a module that holds them as nn.Parameter."
        )
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError(
            "`model` must have at least one parameter with requires_grad, got none; "
            "unfreeze one with requires_grad_(True)."
        )
    return params


def phi_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of φ for parameters of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
