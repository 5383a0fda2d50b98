"""Eq. 9 of an embedding: diagonal on the vocabulary's side, full on the embedding's."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from apo_core.preconditioners.preconditioner import Preconditioner, phi_like, require_scale
from apo_core.preconditioners.weights import matrix_shape


@final
class EmbeddingEKFAC(Preconditioner):
    """P_S vec(∇W) = vec((S² ⊙ ∇W A) Aᵀ), positive semidefinite for every φ = (A, S).

    symbol   shape               meaning
    W        (vocabulary, dim)   the table, one row a token
    A        (dim, dim)          the embedding's side; starts as I
    S        (vocabulary, dim)   the scales; start as `initial_scale`: P_S = initial_scale² I

    Eq. 9 with a diagonal B, which S absorbs: B (S² ⊙ BᵀV) = (b 1ᵀ ⊙ S)² ⊙ V. So no matrix of the
    vocabulary's size squared is needed, and a token that the mini-batch lacks has no step.

    Cost a step: two matrix products, 2·vocabulary·dim² multiplications; memory dim² +
    vocabulary·dim numbers.

    Source: P22 eq. 9 and appendix B.5.

    Args:
        parameter: a tensor with the shape (vocabulary, dim), device and dtype of the table.
        initial_scale: P_S = initial_scale² I at the start.

    Raises:
        ValueError: `parameter` has fewer than two dimensions, `initial_scale` is not positive.
    """

    def __init__(self, parameter: Tensor, initial_scale: float = 1.0) -> None:
        super().__init__()
        vocabulary, dim = matrix_shape(parameter)
        like = phi_like(parameter)
        self.A = nn.Parameter(torch.eye(dim, **like))
        self.S = nn.Parameter(torch.full((vocabulary, dim), require_scale(initial_scale), **like))

    @staticmethod
    def accepts(owner: nn.Module, parameter: Tensor) -> bool:
        """Tables of Embedding and EmbeddingBag."""
        return isinstance(owner, nn.Embedding | nn.EmbeddingBag)

    def forward(self, grad: Tensor) -> Tensor:
        """(S² ⊙ ∇W A) Aᵀ."""
        V = grad.flatten(1).to(self.S.dtype)
        product = (self.S.square() * (V @ self.A)) @ self.A.T
        return product.reshape(grad.shape).to(grad.dtype)

    def dense(self) -> Tensor:
        """(A ⊗ I) diag(vec S)² (A ⊗ I)ᵀ, (vocabulary·dim, vocabulary·dim): one block a token."""
        blocks = self.A * self.S.square()[:, None] @ self.A.T  # (vocabulary, dim, dim)
        return torch.block_diag(*blocks)
