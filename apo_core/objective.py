"""Q(φ) = J_B(θ') + λ_FSD E[D_F(θ', θ)] + λ_WSD/2 ‖θ' − θ‖², and its gradient in θ'.

symbol    meaning
θ, θ'     the parameters and the lookahead θ' = θ + Δ
Δ         the update u(θ, φ, g) of the rule; g = ∇J_B(θ) does not depend on φ
q         ∇_θ' Q: all that the meta-gradient dQ/dφ = (∂Δ/∂φ)ᵀ q needs of the network
z₀, z     the outputs on the other mini-batch B' at θ and at θ'
J, H_ρ    ∂z/∂θ and ∂²ρ/∂z² at θ; G = E[Jᵀ H_ρ J]
H         ∇²J_B(θ)

Source: P22 eq. 8 and Algorithm 1; the linear loss with the quadratic FSD is Q̂ of Theorem 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from apo_core.lookahead import gradient, lookahead
from apo_core.outputs import (
    Divergence,
    Divergences,
    Entries,
    divergence_values,
    entries_of,
    label,
    require_scalar,
    require_sound_masks,
    resolve_divergences,
    widened,
)
from apo_core.types import Closure, OutputsClosure, ProximalTerms, Tensors


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


class Passes(NamedTuple):
    """The closures of a meta-step, and how it runs them.

    Args:
        loss: a pass on B at the present parameters, a scalar.
        outputs: a pass on B' at the present parameters, (batch, ..., outputs), or several.
        rewind: rewinds the random state, so that both passes on B' see the same dropout mask.
        loss_scale: multiplies what goes backward, and is divided out of the gradients.
    """

    loss: Closure
    outputs: OutputsClosure | None
    rewind: Callable[[], None]
    loss_scale: float = 1.0


@final
class ProximalObjective:
    """Q(φ) = J_B(θ') + λ_FSD E[D_F(θ', θ)] + λ_WSD/2 ‖θ' − θ‖². Source: P22 eq. 8.

    Several outputs (a tuple, a list or a mapping, as Hugging Face's models return) each have a
    discrepancy, and D_F is their sum; `Masked` takes padding out of it. The weights may follow a
    schedule:

    ```python
    for step, (x, y) in enumerate(loader):
        objective.fsd_weight = 0.3 * 0.999**step
    ```

    The mini-batches are those that the closures of `APO.meta_step` run on. Eq. 8 is `loss` on the
    B whose gradient is in `.grad`, and `outputs` on another B'. The ablations of P22 appendix D
    need only other closures: eq. 13 takes `loss` on another mini-batch too (exact loss alone: the
    others expand about g, which is of B), eq. 14 takes `outputs` on B itself.

    Args:
        discrepancy: ρ of the FSD: "kl" (categorical, on logits), "squared_error" (½‖z − z₀‖²),
            "bernoulli_kl", "gaussian_kl", "bregman_poisson", ..., a `Discrepancy`, or a callable
            (outputs at θ', outputs at θ) -> scalar; it serves every output. Or a mapping from the
            names (in a sequence: the places) of outputs to these; outputs not in it do not count.
        fsd_weight: λ_FSD ≥ 0, in units of loss over discrepancy; 0 saves both passes on B'. May be
            set at any time.
        wsd_weight: λ_WSD ≥ 0, in units of loss over squared weight. May be set at any time.
        loss: "exact" is J_B(θ'), one pass at θ'; "linear" is gᵀΔ, the change to first order, no
            pass; "quadratic" is gᵀΔ + ½ΔᵀHΔ, the change to second order, by one Hessian-vector
            product at θ, for which the loss is differentiated twice. (The constant J_B(θ) is left
            out of both, as in P22 eq. 43.)
        fsd: "exact" is E[ρ(z, z₀)]; "quadratic" is ½ΔᵀGΔ, its second-order expansion at θ (P22
            eq. 16), by one GGN-vector product at θ.

        trust_factor: κ > 1, or None. With it Q may rise by at most (κ − 1)·|J_B(θ)|, both from
            standing still to the lookahead and by a meta-step, and steps between two meta-steps
            stay near the last one's length: see `apo_core.trust_region`. For an initial learning
            rate or preconditioner that may be too large, where the papers' settings diverge; 1.1
            is a good value. A meta-step then takes 4 more forward passes.

    Raises:
        ValueError: a negative or non-finite weight, an unknown name, an empty mapping.
        TypeError: `discrepancy` is neither a name nor callable.
    """

    def __init__(
        self,
        discrepancy: str | Divergence | Mapping[str | int, str | Divergence] = "kl",
        fsd_weight: float = 0.0,
        wsd_weight: float = 0.0,
        loss: Literal["exact", "linear", "quadratic"] = "exact",
        fsd: Literal["exact", "quadratic"] = "exact",
        trust_factor: float | None = None,
    ) -> None:
        self.discrepancy: Divergences = resolve_divergences(discrepancy)
        self.fsd_weight = fsd_weight
        self.wsd_weight = wsd_weight
        self.loss = _require_choice("loss", loss, ("exact", "linear", "quadratic"))
        self.fsd = _require_choice("fsd", fsd, ("exact", "quadratic"))
        if trust_factor is not None and not 1 < trust_factor < math.inf:
            raise ValueError(
                f"`trust_factor` must be None, or finite and above 1, got {trust_factor}; 2 lets "
                "the loss of the mini-batch double."
            )
        self.trust_factor = trust_factor

    @property
    def fsd_weight(self) -> float:
        """λ_FSD ≥ 0; setting it takes effect at the next meta-step."""
        return self._fsd_weight

    @fsd_weight.setter
    def fsd_weight(self, value: float) -> None:
        self._fsd_weight = _require_weight("fsd_weight", value)

    @property
    def wsd_weight(self) -> float:
        """λ_WSD ≥ 0; setting it takes effect at the next meta-step."""
        return self._wsd_weight

    @wsd_weight.setter
    def wsd_weight(self, value: float) -> None:
        self._wsd_weight = _require_weight("wsd_weight", value)

    def look_ahead(
        self,
        params: Tensors,
        grads: Tensors,
        updates: Tensors,
        passes: Passes,
        derivative: bool = True,
    ) -> tuple[ProximalTerms, list[Tensor]]:
        """The three addends of Q at θ' = θ + updates, and q = ∇_θ' Q.

        Args:
            params: θ; moved to θ' and back in place.
            grads: g = ∇J_B(θ), for the linear and the quadratic loss.
            updates: Δ, detached.
            passes: on B and B' at the present parameters.
            derivative: False leaves the backward passes of the exact terms out, and q incomplete.

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
        scale = passes.loss_scale

        def add_slope(value: Tensor, weight: float) -> None:
            """To q: `weight` · ∇value, by a backward pass of `scale` · value."""
            if derivative:
                slope = gradient(value if scale == 1.0 else scale * value, params)
                torch._foreach_add_(q, slope, alpha=weight / scale)

        current = None
        if exact_fsd:
            current = self._current_outputs(passes)
        elif self.fsd_weight > 0:
            value, slope = self._quadratic_fsd(params, updates, passes)
            fsd_term = self.fsd_weight * value
            torch._foreach_add_(q, slope, alpha=self.fsd_weight)

        if exact_loss or exact_fsd:
            with lookahead(params, updates), torch.enable_grad():
                if exact_loss:  # B, then B': one graph at a time
                    passes.rewind()
                    value = _loss_value(passes.loss)
                    loss_term = value.detach()
                    add_slope(value, 1.0)
                    del value
                if current is not None:
                    passes.rewind()
                    value = self._divergence(self._call(passes.outputs), current)
                    fsd_term = self.fsd_weight * value.detach()
                    add_slope(value, self.fsd_weight)

        if not exact_loss:
            loss_term = _inner(grads, updates)
            torch._foreach_add_(q, grads)
        if self.loss == "quadratic":
            passes.rewind()
            curved = _hessian_product(passes, params, updates)
            loss_term = loss_term + 0.5 * _inner(updates, curved)
            torch._foreach_add_(q, curved)
        return ProximalTerms(loss_term, fsd_term, wsd_term), q

    def _call(self, outputs: OutputsClosure | None) -> Entries:
        """The outputs that have a discrepancy, at the present parameters."""
        if outputs is None:
            raise ValueError(
                "`outputs` must be a closure that runs the model on the mini-batch B', got None "
                "while `fsd_weight` > 0; pass outputs=lambda: model(x_other) or set fsd_weight=0."
            )
        return entries_of(outputs(), self.discrepancy)

    def _current_outputs(self, passes: Passes) -> Entries:
        """z₀, constant; by the same kernels as z (gradients enabled), so that D_F(θ, θ) = 0."""
        passes.rewind()
        with torch.enable_grad():
            return _constant(self._call(passes.outputs))

    def _divergence(self, ahead: Entries, current: Entries) -> Tensor:
        """D_F(z, z₀), summed over the outputs, a scalar with a graph."""
        values = divergence_values(self.discrepancy, ahead, current)
        return torch.stack([_require_graph(value, "`discrepancy`") for value in values]).sum()

    def _quadratic_fsd(
        self, params: Tensors, updates: Tensors, passes: Passes
    ) -> tuple[Tensor, list[Tensor]]:
        """½ΔᵀGΔ and GΔ = Jᵀ H_ρ (JΔ): the products JΔ and H_ρ(JΔ) by differentiating twice."""
        passes.rewind()
        with torch.enable_grad():
            entries = self._call(passes.outputs)
            current = _constant(entries)
            z = [_require_graph(value, label(name)) for name, (value, _) in entries.items()]
            dummies = [torch.zeros_like(value, requires_grad=True) for value in z]
            pulled = torch.autograd.grad(  # Jᵀ dummy, linear in dummy
                z, params, dummies, create_graph=True, allow_unused=True, materialize_grads=True
            )
            changes = torch.autograd.grad(  # JΔ, (batch, ..., outputs)
                pulled, dummies, updates, retain_graph=True
            )
            free = [value.detach().requires_grad_() for value in z]
            ahead: Entries = {
                name: (value, None) for name, value in zip(entries, free, strict=True)
            }
            slopes = torch.autograd.grad(self._divergence(ahead, current), free, create_graph=True)
            curved = torch.autograd.grad(slopes, free, changes)  # H_ρ JΔ / batch
            scale = passes.loss_scale
            product = gradient(z, params, [scale * c for c in curved])
            return 0.5 * _inner(changes, curved), [p / scale for p in product]


def _constant(entries: Entries) -> Entries:
    """The outputs at θ without their graph, and their masks, which must leave something."""
    require_sound_masks(entries)
    return {name: (z.detach(), mask) for name, (z, mask) in entries.items()}


def _hessian_product(passes: Passes, params: Tensors, direction: Tensors) -> list[Tensor]:
    """Hv of J_B at the present parameters: the gradient of ⟨∇J_B, v⟩."""
    with torch.enable_grad():
        value = passes.loss_scale * _loss_value(passes.loss)
        slopes = torch.autograd.grad(
            value, params, create_graph=True, allow_unused=True, materialize_grads=True
        )
        along = _inner(slopes, direction)
        if not along.requires_grad:  # J_B is linear in θ
            return [torch.zeros_like(p) for p in params]
        return [h / passes.loss_scale for h in gradient(along, params)]


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """⟨left, right⟩ over all tensors, 0-d, in at least float32."""
    products = [(widened(a) * widened(b)).sum() for a, b in zip(left, right, strict=True)]
    return torch.stack(products).sum()


def _loss_value(loss: Closure) -> Tensor:
    """J_B at the present parameters, () with a graph."""
    return _require_graph(require_scalar(loss(), "loss"), "`loss`")


def _require_graph(value: Tensor, what: str) -> Tensor:
    if not value.requires_grad:
        raise ValueError(
            f"{what} must return a tensor that depends on the parameters, got one without a "
            "graph; compute it with the model inside the closure, not detached or in no_grad()."
        )
    return value
