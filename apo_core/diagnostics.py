"""Numbers for a log: Q, the meta-gradient and φ."""

from __future__ import annotations

from torch import Tensor

from apo_core.types import ProximalTerms
from apo_core.update_rule import UpdateRule


def describe_q(terms: ProximalTerms, norm: Tensor) -> dict[str, float]:
    """Q with its addends, and the norm of the meta-gradient."""
    shown = {name: value.item() for name, value in terms._asdict().items()}
    return shown | {"q": terms.total.item(), "meta_gradient_norm": norm.item()}


def describe_phi(rule: UpdateRule) -> dict[str, float]:
    """The least, mean and largest entry of every φ, in its own (unconstrained) coordinates."""
    shown = {}
    for name, phi in rule.named_parameters():
        values = phi.detach().float()
        for what in ("min", "mean", "max"):
            shown[f"phi.{name}.{what}"] = getattr(values, what)().item()
    return shown
