"""A third party's update rule in one file: the README's example."""

import math

import torch
from torch import Tensor, nn

from apo_core import UpdateRule


class Softsign(UpdateRule):
    """θ' − θ = −η g / (|g| + ε): sign descent for gradients above ε.

    φ is `log_lr`, the logarithm of η in units of θ, and `log_eps`, that of ε in units of g.
    """

    claims = frozenset({"descent", "translation invariant", "permutation equivariant"})

    def __init__(self, model: nn.Module, lr: float = 1e-2, eps: float = 1e-1) -> None:
        super().__init__()
        like = next(model.parameters())
        dtype = torch.promote_types(like.dtype, torch.float32)  # φ in 32 bits at least
        self.log_lr = nn.Parameter(like.new_tensor(math.log(lr), dtype=dtype))
        self.log_eps = nn.Parameter(like.new_tensor(math.log(eps), dtype=dtype))

    def init_state(self, params: list[Tensor]) -> dict[str, list[Tensor]]:
        """No memory."""
        return {}

    def forward(
        self, params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]]
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """−η g / (|g| + ε), and no state."""
        lr, eps = self.log_lr.exp(), self.log_eps.exp()
        return [(-lr * g / (torch.abs(g) + eps)).to(g.dtype) for g in grads], state
