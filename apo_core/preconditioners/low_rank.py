"""P = UUᵀ + diag(s²): a learning rate a coordinate, and a few directions of their own."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from apo_core.preconditioners.preconditioner import (
    Preconditioner,
    phi_like,
    require_count,
    require_scale,
)


@final
class LowRank(Preconditioner):
    """Pg = U(Uᵀg) + s² ⊙ g, positive semidefinite for every φ = (U, s).

    symbol   shape    meaning
    r        –        min(`rank`, n), n the number of the parameter's entries
    U        (n, r)   starts with one entry c = `initial_scale` / √2 a column, in r coordinates
    S        (n, 1)   s; starts as c in these r coordinates, as `initial_scale` in the others

    U = 0 would stay 0: dQ/dU = (K + Kᵀ)U for K = dQ/dP. So U starts with half of P in r
    coordinates, evenly spread, of which s leaves out that half: P = initial_scale² I all the same.

    Cost a step: two thin matrix products and the diagonal, 2·n·r + n multiplications; memory
    n·(r + 1) numbers.

    Args:
        parameter: a tensor with the shape, device and dtype of the parameter.
        initial_scale: P = initial_scale² I at the start.
        rank: r ≥ 1, the number of directions; at most n of them are kept.

    Raises:
        ValueError: `initial_scale` is not positive, `rank` is no integer of at least 1.
    """

    def __init__(self, parameter: Tensor, initial_scale: float = 1.0, rank: int = 8) -> None:
        super().__init__()
        n, scale = parameter.numel(), require_scale(initial_scale)
        r = min(require_count("rank", rank, "the number of columns of U"), n)
        like = phi_like(parameter)
        columns = torch.arange(r, device=parameter.device)
        rows = columns * n // r
        U = torch.zeros(n, r, **like)
        U[rows, columns] = scale * 0.5**0.5
        S = torch.full((n, 1), scale, **like)
        S[rows] *= 0.5**0.5
        self.U = nn.Parameter(U)
        self.S = nn.Parameter(S)

    @staticmethod
    def accepts(owner: nn.Module, parameter: Tensor) -> bool:
        """Every parameter."""
        return True

    def forward(self, grad: Tensor) -> Tensor:
        """U(Uᵀg) + s² ⊙ g."""
        g = grad.reshape(-1, 1).to(self.S.dtype)  # (n, 1)
        product = torch.addmm(self.S.square() * g, self.U, self.U.T @ g)
        return product.reshape(grad.shape).to(grad.dtype)

    def dense(self) -> Tensor:
        """UUᵀ + diag(s²), (n, n)."""
        return self.U @ self.U.T + torch.diag(self.S.square().reshape(-1))
