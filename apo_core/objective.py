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
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from apo_core.discrepancies import Discrepancy, resolve_discrepancy
from apo_core.lookahead import gradient, lookahead
from apo_core.types import Closure, Masked, OutputsClosure, ProximalTerms, Tensors

Name: TypeAlias = str | int | None
"""Of one output: its key in a mapping, its place in a sequence, None where there is but one."""

Entries: TypeAlias = dict[Name, tuple[Tensor, Tensor | None]]
"""Every output with its mask or None."""

Divergence: TypeAlias = Callable[[Tensor, Tensor], Tensor]


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
    ) -> None:
        self.discrepancy = _resolve(discrepancy)
        self.fsd_weight = fsd_weight
        self.wsd_weight = wsd_weight
        self.loss = _require_choice("loss", loss, ("exact", "linear", "quadratic"))
        self.fsd = _require_choice("fsd", fsd, ("exact", "quadratic"))

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

    def gradient(
        self,
        params: Tensors,
        grads: Tensors,
        updates: Tensors,
        loss: Closure,
        outputs: OutputsClosure | None,
        rewind: Callable[[], None],
    ) -> tuple[ProximalTerms, list[Tensor]]:
        """The three addends of Q at θ' = θ + updates, and q = ∇_θ' Q.

        Args:
            params: θ; moved to θ' and back in place.
            grads: g = ∇J_B(θ), for the linear and the quadratic loss.
            updates: Δ, detached.
            loss: a pass on B at the present parameters, a scalar.
            outputs: a pass on B' at the present parameters, (batch, ..., outputs), or several.
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
                    value = self._divergence(self._call(outputs), current)
                    fsd_term = self.fsd_weight * value.detach()
                    torch._foreach_add_(q, gradient(value, params), alpha=self.fsd_weight)

        if not exact_loss:
            loss_term = _inner(grads, updates)
            torch._foreach_add_(q, grads)
        if self.loss == "quadratic":
            rewind()
            curved = _hessian_product(loss, params, updates)
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
        value = outputs()
        items = _items(value)
        if not isinstance(self.discrepancy, dict):
            return {name: _entry(name, item) for name, item in items.items()}
        missing = [name for name in self.discrepancy if name not in items]
        if missing:
            raise ValueError(
                f"`outputs` must have an entry {missing[0]!r}, for which `discrepancy` has a "
                f"divergence, got {type(value).__name__} with {list(items)}; name the entries as "
                "the model does."
            )
        return {name: _entry(name, items[name]) for name in self.discrepancy}

    def _current_outputs(
        self, outputs: OutputsClosure | None, rewind: Callable[[], None]
    ) -> Entries:
        """z₀, constant; by the same kernels as z (gradients enabled), so that D_F(θ, θ) = 0."""
        rewind()
        with torch.enable_grad():
            entries = self._call(outputs)
        current: Entries = {name: (z.detach(), mask) for name, (z, mask) in entries.items()}
        _require_usable(current)
        return current

    def _divergence(self, ahead: Entries, current: Entries) -> Tensor:
        """D_F(z, z₀), summed over the outputs, a scalar with a graph; masks as they were at θ."""
        if list(ahead) != list(current):
            raise ValueError(
                f"`outputs` must return the same entries twice, got {list(current)} at θ and "
                f"{list(ahead)} at θ'."
            )
        values = []
        for name, (z0, mask) in current.items():
            z = ahead[name][0]
            if z.shape != z0.shape:
                raise ValueError(
                    f"{_label(name)} must return one shape, got {tuple(z0.shape)} at θ and "
                    f"{tuple(z.shape)} at θ'; draw the mini-batch B' outside the closure."
                )
            values.append(_require_scalar(self._compare(name, z, z0, mask), "discrepancy"))
        return torch.stack(values).sum()

    def _compare(self, name: Name, z: Tensor, z0: Tensor, mask: Tensor | None) -> Tensor:
        """D_F(z, z₀) of one output."""
        rho = self.discrepancy
        if isinstance(rho, dict):
            assert name is not None
            rho = rho[name]
        if mask is None:
            return rho(z, z0)
        if not isinstance(rho, Discrepancy):
            raise TypeError(
                "`discrepancy` must be a Discrepancy where `outputs` are Masked, got "
                f"{type(rho).__name__}; subclass apo_core.Discrepancy and write per_example()."
            )
        return rho.masked(z, z0, mask)

    def _quadratic_fsd(
        self,
        params: Tensors,
        updates: Tensors,
        outputs: OutputsClosure | None,
        rewind: Callable[[], None],
    ) -> tuple[Tensor, list[Tensor]]:
        """½ΔᵀGΔ and GΔ = Jᵀ H_ρ (JΔ): the products JΔ and H_ρ(JΔ) by differentiating twice."""
        rewind()
        with torch.enable_grad():
            entries = self._call(outputs)
            current: Entries = {name: (z.detach(), mask) for name, (z, mask) in entries.items()}
            _require_usable(current)
            z = [_require_graph(value, _label(name)) for name, (value, _) in entries.items()]
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
            return 0.5 * _inner(changes, curved), gradient(z, params, curved)


def _resolve(
    discrepancy: str | Divergence | Mapping[str | int, str | Divergence],
) -> Divergence | dict[str | int, Divergence]:
    """One divergence for every output, or one for each name."""
    if not isinstance(discrepancy, Mapping):
        return resolve_discrepancy(discrepancy)
    if not discrepancy:
        raise ValueError(
            "`discrepancy` must name at least one output, got an empty mapping; set fsd_weight=0 "
            "to leave the FSD out."
        )
    return {name: resolve_discrepancy(rho) for name, rho in discrepancy.items()}


def _items(outputs: object) -> dict[Name, object]:
    """What the closure returned, by name."""
    items: dict[Name, object]
    if isinstance(outputs, Mapping):
        items = dict(outputs)
    elif isinstance(outputs, Sequence) and not isinstance(outputs, Masked | str):
        items = dict(enumerate(outputs))
    else:
        return {None: outputs}
    if not items:
        raise ValueError(
            f"`outputs` must return at least one tensor, got an empty {type(outputs).__name__}."
        )
    return items


def _entry(name: Name, value: object) -> tuple[Tensor, Tensor | None]:
    """One output with its mask, checked."""
    z, mask = value if isinstance(value, Masked) else (value, None)
    if not isinstance(z, Tensor) or z.dim() == 0:
        got = "a 0-d tensor" if isinstance(z, Tensor) else type(z).__name__
        raise TypeError(
            f"{_label(name)} must return a tensor (batch, ..., outputs), got {got}; return the "
            "logits or predictions of every example, and of several outputs a tuple, a list or a "
            "mapping; a mapping as `discrepancy` chooses among them."
        )
    if isinstance(value, Masked):
        got = tuple(value.mask.shape) if isinstance(value.mask, Tensor) else None
        if not got or got != tuple(z.shape[: len(got)]):
            raise ValueError(
                f"the mask of {_label(name)} must be a tensor with the first dimensions of the "
                f"outputs' shape {tuple(z.shape)}, got {got or type(value.mask).__name__}; give "
                "one weight an example or a token."
            )
    return z, mask


def _label(name: Name) -> str:
    return "`outputs`" if name is None else f"`outputs[{name!r}]`"


def _require_usable(current: Entries) -> None:
    """Finite where they count, and masks that leave something; one synchronization if all is."""
    finite, sound = [], []
    for z, mask in current.values():
        good = z.isfinite()
        if mask is not None:
            good |= (mask == 0).reshape(mask.shape + (1,) * (z.dim() - mask.dim()))
            sound.append((mask >= 0).all() & (mask > 0).any() & mask.isfinite().all())
        finite.append(good.all())
    if bool(torch.stack(finite + sound).all()):
        return
    for name, ok in zip(current, finite, strict=True):
        if not bool(ok):
            raise ValueError(
                f"{_label(name)} must be finite at the current parameters, got NaN or infinity; "
                "check the mini-batch B' for non-finite inputs."
            )
    raise ValueError(
        "the mask of `outputs` must be bool or finite non-negative weights, some of them positive, "
        "got another; leave out a mini-batch of padding alone."
    )


def _hessian_product(loss: Closure, params: Tensors, direction: Tensors) -> list[Tensor]:
    """Hv of J_B at the present parameters: the gradient of ⟨∇J_B, v⟩."""
    with torch.enable_grad():
        value = _require_scalar(loss(), "loss")
        slopes = torch.autograd.grad(
            value, params, create_graph=True, allow_unused=True, materialize_grads=True
        )
        along = _inner(slopes, direction)
        if not along.requires_grad:  # J_B is linear in θ
            return [torch.zeros_like(p) for p in params]
        return gradient(along, params)


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """⟨left, right⟩ over all tensors, 0-d."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _require_scalar(value: object, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"`{name}` must return a scalar tensor, got {got}; reduce over the batch with mean()."
        )
    return _require_graph(value, f"`{name}`").reshape(())


def _require_graph(value: Tensor, label: str) -> Tensor:
    if not value.requires_grad:
        raise ValueError(
            f"{label} must return a tensor that depends on the parameters, got one without a "
            "graph; compute it with the model inside the closure, not detached or in no_grad()."
        )
    return value
