"""A positive diagonal: one learning rate a coordinate."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from apo_core.preconditioners.preconditioner import Preconditioner, require_scale
from apo_core.types import phi_dtype


@final
class Diagonal(Preconditioner):
    """Pg = s² ⊙ g with φ = s of the parameter's shape: eq. 9 with A and B left out, so P is PSD.

    Cost: n multiplications a step, n numbers.

    Source: P22 eq. 9 (its diagonal case), appendix B.5 (for embeddings).

    Args:
        parameter: a tensor with the shape, device and dtype of the parameter.
        initial_scale: s = initial_scale everywhere at the start, so that P = initial_scale² I.
    """

    def __init__(self, parameter: Tensor, initial_scale: float = 1.0) -> None:
        super().__init__()
        self.S = nn.Parameter(
            torch.full(
                parameter.shape,
                require_scale(initial_scale),
                dtype=phi_dtype(parameter.dtype),
                device=parameter.device,
            )
        )

    @staticmethod
    def accepts(owner: nn.Module, parameter: Tensor) -> bool:
        """Every parameter."""
        return True

    def forward(self, grad: Tensor) -> Tensor:
        """s² ⊙ g."""
        return (self.S.square() * grad).to(grad.dtype)

    def dense(self) -> Tensor:
        """diag(vec(s)²), (n, n)."""
        return torch.diag(self.S.square().reshape(-1))
