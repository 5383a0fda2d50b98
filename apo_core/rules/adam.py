"""Adam and AdamW with a learning rate and a damping that APO tunes."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from apo_core.rules.layers import Layers, over, plus, require_learned, times
from apo_core.types import State, Tensors
from apo_core.update_rule import UpdateRule

HYPERPARAMETERS = ("lr", "eps")


@final
class Adam(UpdateRule):
    """θ' − θ = −η (m̂ / (√v̂ + ε) + λθ), with φ any of log η, log ε; AdamW where λ > 0.

    symbol   meaning
    η, ε     learning rate and damping; φ is their logarithm
    m, v     `exp_avg`, `exp_avg_sq`: m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g²
    m̂, v̂     m / (1 − β₁ᵗ), v / (1 − β₂ᵗ), t = `step`
    λ        `weight_decay`, decoupled from the gradient as in AdamW

    With φ frozen it takes the steps of `torch.optim.AdamW`, and of `torch.optim.Adam` for λ = 0.
    A weight decay that is part of the loss belongs into the loss closure.

    Source: P18 eq. 22-26.

    Args:
        model: the module to train; only names, shapes, device and dtype are read.
        lr: the initial η > 0.
        betas: (β₁, β₂), each in [0, 1), fixed: a one-step objective cannot tune an average.
        eps: the initial ε > 0.
        weight_decay: λ ≥ 0.
        learn: which of "lr" and "eps" are learned; the other stays.
        per_layer: one of each for each layer.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        learn: tuple[str, ...] = ("lr",),
        per_layer: bool = False,
    ) -> None:
        super().__init__()
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"`betas` must lie in [0, 1), got {betas}.")
        if not 0 <= weight_decay < float("inf"):
            raise ValueError(f"`weight_decay` must be non-negative, got {weight_decay}.")
        require_learned(learn, HYPERPARAMETERS)
        self.elementwise = True
        self._layers = Layers(model, per_layer)
        self.layers = self._layers.names
        self.betas = betas
        self.weight_decay = weight_decay
        self.log_lr = self._layers.log("lr", lr, "lr" in learn)
        self.log_eps = self._layers.log("eps", eps, "eps" in learn)

    @property
    def lr(self) -> Tensor:
        """η, () or (layers,), detached."""
        return self.log_lr.detach().exp()

    @property
    def eps(self) -> Tensor:
        """ε, () or (layers,), detached."""
        return self.log_eps.detach().exp()

    def init_state(self, params: Tensors) -> State:
        """m = v = 0 and t = 0; t is a tensor, so that counting needs no synchronization."""
        return {
            "exp_avg": [torch.zeros_like(p) for p in params],
            "exp_avg_sq": [torch.zeros_like(p) for p in params],
            "step": [torch.zeros((), dtype=self.log_lr.dtype, device=p.device) for p in params],
        }

    def forward(self, params: Tensors, grads: Tensors, state: State) -> tuple[list[Tensor], State]:
        """The step, and the next m, v and t; with an empty state those of the first step."""
        state = state or self.init_state(grads)
        first, second = self.betas
        m = list(torch._foreach_mul(state["exp_avg"], first))
        torch._foreach_add_(m, grads, alpha=1 - first)
        v = list(torch._foreach_mul(state["exp_avg_sq"], second))
        torch._foreach_addcmul_(v, grads, grads, value=1 - second)
        steps = list(torch._foreach_add(state["step"], 1))
        roots = list(torch._foreach_sqrt(v))
        torch._foreach_div_(roots, torch._foreach_sqrt(_left_over(second, steps)))  # √v̂
        damped = plus(roots, self._layers.spread(self.log_eps))
        direction = over(m, times(damped, _left_over(first, steps)))  # m̂ / (√v̂ + ε)
        if self.weight_decay:
            direction = plus(direction, params, alpha=self.weight_decay)
        updates = times(direction, self._layers.each(-self.log_lr.exp()))
        updates = [u.to(p.dtype) for u, p in zip(updates, params, strict=True)]
        return updates, {"exp_avg": m, "exp_avg_sq": v, "step": steps}


def _left_over(beta: float, steps: Tensors) -> Tensors:
    """1 − βᵗ, as −expm1(t log β): in 32 bits 1 − 0.999 would keep four digits."""
    powers = list(torch._foreach_mul(steps, math.log(beta) if beta else -math.inf))
    torch._foreach_expm1_(powers)
    return list(torch._foreach_neg(powers))
