"""P = blockdiag(F_k F_kᵀ): dense blocks over a flattened parameter."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from apo_core.preconditioners.blocks import equal_blocks
from apo_core.preconditioners.preconditioner import Preconditioner, phi_like, require_scale


@final
class BlockDiagonal(Preconditioner):
    """(Pg)_k = F_k F_kᵀ g_k for the k-th stretch of the flattened g; positive semidefinite.

    symbol   shape       meaning
    K, b     –           ⌈n / `block`⌉ blocks of size ⌈n / K⌉ ≤ `block`, n the parameter's entries
    F        (K, b, b)   φ, a root of each block; starts as s I with s = `initial_scale`

    Where b does not divide n, the last block's last rows meet no gradient and do nothing.

    Cost a step: two batched products, 2·K·b² ≈ 2·n·b multiplications; memory K·b² ≈ n·b numbers.
    The entries lie row-major: a block that is a multiple of a weight's row holds whole rows.

    Args:
        parameter: a tensor with the shape, device and dtype of the parameter.
        initial_scale: P = initial_scale² I at the start.
        block: the largest size of a block.

    Raises:
        ValueError: `initial_scale` is not positive, `block` is no integer of at least 1.
    """

    def __init__(self, parameter: Tensor, initial_scale: float = 1.0, block: int = 64) -> None:
        super().__init__()
        self._size = parameter.numel()
        count, size = equal_blocks(self._size, block)
        root = require_scale(initial_scale) * torch.eye(size, **phi_like(parameter))
        self.F = nn.Parameter(root.repeat(count, 1, 1))

    @staticmethod
    def accepts(owner: nn.Module, parameter: Tensor) -> bool:
        """Every parameter."""
        return True

    def forward(self, grad: Tensor) -> Tensor:
        """F_k F_kᵀ g_k, one block after the other."""
        count, size, _ = self.F.shape
        g = functional.pad(grad.reshape(-1).to(self.F.dtype), (0, count * size - self._size))
        product = self.F @ (self.F.mT @ g.reshape(count, size, 1))  # (K, b, 1)
        return product.reshape(-1)[: self._size].reshape(grad.shape).to(grad.dtype)

    def dense(self) -> Tensor:
        """blockdiag(F_k F_kᵀ) without what is left over, (n, n)."""
        return torch.block_diag(*(self.F @ self.F.mT))[: self._size, : self._size]
