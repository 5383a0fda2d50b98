"""P_S = (A ⊗ B) diag(vec S)² (A ⊗ B)ᵀ: EKFAC's form, learned, without an inverse."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from apo_core.preconditioners.preconditioner import Preconditioner, phi_like, require_scale
from apo_core.preconditioners.weights import is_layer_weight, matrix_shape


@final
class EKFAC(Preconditioner):
    """P_S vec(∇W) = vec(B (S² ⊙ Bᵀ ∇W A) Aᵀ), positive semidefinite for every φ = (A, B, S).

    symbol   shape       meaning
    W        (out, in)   a Linear weight, or a Conv weight (out, in·kernel) as a matrix
    A        (in, in)    the input side; starts as I
    B        (out, out)  the output side; starts as I
    S        (out, in)   the scales; start as `initial_scale`, so that P_S = initial_scale² I

    Cost a step: four matrix products, 2·out·in·(out + in) multiplications; memory in² + out² +
    out·in numbers. `dense()` acts on torch's row-major flattening, where A ⊗ B reads kron(B, A).

    Source: P22 eq. 9 and eq. 10.

    Args:
        parameter: a tensor with the shape (out, in, ...), device and dtype of the weight.
        initial_scale: P_S = initial_scale² I at the start.

    Raises:
        ValueError: `parameter` has fewer than two dimensions, `initial_scale` is not positive.
    """

    def __init__(self, parameter: Tensor, initial_scale: float = 1.0) -> None:
        super().__init__()
        outputs, inputs = matrix_shape(parameter)
        like = phi_like(parameter)
        self.A = nn.Parameter(torch.eye(inputs, **like))
        self.B = nn.Parameter(torch.eye(outputs, **like))
        self.S = nn.Parameter(torch.full((outputs, inputs), require_scale(initial_scale), **like))

    @staticmethod
    def accepts(owner: nn.Module, parameter: Tensor) -> bool:
        """Weights of Linear and Conv layers."""
        return is_layer_weight(owner, parameter)

    def forward(self, grad: Tensor) -> Tensor:
        """B (S² ⊙ Bᵀ ∇W A) Aᵀ, eq. 10."""
        A, B, S = self.A, self.B, self.S
        V = grad.flatten(1).to(S.dtype)  # (out, in)
        product = B @ (S.square() * (B.T @ V @ A)) @ A.T
        return product.reshape(grad.shape).to(grad.dtype)

    def dense(self) -> Tensor:
        """(A ⊗ B) diag(vec S)² (A ⊗ B)ᵀ, (out·in, out·in), eq. 9."""
        C = torch.kron(self.B, self.A)
        return C * self.S.square().reshape(-1) @ C.T
