"""Positive hyperparameters as logarithms, one for the model or one for each layer.

`plus`, `times`, `over` and `scaled_each` are the arithmetic of a rule's formula on lists, pair by
pair, so that it is written once: batched, and without temporaries, where nothing keeps them.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from apo_core.types import Tensors, phi_dtype, trainable_parameters


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
        self._shapes = [(1,) if p.dim() else () for p in params.values()]
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
        """exp(φ) of each parameter, (1,), or () where the parameter is 0-d; differentiable."""
        return self.each(phi.exp())

    def each(self, values: Tensor) -> list[Tensor]:
        """The value, of () or (layers,), that belongs to each parameter.

        (1,) and not 0-d: a 0-d one would be rounded to the 16 bits of a parameter beside it.
        """
        of_layer = values.reshape(-1, 1).unbind()
        pairs = zip(self._of, self._shapes, strict=True)
        return [of_layer[layer] if shape else of_layer[layer][0] for layer, shape in pairs]


def scaled(factor: Tensor, direction: Tensor, like: Tensor) -> Tensor:
    """factor · d in the shape and dtype of `like`: formed in φ's dtype, and rounded once."""
    return (factor * direction).to(like.dtype).view_as(like)


def scaled_each(factors: Tensors, directions: Tensors) -> list[Tensor]:
    """factor · d, in the dtype of d: formed in φ's dtype, and rounded once."""
    products = _each(operator.mul, torch._foreach_mul, directions, factors)
    return [product.to(d.dtype) for product, d in zip(products, directions, strict=True)]


def times(left: Tensors, right: Tensors) -> Tensors:
    """left · right; `left` is given up, and may be overwritten."""
    return _each(operator.mul, torch._foreach_mul_, left, right)


def plus(left: Tensors, right: Tensors, alpha: float = 1.0) -> Tensors:
    """left + alpha · right; `left` is given up, and may be overwritten."""
    add = functools.partial(torch.add, alpha=alpha)
    return _each(add, functools.partial(torch._foreach_add_, alpha=alpha), left, right)


def over(left: Tensors, right: Tensors) -> Tensors:
    """left / right."""
    return _each(operator.truediv, torch._foreach_div, left, right)


def _each(
    one: Callable[[Tensor, Tensor], Tensor],
    batched: Callable[..., object],
    left: Tensors,
    right: Tensors,
) -> Tensors:
    """`one` of every pair; `batched` does it where there is no graph, no vmap and one dtype.

    A graph may need what is overwritten, vmap knows no batched operation, and 16 bits would round
    after every operation instead of once.
    """
    transformed = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
    if transformed or any(x.dtype != y.dtype for x, y in zip(left, right, strict=True)):
        return [one(x, y) for x, y in zip(left, right, strict=True)]
    first = right[0]
    shared = first.numel() == 1 and all(y is first for y in right)
    result = batched(left, first.reshape(()) if shared else right)
    return left if result is None else list(result)  # type: ignore[call-overload]


def require_learned(learn: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Refuse what is not a non-empty selection of `known`.

    Raises:
        ValueError: `learn` is empty, or names something else.
    """
    if not learn or not set(learn) <= set(known):
        raise ValueError(f"`learn` must name one or more of {known}, got {learn!r}.")
