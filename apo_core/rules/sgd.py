"""Gradient descent with a learning rate that APO tunes, global or per layer."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from apo_core.rules.layers import Layers, scaled_each
from apo_core.types import State, Tensors
from apo_core.update_rule import UpdateRule


@final
class SGD(UpdateRule):
    """θ' − θ = −η d, with φ = log η; d = g, or v (heavy-ball), or g + μv (Nesterov).

    symbol   meaning
    η        the learning rate, exp(log_lr): () or one for each layer
    μ        `momentum`, fixed: a one-step objective cannot tune it (P18 section 5)
    v        the momentum buffer, v ← μv + g (P18 eq. 18); the step is −η(g + μv) (eq. 19)

    With φ frozen it takes the steps of `torch.optim.SGD`. A layer is a module with parameters of
    its own: weight and bias share a learning rate.

    Source: P22 eq. 6, P18 eq. 18 and eq. 19.

    Args:
        model: the module to train; only names, shapes, device and dtype are read.
        lr: the initial η > 0.
        momentum: μ in [0, 1).
        nesterov: Nesterov's momentum (P18) instead of the heavy ball.
        per_layer: one η for each layer.
        lookahead_momentum: look ahead with the momentum buffer. False, as P18 does it: η is tuned
            "as if there's no momentum", and momentum applied on top. A gradient then moves θ in the
            end by 1/(1 − μ) times what was looked at, which can be far too much: an `update_scale`
            of APO of 2 to 3 times (1 − μ) held on four small tasks (`experiments/limits_rules.py`).

    Raises:
        ValueError: `lr` or `momentum` out of range, `nesterov` without momentum.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        momentum: float = 0.0,
        nesterov: bool = False,
        per_layer: bool = False,
        lookahead_momentum: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must lie in [0, 1), got {momentum}.")
        if nesterov and momentum == 0:
            raise ValueError("`nesterov` must come with `momentum` > 0, got 0.0.")
        self.elementwise = True
        self._layers = Layers(model, per_layer)
        self.layers = self._layers.names
        self.momentum = momentum
        self.nesterov = nesterov
        self.lookahead_from_state = lookahead_momentum
        self.log_lr = self._layers.log("lr", lr)

    @property
    def lr(self) -> Tensor:
        """η, () or (layers,), detached; `layers` names them."""
        return self.log_lr.detach().exp()

    def init_state(self, params: Tensors) -> State:
        """v = 0, or nothing without momentum."""
        return {"momentum": [torch.zeros_like(p) for p in params]} if self.momentum else {}

    def forward(self, params: Tensors, grads: Tensors, state: State) -> tuple[list[Tensor], State]:
        """−η d and the next v; with an empty state d = g."""
        direction, next_state = grads, state
        if "momentum" in state:
            v = _added(grads, state["momentum"], alpha=self.momentum)
            direction = _added(grads, v, alpha=self.momentum) if self.nesterov else v
            next_state = {"momentum": v}
        return scaled_each(self._layers.each(-self.log_lr.exp()), direction), next_state


def _added(left: Tensors, right: Tensors, alpha: float) -> Tensors:
    """left + alpha · right."""
    return list(torch._foreach_add(left, right, alpha=alpha))
