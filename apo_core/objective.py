"""Q(φ) = J_B(θ') + λ_FSD E[D_F(θ', θ)] + λ_WSD/2 ‖θ' − θ‖², and its gradient in θ'.

symbol    meaning
θ, θ'     the parameters and the lookahead θ' = θ + Δ
Δ         the update u(θ, φ, g) of the rule; g = ∇J_B(θ) does not depend on φ
q         ∇_θ' Q: all that the meta-gradient dQ/dφ = (∂Δ/∂φ)ᵀ q needs of the network
z₀, z     the outputs on the other mini-batch B' at θ and at θ'
J, H_ρ    ∂z/∂θ and ∂²ρ/∂z² at θ; G = E[Jᵀ H_ρ J]

Source: P22 eq. 8 and Algorithm 1; the linear loss with the quadratic FSD is Q̂ of Theorem 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, final

import torch
from torch import Tensor

from apo_core.discrepancies import resolve_discrepancy
from apo_core.lookahead import gradient, lookahead
from apo_core.types import Closure, ProximalTerms, Tensors


def _require_weight(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(
            f"`{name}` must be non-negative and finite, got {value}; 0 leaves the term out."
        )
    return float(value)


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")
    return value


@final
class ProximalObjective:
    """Q(φ) = J_B(θ') + λ_FSD E[D_F(θ', θ)] + λ_WSD/2 ‖θ' − θ‖². Source: P22 eq. 8.

    Args:
        discrepancy: ρ of the FSD: "kl" (categorical, on logits), "squared_error" (½‖z − z₀‖²), a
            `Discrepancy`, or a callable (outputs at θ', outputs at θ) -> scalar.
        fsd_weight: λ_FSD ≥ 0, in units of loss over discrepancy; 0 saves both passes on B'.
        wsd_weight: λ_WSD ≥ 0, in units of loss over squared weight.
        loss: "exact" is J_B(θ'), one pass at θ'; "linear" is gᵀΔ, the change to first order, no
            pass (the constant J_B(θ) is left out, as in P22 eq. 43).
        fsd: "exact" is E[ρ(z, z₀)]; "quadratic" is ½ΔᵀGΔ, its second-order expansion at θ (P22
            eq. 16), by one GGN-vector product at θ.

    Raises:
        ValueError: a negative or non-finite weight, an unknown name.
        TypeError: `discrepancy` is neither a name nor callable.
    """

    def __init__(
        self,
        discrepancy: str | Callable[[Tensor, Tensor], Tensor] = "kl",
        fsd_weight: float = 0.0,
        wsd_weight: float = 0.0,
        loss: Literal["exact", "linear"] = "exact",
        fsd: Literal["exact", "quadratic"] = "exact",
    ) -> None:
        self.discrepancy = resolve_discrepancy(discrepancy)
        self.fsd_weight = _require_weight("fsd_weight", fsd_weight)
        self.wsd_weight = _require_weight("wsd_weight", wsd_weight)
        self.loss = _require_choice("loss", loss, ("exact", "linear"))
        self.fsd = _require_choice("fsd", fsd, ("exact", "quadratic"))

    def gradient(
        self,
        params: Tensors,
        grads: Tensors,
        updates: Tensors,
        loss: Closure,
        outputs: Closure | None,
        rewind: Callable[[], None],
    ) -> tuple[ProximalTerms, list[Tensor]]:
        """The three addends of Q at θ' = θ + updates, and q = ∇_θ' Q.

        Args:
            params: θ; moved to θ' and back in place.
            grads: g = ∇J_B(θ), for the linear loss.
            updates: Δ, detached.
            loss: a pass on B at the present parameters, a scalar.
            outputs: a pass on B' at the present parameters, (batch, ..., outputs).
            rewind: rewinds the random state, so that both passes on B' see the same dropout mask.

        Returns:
            The addends (detached, 0-d) and q, one tensor for each parameter.
        """
        zero = updates[0].new_zeros(())
        loss_term, fsd_term, wsd_term = zero, zero, zero
        q = list(torch._foreach_mul(updates, self.wsd_weight))
        if self.wsd_weight > 0:
            wsd_term = 0.5 * self.wsd_weight * _inner(updates, updates)
        exact_loss = self.loss == "exact"
        exact_fsd = self.fsd_weight > 0 and self.fsd == "exact"

        current = None
        if exact_fsd:
            current = self._current_outputs(outputs, rewind)
        elif self.fsd_weight > 0:
            value, slope = self._quadratic_fsd(params, updates, outputs, rewind)
            fsd_term = self.fsd_weight * value
            torch._foreach_add_(q, slope, alpha=self.fsd_weight)

        if exact_loss or exact_fsd:
            with lookahead(params, updates), torch.enable_grad():
                if exact_loss:  # B, then B': one graph at a time
                    rewind()
                    value = _require_scalar(loss(), "loss")
                    loss_term = value.detach()
                    torch._foreach_add_(q, gradient(value, params))
                    del value
                if current is not None:
                    rewind()
                    value = self._divergence(_call_outputs(outputs), current)
                    fsd_term = self.fsd_weight * value.detach()
                    torch._foreach_add_(q, gradient(value, params), alpha=self.fsd_weight)

        if not exact_loss:
            loss_term = _inner(grads, updates)
            torch._foreach_add_(q, grads)
        return ProximalTerms(loss_term, fsd_term, wsd_term), q

    def _current_outputs(self, outputs: Closure | None, rewind: Callable[[], None]) -> Tensor:
        """z₀, constant; by the same kernels as z (gradients enabled), so that D_F(θ, θ) = 0."""
        rewind()
        with torch.enable_grad():
            current = _call_outputs(outputs).detach()
        if not bool(current.isfinite().all()):
            raise ValueError(
                "`outputs` must be finite at the current parameters, got NaN or infinity; check "
                "the mini-batch B' for non-finite inputs."
            )
        return current

    def _divergence(self, ahead: Tensor, current: Tensor) -> Tensor:
        """D_F(z, z₀), a scalar with a graph."""
        if ahead.shape != current.shape:
            raise ValueError(
                f"`outputs` must return one shape, got {tuple(current.shape)} at θ and "
                f"{tuple(ahead.shape)} at θ'; draw the mini-batch B' outside the closure."
            )
        return _require_scalar(self.discrepancy(ahead, current), "discrepancy")

    def _quadratic_fsd(
        self,
        params: Tensors,
        updates: Tensors,
        outputs: Closure | None,
        rewind: Callable[[], None],
    ) -> tuple[Tensor, list[Tensor]]:
        """½ΔᵀGΔ and GΔ = Jᵀ H_ρ (JΔ): the products JΔ and H_ρ(JΔ) by differentiating twice."""
        rewind()
        with torch.enable_grad():
            z = _call_outputs(outputs)
            dummy = torch.zeros_like(z, requires_grad=True)
            pulled = torch.autograd.grad(  # Jᵀ dummy, linear in dummy
                z, params, dummy, create_graph=True, allow_unused=True, materialize_grads=True
            )
            (change,) = torch.autograd.grad(  # JΔ, (batch, ..., outputs)
                pulled, dummy, updates, retain_graph=True
            )
            free = z.detach().requires_grad_()
            value = self._divergence(free, z.detach())
            (slope,) = torch.autograd.grad(value, free, create_graph=True)
            (curved,) = torch.autograd.grad(slope, free, change)  # H_ρ JΔ / batch
            return 0.5 * (change * curved).sum(), gradient(z, params, curved)


def _inner(left: Tensors, right: Tensors) -> Tensor:
    """⟨left, right⟩ over all parameters, 0-d."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _require_scalar(value: object, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"`{name}` must return a scalar tensor, got {got}; reduce over the batch with mean()."
        )
    if not value.requires_grad:
        raise ValueError(
            f"`{name}` must return a tensor that depends on the parameters, got one without a "
            "graph; compute it with the model inside the closure, not detached or in no_grad()."
        )
    return value.reshape(())


def _call_outputs(outputs: Closure | None) -> Tensor:
    if outputs is None:
        raise ValueError(
            "`outputs` must be a closure that runs the model on the mini-batch B', got None while "
            "`fsd_weight` > 0; pass outputs=lambda: model(x_other) or set fsd_weight=0."
        )
    value = outputs()
    if not isinstance(value, Tensor) or value.dim() == 0:
        got = "a 0-d tensor" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"`outputs` must return a tensor (batch, ..., outputs), got {got}; return the logits "
            "or predictions of every example."
        )
    return value
