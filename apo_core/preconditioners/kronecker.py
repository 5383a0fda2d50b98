"""P = AAᵀ ⊗ BBᵀ: KFAC's form, learned, without an inverse."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from apo_core.preconditioners.preconditioner import Preconditioner, phi_like, require_scale
from apo_core.preconditioners.weights import is_layer_weight, matrix_shape


@final
class Kronecker(Preconditioner):
    """P vec(∇W) = vec(BBᵀ ∇W AAᵀ), positive semidefinite for every φ = (A, B): eq. 9 with S = 1.

    symbol   shape       meaning
    W        (out, in)   a Linear weight, or a Conv weight (out, in·kernel) as a matrix
    A        (in, in)    a root of the input side; starts as √s I with s = `initial_scale`
    B        (out, out)  a root of the output side; starts as √s I

    The roots make P semidefinite, and lose nothing: every product of positive semidefinite sides
    is one of theirs. The undamped optimum under the KFAC assumptions, A_l⁻¹ ⊗ B_l⁻¹ / λ_FSD, is in
    reach; a damped one is not (EKFAC holds it).

    Cost a step: four matrix products, 2·out·in·(out + in) multiplications; memory in² + out²
    numbers. `dense()` acts on torch's row-major flattening, where A ⊗ B reads kron(B, A).

    Source: P22 Corollary 2, eq. 9.

    Args:
        parameter: a tensor with the shape (out, in, ...), device and dtype of the weight.
        initial_scale: P = initial_scale² I at the start.

    Raises:
        ValueError: `parameter` has fewer than two dimensions, `initial_scale` is not positive.
    """

    def __init__(self, parameter: Tensor, initial_scale: float = 1.0) -> None:
        super().__init__()
        outputs, inputs = matrix_shape(parameter)
        root, like = require_scale(initial_scale) ** 0.5, phi_like(parameter)
        self.A = nn.Parameter(root * torch.eye(inputs, **like))
        self.B = nn.Parameter(root * torch.eye(outputs, **like))

    @staticmethod
    def accepts(owner: nn.Module, parameter: Tensor) -> bool:
        """Weights of Linear and Conv layers."""
        return is_layer_weight(owner, parameter)

    def forward(self, grad: Tensor) -> Tensor:
        """BBᵀ ∇W AAᵀ."""
        A, B = self.A, self.B
        V = grad.flatten(1).to(A.dtype)  # (out, in)
        product = B @ (B.T @ V @ A) @ A.T
        return product.reshape(grad.shape).to(grad.dtype)

    def dense(self) -> Tensor:
        """AAᵀ ⊗ BBᵀ, (out·in, out·in)."""
        return torch.kron(self.B @ self.B.T, self.A @ self.A.T)
