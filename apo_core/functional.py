"""Q(φ) as a pure function, for `torch.func`: gradients, Hessians and many φ at once.

```python
from torch.func import functional_call, grad, vmap

params = {name: p.detach() for name, p in model.named_parameters()}
loss = lambda params: F.cross_entropy(functional_call(model, params, x), y)
outputs = lambda params: functional_call(model, params, x_other)
rule = apo.rules.SGD(model, lr=0.1)


def Q(phi):
    return apo.meta_objective(
        phi, params, grads, rule=rule, objective=objective, loss=loss, outputs=outputs
    )


grads = grad(loss)(params)
phi = {name: p.detach() for name, p in rule.named_parameters()}
slope = grad(Q)(phi)  # dQ/dφ
curve = vmap(Q)({"log_lr": torch.linspace(-9, 0, 5)})  # Q at 5 learning rates
```

`vmap` over mini-batches or over an ensemble takes another function, of (x, y) or of `params`, that
forms its own `grads`. `APO.meta_backward` has the same dQ/dφ at the cost of first order; here
`torch.func` differentiates through the network, which is dearer and general.

symbol    here       meaning
θ, θ'     `params`   the parameters and the lookahead θ + Δ
φ         `phi`      the parameters of the update rule
g         `grads`    ∇J_B(θ), constant
Δ         `updates`  u(θ, φ, g) − θ
z₀, z                the outputs on B' at θ and at θ'
J, H_ρ               ∂z/∂θ and ∂²ρ/∂z² at θ; G = E[Jᵀ H_ρ J]
H                    ∇²J_B(θ)

Source: P22 eq. 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.func import functional_call, grad, vjp
from torch.overrides import TorchFunctionMode

from apo_core.objective import ProximalObjective
from apo_core.outputs import Entries, divergence_values, entries_of, require_scalar
from apo_core.rules.learning_rate import LearningRate
from apo_core.types import Outputs, State
from apo_core.update_rule import UpdateRule

Params: TypeAlias = dict[str, Tensor]


def meta_objective(
    phi: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    *,
    rule: UpdateRule,
    objective: ProximalObjective,
    loss: Callable[[Params], Tensor],
    outputs: Callable[[Params], Outputs] | None = None,
    state: State | None = None,
) -> Tensor:
    """Q(φ) = J_B(θ') + λ_FSD E[D_F(θ', θ)] + λ_WSD/2 ‖θ' − θ‖², (). Source: P22 eq. 8.

    Pure: nothing is moved, and nothing drawn. So must `loss` and `outputs` be: give BatchNorm's
    buffers to `functional_call`, or use `model.eval()`, which also stills dropout. The values of
    masks are not looked at, so that they may be batched.

    Args:
        phi: φ by name, as `dict(rule.named_parameters())`; what is missing is as in `rule`.
        params: θ by name: the model's trainable parameters in their order.
        grads: g by the same names, as `torch.func.grad(loss)(params)`.
        rule: u(θ, φ, g); only its structure, constants and buffers are read.
        objective: the form and the weights of Q; a trust region is left out.
        loss: θ -> J_B(θ), ().
        outputs: θ -> the outputs on B', (batch, ..., outputs), or several, or `Masked`. Not needed
            where `fsd_weight` is 0.
        state: the rule's memory, as `APO.rule_state`; None for a fresh one.

    Returns:
        Q, with the constant J_B(θ) left out of a linear or quadratic loss.

    Raises:
        TypeError: `rule` is no function of φ (`rules.LearningRate`); an output is no tensor.
        ValueError: unknown names, `outputs` is missing, or something has the wrong shape.
    """
    _require_function(rule)
    _require_names("phi", phi, dict(rule.named_parameters()), all_of_them=False)
    _require_names("grads", grads, params, all_of_them=True)
    theta = dict(params)
    updates = _updates(phi, theta, grads, rule, state)
    ahead = {name: p + updates[name] for name, p in theta.items()}

    q = _loss_term(objective.loss, loss, theta, ahead, grads, updates)
    if objective.fsd_weight > 0:
        if outputs is None:
            raise ValueError(
                "`outputs` must be a function of the parameters, got None while `fsd_weight` > 0; "
                "pass outputs=lambda params: functional_call(model, params, x_other)."
            )
        q = q + objective.fsd_weight * _fsd_term(objective, outputs, theta, ahead, updates)
    if objective.wsd_weight > 0:
        q = q + 0.5 * objective.wsd_weight * _inner(updates, updates)
    return q


def _updates(
    phi: Mapping[str, Tensor],
    theta: Params,
    grads: Mapping[str, Tensor],
    rule: UpdateRule,
    state: State | None,
) -> Params:
    """Δ by name; looked ahead from the state, or from none, as the rule says."""
    params = list(theta.values())
    if not rule.lookahead_from_state:
        state = {}
    elif state is None:
        state = rule.init_state(params)
    arguments = (params, [grads[name] for name in theta], state)
    with _ForeachAsLoops():
        updates, _ = functional_call(rule, dict(phi), arguments)
    return dict(zip(theta, updates, strict=True))


def _loss_term(
    mode: str,
    loss: Callable[[Params], Tensor],
    theta: Params,
    ahead: Params,
    grads: Mapping[str, Tensor],
    updates: Params,
) -> Tensor:
    """J_B(θ'), or gᵀΔ, or gᵀΔ + ½ΔᵀHΔ."""

    def value(params: Params) -> Tensor:
        return require_scalar(loss(params), "loss")

    if mode == "exact":
        return value(ahead)
    change = _inner(grads, updates)
    if mode == "quadratic":
        (curved,) = vjp(grad(value), theta)[1](updates)  # HᵀΔ = HΔ
        change = change + 0.5 * _inner(updates, curved)
    return change


def _fsd_term(
    objective: ProximalObjective,
    outputs: Callable[[Params], Outputs],
    theta: Params,
    ahead: Params,
    updates: Params,
) -> Tensor:
    """E[ρ(z, z₀)], or ½ΔᵀGΔ = ½ (JΔ)ᵀ H_ρ (JΔ), summed over the outputs."""
    rho = objective.discrepancy

    def divergence(z: dict[Any, Tensor], current: Entries) -> Tensor:
        entries: Entries = {name: (value, None) for name, value in z.items()}
        return torch.stack(divergence_values(rho, entries, current)).sum()

    def tensors(params: Params) -> tuple[dict[Any, Tensor], dict[Any, Tensor]]:
        """z by name, and the masks that there are."""
        entries = entries_of(outputs(params), rho)
        masks = {name: mask for name, (_, mask) in entries.items() if mask is not None}
        return {name: z for name, (z, _) in entries.items()}, masks

    z0, masks = tensors(theta)
    current: Entries = {name: (z, masks.get(name)) for name, z in z0.items()}
    if objective.fsd == "exact":
        return divergence(tensors(ahead)[0], current)
    # The transposed map, Jᵀw, is linear in w: transposed again, it is JΔ. (Forward mode has no
    # formula for some layers.)
    unused = {name: torch.zeros_like(z) for name, z in z0.items()}

    def pulled(w: dict[Any, Tensor]) -> Params:
        return vjp(lambda params: tensors(params)[0], theta)[1](w)[0]

    (changes,) = vjp(pulled, unused)[1](updates)
    (curved,) = vjp(grad(lambda z: divergence(z, current)), z0)[1](changes)  # H_ρ JΔ
    return 0.5 * _inner(changes, curved)


@final
class _ForeachAsLoops(TorchFunctionMode):
    """Runs `torch._foreach_*` tensor by tensor, since `vmap` has no rules for them.

    Those in place put new tensors into the list, for a batched one does not fit into another.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = function.__name__, kwargs or {}
        one = getattr(torch, name.removeprefix("_foreach_").removesuffix("_"), None)
        if one is None or not name.startswith("_foreach_"):
            return function(*args, **kwargs)
        results = [
            one(*(a[i] if isinstance(a, list | tuple) else a for a in args), **kwargs)
            for i in range(len(args[0]))
        ]
        if name.endswith("_"):
            args[0][:] = results
        return results


def _inner(left: Mapping[Any, Tensor], right: Mapping[Any, Tensor]) -> Tensor:
    """⟨left, right⟩ over all names, ()."""
    return torch.stack([(value * right[name]).sum() for name, value in left.items()]).sum()


def _require_function(rule: UpdateRule) -> None:
    if any(isinstance(part, LearningRate) for part in rule.modules()):
        raise TypeError(
            "`rule` must be a pure function of φ, got LearningRate, which lets a torch.optim "
            "object take a step; use rules.SGD, RMSprop or Adam here, or APO.meta_backward."
        )


def _require_names(
    argument: str, given: Mapping[str, Any], known: Mapping[str, Any], *, all_of_them: bool
) -> None:
    unknown = [name for name in given if name not in known]
    missing = [name for name in known if name not in given] if all_of_them else []
    if unknown or missing:
        raise ValueError(
            f"`{argument}` must have the names {list(known)}, got {list(given)}; take φ from "
            "rule.named_parameters(), θ and g from model.named_parameters()."
        )
