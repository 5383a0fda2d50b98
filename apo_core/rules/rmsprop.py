"""RMSprop with a learning rate, an exponent and a damping that APO tunes."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from apo_core.rules.layers import Layers, over, plus, require_learned, times
from apo_core.types import State, Tensors
from apo_core.update_rule import UpdateRule

HYPERPARAMETERS = ("lr", "rho", "eps")


@final
class RMSprop(UpdateRule):
    """θ' − θ = −η g / (s^ρ + ε), with φ any of log η, log ρ, log ε.

    symbol   meaning
    η, ρ, ε  learning rate, power of the second moment, damping; φ is their logarithm
    γ        `smoothing`, fixed: a one-step objective cannot tune an average
    s        `square_avg`, s ← γs + (1 − γ)g² (P18 eq. 20)

    With φ frozen and ρ = ½ it takes the steps of `torch.optim.RMSprop` (γ is its `alpha`).

    Source: P18 eq. 20 and eq. 21.

    Args:
        model: the module to train; only names, shapes, device and dtype are read.
        lr: the initial η > 0.
        smoothing: γ in [0, 1).
        rho: the initial ρ > 0.
        eps: the initial ε > 0.
        learn: which of "lr", "rho" and "eps" are learned; the others stay.
        per_layer: one of each for each layer.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        smoothing: float = 0.99,
        rho: float = 0.5,
        eps: float = 1e-8,
        learn: tuple[str, ...] = ("lr",),
        per_layer: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"`smoothing` must lie in [0, 1), got {smoothing}.")
        require_learned(learn, HYPERPARAMETERS)
        self.elementwise = True
        self._layers = Layers(model, per_layer)
        self.layers = self._layers.names
        self.smoothing = smoothing
        self.log_lr = self._layers.log("lr", lr, "lr" in learn)
        self.log_rho = self._layers.log("rho", rho, "rho" in learn)
        self.log_eps = self._layers.log("eps", eps, "eps" in learn)

    @property
    def lr(self) -> Tensor:
        """η, () or (layers,), detached."""
        return self.log_lr.detach().exp()

    @property
    def rho(self) -> Tensor:
        """ρ, () or (layers,), detached."""
        return self.log_rho.detach().exp()

    @property
    def eps(self) -> Tensor:
        """ε, () or (layers,), detached."""
        return self.log_eps.detach().exp()

    def init_state(self, params: Tensors) -> State:
        """s = 0."""
        return {"square_avg": [torch.zeros_like(p) for p in params]}

    def forward(self, params: Tensors, grads: Tensors, state: State) -> tuple[list[Tensor], State]:
        """−η g / (s^ρ + ε) and the next s; with an empty state s = (1 − γ)g², as at the start."""
        previous = state["square_avg"] if state else [torch.zeros_like(g) for g in grads]
        squares = list(torch._foreach_mul(previous, self.smoothing))
        torch._foreach_addcmul_(squares, grads, grads, value=1 - self.smoothing)
        damped = plus(self._powers(squares), self._layers.spread(self.log_eps))
        updates = times(over(grads, damped), self._layers.each(-self.log_lr.exp()))
        updates = [u.to(g.dtype) for u, g in zip(updates, grads, strict=True)]
        return updates, {"square_avg": squares}

    def _powers(self, squares: Tensors) -> Tensors:
        """s^ρ; √s, in a tenth of the time, where ρ is ½ and stays so."""
        if _is_half(self.log_rho):
            return list(torch._foreach_sqrt(squares))
        exponents = self._layers.spread(self.log_rho)
        return [_power(s, rho) for s, rho in zip(squares, exponents, strict=True)]


def _is_half(log_rho: Tensor) -> bool:
    """Whether ρ is frozen at ½, where that can be seen without waiting for a device."""
    own = isinstance(log_rho, nn.Parameter)  # not what torch.func put in its place
    if not own or log_rho.requires_grad or log_rho.device.type != "cpu":
        return False
    return bool((log_rho == math.log(0.5)).all())


def _power(s: Tensor, rho: Tensor) -> Tensor:
    """s^ρ, with the derivative 0 in ρ where s = 0: s^ρ log s has the limit 0, not 0 · (−∞)."""
    if not torch.is_grad_enabled():
        return s**rho
    positive = s > 0
    return torch.where(positive, torch.where(positive, s, 1.0) ** rho, 0.0)
