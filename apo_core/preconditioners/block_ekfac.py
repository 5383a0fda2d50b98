"""Eq. 9 with A and B block-diagonal: EKFAC for wide layers."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from apo_core.preconditioners.blocks import equal_blocks
from apo_core.preconditioners.preconditioner import Preconditioner, phi_like, require_scale
from apo_core.preconditioners.weights import is_layer_weight, matrix_shape


@final
class BlockEKFAC(Preconditioner):
    """P_S vec(∇W) = vec(B (S² ⊙ Bᵀ ∇W A) Aᵀ), A and B block-diagonal; positive semidefinite.

    symbol   shape           meaning
    W        (out, in)       a Linear weight, or a Conv weight (out, in·kernel) as a matrix
    K_A, a   –               ⌈in / `block`⌉ blocks of size ⌈in / K_A⌉ ≤ `block`
    K_B, b   –               ⌈out / `block`⌉ blocks of size ⌈out / K_B⌉ ≤ `block`
    A        (K_A, a, a)     the input side's blocks; each starts as I
    B        (K_B, b, b)     the output side's blocks; each starts as I
    S        (out, in)       the scales; start as `initial_scale`, so that P_S = initial_scale² I

    With `block` ≥ max(out, in) it is EKFAC. Where a block's size does not divide its side, W is
    padded with zeros, in' = K_A·a and out' = K_B·b; the padding's scales are zero, so that the
    last block's last rows and columns do nothing.

    Cost a step: four batched products, 2·out'·in'·(a + b) multiplications; memory K_A·a² + K_B·b²
    + out·in ≈ in·a + out·b + out·in numbers.

    Source: P22 eq. 9 and eq. 10, its sides cut into blocks.

    Args:
        parameter: a tensor with the shape (out, in, ...), device and dtype of the weight.
        initial_scale: P_S = initial_scale² I at the start.
        block: the largest size of a block, of either side.

    Raises:
        ValueError: `parameter` has fewer than two dimensions, `initial_scale` is not positive,
            `block` is no integer of at least 1.
    """

    def __init__(self, parameter: Tensor, initial_scale: float = 1.0, block: int = 64) -> None:
        super().__init__()
        outputs, inputs = matrix_shape(parameter)
        (count_A, a), (count_B, b) = equal_blocks(inputs, block), equal_blocks(outputs, block)
        like = phi_like(parameter)
        self.A = nn.Parameter(torch.eye(a, **like).repeat(count_A, 1, 1))
        self.B = nn.Parameter(torch.eye(b, **like).repeat(count_B, 1, 1))
        self.S = nn.Parameter(torch.full((outputs, inputs), require_scale(initial_scale), **like))

    @staticmethod
    def accepts(owner: nn.Module, parameter: Tensor) -> bool:
        """Weights of Linear and Conv layers."""
        return is_layer_weight(owner, parameter)

    def forward(self, grad: Tensor) -> Tensor:
        """B (S² ⊙ Bᵀ ∇W A) Aᵀ, eq. 10."""
        A, B, S = self.A, self.B, self.S
        outputs, inputs = S.shape
        V = self._padded(grad.flatten(1).to(S.dtype))  # (out', in')
        rotated = self._padded(S.square()) * _two_sided(B.mT, V, A)
        product = _two_sided(B, rotated, A.mT)[:outputs, :inputs]
        return product.reshape(grad.shape).to(grad.dtype)

    def dense(self) -> Tensor:
        """(A ⊗ B) diag(vec S)² (A ⊗ B)ᵀ, (out·in, out·in), eq. 9."""
        outputs, inputs = self.S.shape
        A, B = torch.block_diag(*self.A)[:inputs], torch.block_diag(*self.B)[:outputs]
        C = torch.kron(B, A)  # (out·in, out'·in')
        return C * self._padded(self.S).square().reshape(-1) @ C.T

    def _padded(self, matrix: Tensor) -> Tensor:
        """(out, in) -> (out', in'), zeros below and to the right."""
        (count_A, a, _), (count_B, b, _) = self.A.shape, self.B.shape
        below, right = count_B * b - matrix.shape[0], count_A * a - matrix.shape[1]
        return functional.pad(matrix, (0, right, 0, below)) if below or right else matrix


def _two_sided(B: Tensor, V: Tensor, A: Tensor) -> Tensor:
    """blockdiag(B) V blockdiag(A), (out', in')."""
    by_columns = V.unflatten(1, A.shape[:2]).transpose(0, 1)  # (K_A, out', a)
    right = torch.bmm(by_columns, A).transpose(0, 1)  # (out', K_A, a)
    by_rows = right.reshape(*B.shape[:2], V.shape[1])  # (K_B, b, in')
    return torch.bmm(B, by_rows).flatten(0, 1)
