"""P = AAᵀ ⊗ I or I ⊗ BBᵀ: one side of a weight, left or right, has a matrix."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor, nn

from apo_core.preconditioners.preconditioner import Preconditioner, phi_like, require_scale
from apo_core.preconditioners.weights import is_layer_weight, matrix_shape


@final
class OneSided(Preconditioner):
    """P vec(∇W) = vec(∇W FFᵀ) on the inputs, vec(FFᵀ ∇W) on the outputs; positive semidefinite.

    symbol   shape             meaning
    W        (out, in)         a Linear weight, or a Conv weight (out, in·kernel) as a matrix
    F        (in, in) or       φ, a root of the side that is preconditioned; starts as s I with
             (out, out)        s = `initial_scale`

    Cost a step, with d = in or out, the side's size: two matrix products, 2·out·in·d
    multiplications; memory d² numbers. Take the smaller side, or the worse conditioned one.

    Source: P22 eq. 9 with S = 1 and one of A and B the identity.

    Args:
        parameter: a tensor with the shape (out, in, ...), device and dtype of the weight.
        initial_scale: P = initial_scale² I at the start.
        side: "input" or "output".

    Raises:
        ValueError: `parameter` has fewer than two dimensions, `initial_scale` is not positive,
            `side` is another word.
    """

    def __init__(
        self,
        parameter: Tensor,
        initial_scale: float = 1.0,
        side: Literal["input", "output"] = "input",
    ) -> None:
        super().__init__()
        if side not in ("input", "output"):
            raise ValueError(
                f"`side` must be 'input' or 'output', got {side!r}; EKFAC preconditions both."
            )
        outputs, inputs = matrix_shape(parameter)
        self.side = side
        size, self._other = (inputs, outputs) if side == "input" else (outputs, inputs)
        self.F = nn.Parameter(require_scale(initial_scale) * torch.eye(size, **phi_like(parameter)))

    @staticmethod
    def accepts(owner: nn.Module, parameter: Tensor) -> bool:
        """Weights of Linear and Conv layers."""
        return is_layer_weight(owner, parameter)

    def forward(self, grad: Tensor) -> Tensor:
        """∇W FFᵀ, or FFᵀ ∇W."""
        F, V = self.F, grad.flatten(1).to(self.F.dtype)  # V: (out, in)
        product = V @ F @ F.T if self.side == "input" else F @ (F.T @ V)
        return product.reshape(grad.shape).to(grad.dtype)

    def dense(self) -> Tensor:
        """FFᵀ ⊗ I, or I ⊗ FFᵀ, (out·in, out·in); row-major, so that the output side comes first."""
        side, eye = self.F @ self.F.T, torch.eye(self._other).to(self.F)
        return torch.kron(eye, side) if self.side == "input" else torch.kron(side, eye)
