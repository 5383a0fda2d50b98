"""Numbers for a log: Q, the meta-gradient and φ."""

from __future__ import annotations

import torch

from apo_core.types import ProximalTerms
from apo_core.update_rule import UpdateRule


def describe_q(terms: ProximalTerms, rule: UpdateRule) -> dict[str, float]:
    """Q with its addends, and the norm of the meta-gradient that φ's `.grad` holds."""
    shown = {name: value.item() for name, value in terms._asdict().items()}
    grads = [p.grad for p in rule.parameters() if p.grad is not None]
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(grads)])
    return shown | {"q": terms.total.item(), "meta_gradient_norm": norms.norm().item()}


def describe_phi(rule: UpdateRule) -> dict[str, float]:
    """The least, mean and largest entry of every φ, in its own (unconstrained) coordinates."""
    shown = {}
    for name, phi in rule.named_parameters():
        values = phi.detach().float()
        for what in ("min", "mean", "max"):
            shown[f"phi.{name}.{what}"] = getattr(values, what)().item()
    return shown
