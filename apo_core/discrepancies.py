"""ρ(z, z₀): how far the outputs z at θ' are from the outputs z₀ at θ, and D_F, its mean.

symbol   shape                  meaning
z        (batch, ..., outputs)  the network's outputs at the lookahead θ'
w        (batch, ...)           the mask: weights of the positions, where some do not count
z₀       (batch, ..., outputs)  the same at the current θ, constant
ρ        (batch,)               one number an example: summed over all dimensions but the first
D_F      ()                     the mean of ρ over the batch
H_ρ                             ∂²ρ/∂z² at z = z₀; G = E[Jᵀ H_ρ J] (P22 eq. 34)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor
from torch.func import vjp
from torch.nn.functional import log_softmax, logsigmoid

Order: TypeAlias = Literal["lookahead_current", "current_lookahead"]
"""KL(p_θ' ‖ p_θ), as P18 eq. 9 prints it, or KL(p_θ ‖ p_θ'): one H_ρ; they part at third order."""


class Discrepancy(ABC):
    """ρ(z, z₀) ≥ 0, ρ(z₀, z₀) = 0: the output-space divergence of the FSD. Source: P22 eq. 3."""

    @abstractmethod
    def per_example(self, outputs: Tensor, current: Tensor) -> Tensor:
        """ρ of each example: (batch, ..., outputs) twice -> (batch,), with a graph in `outputs`."""

    @final
    def __call__(self, outputs: Tensor, current: Tensor) -> Tensor:
        """D_F = mean of ρ over the examples: (batch, ..., outputs) twice -> ()."""
        return self.per_example(outputs, current).mean()

    @final
    def masked(self, outputs: Tensor, current: Tensor, mask: Tensor) -> Tensor:
        """D_F = Σ w ρ / Σ w over the positions of w: each is an example of its own, -> ().

        Args:
            outputs: z, (batch, ..., outputs).
            current: z₀, of the same shape.
            mask: w, of the shape's beginning; see `Masked`.
        """
        unused = (mask == 0).reshape(mask.shape + (1,) * (outputs.dim() - mask.dim()))
        positions = [
            z.masked_fill(unused, 0).reshape(mask.numel(), *(outputs.shape[mask.dim() :] or (1,)))
            for z in (outputs, current)
        ]
        weights = mask.flatten().to(outputs.dtype)
        return (weights * self.per_example(positions[0], positions[1])).sum() / weights.sum()


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


class _KullbackLeibler(Discrepancy):
    """KL(p ‖ p₀) or KL(p₀ ‖ p) of the distributions that the outputs stand for."""

    def __init__(self, order: Order = "lookahead_current") -> None:
        if order not in ("lookahead_current", "current_lookahead"):
            raise ValueError(
                "`order` must be 'lookahead_current' (KL(p_θ' ‖ p_θ), P18 eq. 9) or "
                f"'current_lookahead' (KL(p_θ ‖ p_θ')), got {order!r}."
            )
        self.order = order

    @abstractmethod
    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """KL(first ‖ second) of each example: (batch, ..., outputs) twice -> (batch,)."""

    @final
    def per_example(self, outputs: Tensor, current: Tensor) -> Tensor:
        """ρ of each example, (batch,)."""
        first, second = outputs, current
        if self.order == "current_lookahead":
            first, second = second, first
        return self.between(first, second)


@final
class CategoricalKL(_KullbackLeibler):
    """ρ = Σ_y p(y|z) log p(y|z)/p(y|z₀), p = softmax of the last dimension; H_ρ = diag p − ppᵀ.

    Source: P18 eq. 9, P22 section 4.3 (G is then the Fisher).

    Args:
        order: "lookahead_current" is KL(p_θ' ‖ p_θ) as P18 eq. 9 prints it; "current_lookahead" is
            KL(p_θ ‖ p_θ'). Both have the same H_ρ; they part at the third order of the step.

    Raises:
        ValueError: `order` is neither.
    """

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """KL of each example, (batch,); the last dimension holds logits."""
        log_p, log_p2 = log_softmax(first, -1), log_softmax(second, -1)
        return _sum_over_outputs(log_p.exp() * (log_p - log_p2))


@final
class BernoulliKL(_KullbackLeibler):
    """ρ = Σ_c KL(p_c ‖ p_c₀) of independent bits, p = σ(z) of the logits z; H_ρ = diag p(1 − p).

    For multi-label and binary classifiers, and likelihoods of binary pixels.

    Source: P18 eq. 9, P22 section 4.3 (G is then the Fisher).

    Args:
        order: as in `CategoricalKL`.

    Raises:
        ValueError: `order` is neither.
    """

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """ρ of each example, (batch,): Σ p log(p/p₀) + (1 − p) log((1 − p)/(1 − p₀))."""
        # σ(−z), not 1 − σ(z), and its own logarithm: at large |z| nothing cancels.
        on = first.sigmoid() * (logsigmoid(first) - logsigmoid(second))
        off = (-first).sigmoid() * (logsigmoid(-first) - logsigmoid(-second))
        return _sum_over_outputs(on + off)


@final
class GaussianKL(_KullbackLeibler):
    """ρ = Σ_d KL(N(μ, σ²) ‖ N(μ₀, σ₀²)) with z = (μ, log σ); H_ρ = diag(1/σ₀², 2).

    The first half of the last dimension holds the means, the second half as many log σ, each in
    natural units; |log σ| < 40 keeps float32 from overflow.

    Source: P18 eq. 9 with an integral over y, P22 section 4.3 (G is then the Fisher).

    Args:
        order: as in `CategoricalKL`.

    Raises:
        ValueError: `order` is neither; at the call, the last dimension is odd.
    """

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """ρ of each example, (batch,): Σ ½(r² − 1) − log r + ½(Δμ/σ₂)², r = σ₁/σ₂, KL(1 ‖ 2)."""
        if first.shape[-1] % 2:
            raise ValueError(
                "`outputs` must hold means, then as many log sigmas, in its last dimension, got "
                f"shape {tuple(first.shape)}; give the network an even number of outputs."
            )
        (mean, log_sigma), (mean_2, log_sigma_2) = first.chunk(2, -1), second.chunk(2, -1)
        log_ratio = log_sigma - log_sigma_2
        gap = (mean - mean_2) * torch.exp(-log_sigma_2)
        return _sum_over_outputs(
            0.5 * torch.expm1(2.0 * log_ratio) - log_ratio + 0.5 * gap.square()
        )


_POTENTIALS: dict[str, Callable[[Tensor], Tensor]] = {
    "squared_error": lambda z: 0.5 * z.square(),
    "cross_entropy": lambda z: torch.logsumexp(z, -1),
    "binary_cross_entropy": lambda z: -logsigmoid(-z),  # torch's softplus is cut off above 20
    "poisson": torch.exp,
}


@final
class Bregman(Discrepancy):
    """ρ = ψ(z) − ψ(z₀) − ⟨∇ψ(z₀), z − z₀⟩, H_ρ = ∇²ψ(z₀): with a loss for ψ, G is its GGN.

    A loss ℓ(z, t) whose targets enter linearly in z (squared error, cross-entropy, every
    exponential family) has the same divergence for all t, so ψ needs no targets.

    Source: P18 eq. 8.

    Args:
        potential: ψ, convex: (batch, ..., outputs) -> (batch,) or (batch, ..., outputs), or the
            name of the loss whose ψ it is, in z as the loss takes it:
            "squared_error" is ½‖z‖², of predictions;
            "cross_entropy" is log Σ exp z over the last dimension, of logits: KL(p_θ ‖ p_θ');
            "binary_cross_entropy" is Σ log(1 + exp z), of logits: the Bernoulli KL(p_θ ‖ p_θ');
            "poisson" is Σ exp z, of log rates (below 88 in float32): the Poisson KL(p_θ ‖ p_θ').

    ρ is a small difference of large ψ: its rounding is that of ψ. The KL of the same name, with
    order "current_lookahead", is the same function and keeps more digits.

    Raises:
        ValueError: `potential` is an unknown name.
    """

    def __init__(
        self,
        potential: Callable[[Tensor], Tensor]
        | Literal["squared_error", "cross_entropy", "binary_cross_entropy", "poisson"],
    ) -> None:
        if isinstance(potential, str):
            if potential not in _POTENTIALS:
                raise ValueError(
                    f"`potential` must be one of {sorted(_POTENTIALS)} or a callable, got "
                    f"{potential!r}."
                )
            potential = _POTENTIALS[potential]
        self.potential = potential

    def per_example(self, outputs: Tensor, current: Tensor) -> Tensor:
        """ρ of each example, (batch,)."""
        at_current, pull, *_ = vjp(self._summed, current)
        (slope,) = pull(torch.ones_like(at_current))
        rise = self._summed(outputs) - at_current
        return rise - _sum_over_outputs(slope * (outputs - current))

    def _summed(self, z: Tensor) -> Tensor:
        """ψ of each example, (batch,)."""
        return _sum_over_outputs(self.potential(z))


_NAMED: dict[str, Callable[[], Discrepancy]] = {
    "squared_error": SquaredEuclidean,
    "kl": CategoricalKL,
    "bernoulli_kl": BernoulliKL,
    "gaussian_kl": GaussianKL,
    "bregman_squared_error": lambda: Bregman("squared_error"),
    "bregman_cross_entropy": lambda: Bregman("cross_entropy"),
    "bregman_binary_cross_entropy": lambda: Bregman("binary_cross_entropy"),
    "bregman_poisson": lambda: Bregman("poisson"),
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
