"""One learning rate for a whole parameter tensor."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from apo_core.preconditioners.preconditioner import Preconditioner, phi_like, require_scale


@final
class Scalar(Preconditioner):
    """Pg = s² g with φ = s, a number: P = s²I is positive semidefinite.

    Cost: n multiplications a step, 1 number.

    Source: P22 eq. 6, one learning rate a tensor, in the coordinates of eq. 9.

    Args:
        parameter: a tensor with the shape, device and dtype of the parameter.
        initial_scale: s at the start, so that P = initial_scale² I.

    Raises:
        ValueError: `initial_scale` is not positive.
    """

    def __init__(self, parameter: Tensor, initial_scale: float = 1.0) -> None:
        super().__init__()
        self.S = nn.Parameter(torch.tensor(require_scale(initial_scale), **phi_like(parameter)))
        self._size = parameter.numel()

    @staticmethod
    def accepts(owner: nn.Module, parameter: Tensor) -> bool:
        """Every parameter."""
        return True

    def forward(self, grad: Tensor) -> Tensor:
        """s² g."""
        # A 0-d φ does not promote: left in 16 bits, g would have s² rounded to 16 bits first.
        return (self.S.square() * grad.to(self.S.dtype)).to(grad.dtype)

    def dense(self) -> Tensor:
        """s²I, (n, n)."""
        return torch.diag(self.S.square().expand(self._size))
