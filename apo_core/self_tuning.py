"""Optimizers whose learning rate needs no search: the settings that served four tasks best.

setting            value        from (`experiments/limits.py`, `experiments/limits_rules.py`)
λ_FSD              1e-3         P22 section 6.3; 0 and 0.1 differ by no more than the seeds do
κ                  1.1          without it over-relaxed steps and large initial rates diverge
meta-optimizer     RMSprop 0.1  P22 section 6.3; Adam and smaller rates are no better
K                  10           P22 section 6.1; 1 is no better
η, σ               `SETTINGS`   those whose worst loss over the four tasks is lowest

Final training loss over that of the best fixed learning rate of the rule:

rule     worst of the four they were chosen on    Protein    LeNet on CIFAR-10
SGDm     4.1                                      1.0        1.6
SGD      1.7                                      0.9        3.0
RMSprop  1.5                                      1.2        4.4

The four are digits, Parkinsons, and 5,000 images each of MNIST and Fashion-MNIST; the other two had
no part in the choice (`experiments/held_out.py`). On LeNet an over-relaxed step is far too long:
SGD and RMSprop hardly train it, and so SGD with momentum is the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import nn

from apo_core.objective import ProximalObjective
from apo_core.optimizer import APO
from apo_core.outputs import Divergence
from apo_core.rules import SGD, RMSprop
from apo_core.update_rule import UpdateRule

FSD_WEIGHT = 1e-3
TRUST_FACTOR = 1.1
META_LEARNING_RATE = 0.1
INTERVAL = 10


class Setting(NamedTuple):
    """What differs from rule to rule.

    Args:
        lr: the initial η.
        update_scale: σ, in (0, 2).
        momentum: μ of SGD.
    """

    lr: float
    update_scale: float
    momentum: float = 0.0


Rule = Literal["SGD", "SGDm", "RMSprop"]

SETTINGS: Mapping[Rule, Setting] = MappingProxyType(
    {
        "SGD": Setting(lr=1e-3, update_scale=1.8),
        "SGDm": Setting(lr=10.0, update_scale=0.18, momentum=0.9),
        "RMSprop": Setting(lr=0.1, update_scale=1.8),
    }
)


def self_tuning(
    model: nn.Module,
    rule: Rule = "SGDm",
    discrepancy: str | Divergence | Mapping[str | int, str | Divergence] = "kl",
) -> APO:
    """APO over a learning rate, with nothing left to choose; it is used as `APO` shows.

    The step is σ times what is best one step ahead. SGD with momentum falls short of that, since
    its rate is tuned along the gradient and momentum applied on top; SGD and RMSprop go beyond,
    since such a rate stays smaller than what trains an MLP best: too far for LeNet. Adam is
    missing: no setting of it served the tasks.

    Args:
        model: the module to train, in one process; for several, build `APO` of its parts.
        rule: "SGDm" (momentum 0.9), "SGD" or "RMSprop".
        discrepancy: ρ of `ProximalObjective`: "kl" of class scores, "squared_error" of predictions.

    Returns:
        APO, whose `rule`, `objective`, `meta_optimizer`, `interval` and `update_scale` show what
        was chosen.

    Raises:
        ValueError: no setting is known for `rule`; an unknown discrepancy.
    """
    if rule not in SETTINGS:
        raise ValueError(
            f"`rule` must be one of {', '.join(SETTINGS)}, got {rule!r}; for "
            "another build APO with a rule of `apo_core.rules`, and search its λ_FSD."
        )
    setting = SETTINGS[rule]
    built: UpdateRule
    if rule == "RMSprop":
        built = RMSprop(model, lr=setting.lr)
    else:
        built = SGD(model, lr=setting.lr, momentum=setting.momentum)
    return APO(
        model,
        built,
        ProximalObjective(discrepancy, fsd_weight=FSD_WEIGHT, trust_factor=TRUST_FACTOR),
        torch.optim.RMSprop(built.parameters(), lr=META_LEARNING_RATE),
        interval=INTERVAL,
        update_scale=setting.update_scale,
    )
