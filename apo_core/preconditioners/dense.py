"""The full matrix P over all parameters: the preconditioner of Theorem 1."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from apo_core.preconditioners.preconditioner import Preconditioner, require_scale
from apo_core.types import phi_dtype


@final
class Dense(Preconditioner):
    """Pg with φ = P ∈ ℝ^{n×n}, unconstrained, over all parameters as one vector.

    Neither symmetric nor positive definite by construction, as in Theorem 1; at the optimum of Q̂
    it is (λ_FSD G + λ_WSD I)⁻¹. Cost: n² multiplications a step, n² numbers; for small n.

    Source: P22 eq. 7.

    Args:
        parameter: a vector (n,) with the device and dtype of the parameters.
        initial_scale: P = initial_scale² I at the start.
    """

    joint: ClassVar[bool] = True

    def __init__(self, parameter: Tensor, initial_scale: float = 1.0) -> None:
        super().__init__()
        n, scale = parameter.numel(), require_scale(initial_scale)
        eye = torch.eye(n, dtype=phi_dtype(parameter.dtype), device=parameter.device)
        self.P = nn.Parameter(scale**2 * eye)

    @staticmethod
    def accepts(owner: nn.Module, parameter: Tensor) -> bool:
        """Every parameter."""
        return True

    def forward(self, grad: Tensor) -> Tensor:
        """Pg for g of shape (n,)."""
        return (self.P @ grad.to(self.P.dtype)).to(grad.dtype)

    def dense(self) -> Tensor:
        """P itself, (n, n)."""
        return self.P
