"""ρ(z, z₀): how far the outputs z at θ' are from the outputs z₀ at θ, and D_F, its mean.

symbol   shape                  meaning
z        (batch, ..., outputs)  the network's outputs at the lookahead θ'
z₀       (batch, ..., outputs)  the same at the current θ, constant
ρ        (batch,)               one number an example: summed over all dimensions but the first
D_F      ()                     the mean of ρ over the batch
H_ρ                             ∂²ρ/∂z² at z = z₀; G = E[Jᵀ H_ρ J] (P22 eq. 34)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


class Discrepancy(ABC):
    """ρ(z, z₀) ≥ 0, ρ(z₀, z₀) = 0: the output-space divergence of the FSD. Source: P22 eq. 3."""

    @abstractmethod
    def per_example(self, outputs: Tensor, current: Tensor) -> Tensor:
        """ρ of each example: (batch, ..., outputs) twice -> (batch,), with a graph in `outputs`."""

    @final
    def __call__(self, outputs: Tensor, current: Tensor) -> Tensor:
        """D_F = mean of ρ over the examples: (batch, ..., outputs) twice -> ()."""
        return self.per_example(outputs, current).mean()


def _sum_over_outputs(values: Tensor) -> Tensor:
    """(batch, ...) -> (batch,)."""
    return values.flatten(1).sum(1) if values.dim() > 1 else values


@final
class SquaredEuclidean(Discrepancy):
    """ρ = ½‖z − z₀‖², H_ρ = I: G is the Gauss-Newton matrix E[JᵀJ].

    Args:
        half: keep the ½. False gives P18 eq. 7, ‖z − z₀‖² with H_ρ = 2I.
    """

    def __init__(self, half: bool = True) -> None:
        self.half = half

    def per_example(self, outputs: Tensor, current: Tensor) -> Tensor:
        """ρ of each example, (batch,)."""
        squared = _sum_over_outputs((outputs - current).square())
        return 0.5 * squared if self.half else squared


@final
class CategoricalKL(Discrepancy):
    """ρ = Σ_y p(y|z) log p(y|z)/p(y|z₀), p = softmax of the last dimension; H_ρ = diag p − ppᵀ.

    Source: P18 eq. 9, P22 section 4.3 (G is then the Fisher).

    Args:
        order: "lookahead_current" is KL(p_θ' ‖ p_θ) as P18 eq. 9 prints it; "current_lookahead" is
            KL(p_θ ‖ p_θ'). Both have the same H_ρ; they part at the third order of the step.

    Raises:
        ValueError: `order` is neither.
    """

    def __init__(
        self, order: Literal["lookahead_current", "current_lookahead"] = "lookahead_current"
    ) -> None:
        if order not in ("lookahead_current", "current_lookahead"):
            raise ValueError(
                "`order` must be 'lookahead_current' (KL(p_θ' ‖ p_θ), P18 eq. 9) or "
                f"'current_lookahead' (KL(p_θ ‖ p_θ')), got {order!r}."
            )
        self.order = order

    def per_example(self, outputs: Tensor, current: Tensor) -> Tensor:
        """ρ of each example, (batch,); the last dimension holds logits."""
        first, second = log_softmax(outputs, -1), log_softmax(current, -1)
        if self.order == "current_lookahead":
            first, second = second, first
        return _sum_over_outputs(first.exp() * (first - second))


@final
class Bregman(Discrepancy):
    """ρ = ψ(z) − ψ(z₀) − ⟨∇ψ(z₀), z − z₀⟩, H_ρ = ∇²ψ(z₀): with a loss for ψ, G is its GGN.

    A loss ℓ(z, t) whose targets enter linearly in z (squared error, cross-entropy, every
    exponential family) has the same divergence for all t, so ψ needs no targets.

    Source: P18 eq. 8.

    Args:
        potential: ψ, convex: (batch, ..., outputs) -> (batch,), or "squared_error" for ½‖z‖², or
            "cross_entropy" for log Σ exp z over the last dimension.

    Raises:
        ValueError: `potential` is an unknown name.
    """

    def __init__(
        self, potential: Callable[[Tensor], Tensor] | Literal["squared_error", "cross_entropy"]
    ) -> None:
        named: dict[str, Callable[[Tensor], Tensor]] = {
            "squared_error": lambda z: 0.5 * z.square(),
            "cross_entropy": lambda z: torch.logsumexp(z, -1),
        }
        if isinstance(potential, str):
            if potential not in named:
                raise ValueError(
                    f"`potential` must be one of {sorted(named)} or a callable, got {potential!r}."
                )
            potential = named[potential]
        self.potential = potential

    def per_example(self, outputs: Tensor, current: Tensor) -> Tensor:
        """ρ of each example, (batch,)."""
        with torch.enable_grad():
            anchor = current.detach().requires_grad_()
            at_current = _sum_over_outputs(self.potential(anchor))
            (slope,) = torch.autograd.grad(at_current.sum(), anchor)
        rise = _sum_over_outputs(self.potential(outputs)) - at_current.detach()
        return rise - _sum_over_outputs(slope * (outputs - current))


_NAMED: dict[str, Callable[[], Discrepancy]] = {
    "squared_error": SquaredEuclidean,
    "kl": CategoricalKL,
}


def resolve_discrepancy(
    discrepancy: str | Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor], Tensor]:
    """The callable D_F(z, z₀) -> () that a name or a callable stands for.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor callable.
    """
    if isinstance(discrepancy, str):
        if discrepancy not in _NAMED:
            raise ValueError(
                f"`discrepancy` must be one of {sorted(_NAMED)}, a Discrepancy, or a callable "
                f"(outputs, current) -> scalar, got {discrepancy!r}."
            )
        return _NAMED[discrepancy]()
    if not callable(discrepancy):
        raise TypeError(
            f"`discrepancy` must be one of {sorted(_NAMED)}, a Discrepancy, or a callable "
            f"(outputs, current) -> scalar, got {type(discrepancy).__name__}."
        )
    return discrepancy
