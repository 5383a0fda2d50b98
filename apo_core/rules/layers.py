"""Positive hyperparameters as logarithms, one for the model or one for each layer."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from apo_core.types import phi_dtype, trainable_parameters


@final
class Layers:
    """Which φ belongs to which parameter: all share one, or each layer has its own.

    A layer is a module with parameters of its own: its weight and bias share their φ.

    Attributes:
        names: the layers, in the model's order; empty where all parameters share one φ.
    """

    def __init__(self, model: nn.Module, per_layer: bool) -> None:
        params = trainable_parameters(model)
        owners = [name.rpartition(".")[0] for name in params]
        self.names: tuple[str, ...] = tuple(dict.fromkeys(owners)) if per_layer else ()
        self._of = [self.names.index(owner) if per_layer else 0 for owner in owners]
        first = next(iter(params.values()))
        self._dtype, self._device = phi_dtype(first.dtype), first.device

    def log(self, name: str, value: float, learned: bool = True) -> nn.Parameter:
        """φ = log(value), () or (layers,), in at least float32.

        Raises:
            ValueError: `value` is not positive and finite.
        """
        if not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"`{name}` must be positive and finite, got {value}; φ is its logarithm."
            )
        shape = (len(self.names),) if self.names else ()
        phi = torch.full(shape, math.log(value), dtype=self._dtype, device=self._device)
        return nn.Parameter(phi, requires_grad=learned)

    def spread(self, phi: Tensor) -> list[Tensor]:
        """exp(φ) of each parameter, (1,), differentiable.

        Not 0-d: a 0-d φ would be rounded to the 16 bits of a parameter that it is multiplied with.
        """
        values = phi.exp().reshape(-1, 1)
        return [values[layer] for layer in self._of]


def scaled(factor: Tensor, direction: Tensor, like: Tensor) -> Tensor:
    """factor · d in the shape and dtype of `like`: formed in φ's dtype, and rounded once."""
    return (factor * direction).to(like.dtype).view_as(like)


def require_learned(learn: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Refuse what is not a non-empty selection of `known`.

    Raises:
        ValueError: `learn` is empty, or names something else.
    """
    if not learn or not set(learn) <= set(known):
        raise ValueError(f"`learn` must name one or more of {known}, got {learn!r}.")
