"""Several weights in one tensor, one above the other, each with its own P."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from apo_core.preconditioners.ekfac import EKFAC
from apo_core.preconditioners.preconditioner import (
    Preconditioner,
    Structure,
    require_count,
    structure_class,
)


@final
class Stacked(Preconditioner):
    """P = blockdiag(P_1, ..., P_parts) over equal parts of a parameter along its first dimension.

    For fused projections: attention's `in_proj_weight` (3·dim, dim) holds the queries', keys' and
    values' weights, which have nothing in common but their input.

    Cost a step and memory: those of `structure` on a part (out / parts, in, ...), times parts.

    Args:
        parameter: a tensor with the shape (out, ...), device and dtype of the parameter.
        initial_scale: P = initial_scale² I at the start.
        structure: the structure of each part.
        parts: how many parts; divides out.

    Raises:
        TypeError: `structure` is no structure.
        ValueError: `parts` does not divide out, `structure` acts on all parameters jointly.
    """

    def __init__(
        self,
        parameter: Tensor,
        initial_scale: float = 1.0,
        structure: Structure = EKFAC,
        parts: int = 3,
    ) -> None:
        super().__init__()
        require_count("parts", parts, "the number of weights in the tensor")
        if structure_class(structure).joint:
            raise ValueError(
                f"`structure` must act on one parameter, got {structure!r}, which acts on all "
                "jointly; take another, such as EKFAC."
            )
        if parameter.dim() == 0 or parameter.shape[0] % parts:
            raise ValueError(
                f"`parts` must divide the first dimension of shape {tuple(parameter.shape)}, got "
                f"{parts}; count the weights that were fused."
            )
        self.parts = nn.ModuleList(
            structure(part, initial_scale) for part in parameter.detach().chunk(parts)
        )

    @staticmethod
    def accepts(owner: nn.Module, parameter: Tensor) -> bool:
        """No parameter by itself: how many weights a tensor holds is for a policy to say."""
        return False

    def forward(self, grad: Tensor) -> Tensor:
        """P_k g_k, one below the other."""
        pieces = grad.chunk(len(self.parts))
        return torch.cat([P(g) for P, g in zip(self.parts, pieces, strict=True)])

    def dense(self) -> Tensor:
        """blockdiag(P_k), (n, n)."""
        return torch.block_diag(*[P.dense() for P in self.parts if isinstance(P, Preconditioner)])
