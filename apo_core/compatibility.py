"""What an APO is built from must fit together."""

from __future__ import annotations

import torch

from apo_core.distributed import is_sharded
from apo_core.objective import ProximalObjective
from apo_core.update_rule import UpdateRule


def require_instance(name: str, value: object, kind: type) -> None:
    """The argument of that name is of that class."""
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be a {kind.__name__}, got {type(value).__name__}.")


def require_phi(rule: UpdateRule, meta_optimizer: torch.optim.Optimizer) -> None:
    """There is a φ to learn, and the meta-optimizer holds all of it."""
    phi = {id(p) for p in rule.parameters() if p.requires_grad}
    if not phi:
        raise ValueError(
            "`rule` must have a parameter φ with requires_grad, got none: nothing is left to learn."
        )
    held = {id(p) for group in meta_optimizer.param_groups for p in group["params"]}
    if not phi <= held:
        raise ValueError(
            f"`meta_optimizer` must hold every φ of the rule, got {len(phi & held)} of {len(phi)}; "
            "build it as torch.optim.RMSprop(rule.parameters(), lr=0.1)."
        )


def require_shardable(rule: UpdateRule, objective: ProximalObjective) -> None:
    """FSDP2 gives gradients by its own hooks alone, once; φ is whole on every rank."""
    if objective.loss == "quadratic" or objective.fsd == "quadratic":
        raise ValueError(
            "`objective` must be exact, or have the linear loss, under FSDP2, which differentiates "
            f"only once, got loss={objective.loss!r}, fsd={objective.fsd!r}."
        )
    if any(map(is_sharded, rule.parameters())):
        raise ValueError(
            f"`rule` must be built before `fully_shard`, got a {type(rule).__name__} whose φ is "
            "sharded; build the rule on the plain model, shard the model, then build APO."
        )
