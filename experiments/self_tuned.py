"""APO with the settings that hold across tasks, which `apo.self_tuning` has: nothing is searched.

setting    value        from
κ          1.1          `limits`, `limits-rules`: without it single runs diverge
λ_FSD      1e-3         P22 section 6.3; 0 and 0.1 make no visible difference in `limits`
meta       RMSprop 0.1  P22 section 6.3; Adam, Rprop and smaller rates do neither better nor worse
K          10           P22 section 6.1; 1 is no better
η₀, σ      SETTINGS     those whose worst ratio to the best fixed rate over four tasks is lowest
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import nn

import apo_core as apo
from experiments.problems import Problem
from experiments.recipes import Recipe, proximal_objective

INITIAL_RATE = 1e-3
MOMENTUM = 0.9

Rule = Literal["SGD", "SGDm", "RMSprop", "Adam"]


@final
@dataclass(frozen=True)
class SelfTuned(Recipe):
    """A rule whose learning rate APO tunes; σ is `update_scale`.

    SGDm looks ahead along the gradient "as if there's no momentum" (P18 section 5) and moves by its
    buffer, in which every gradient counts 1/(1 − μ) times: σ = 1 − μ makes the whole displacement
    by a gradient what was looked at.
    """

    rule: Rule
    lr: float = INITIAL_RATE
    fsd_weight: float = 1e-3
    trust_factor: float | None = 1.1
    update_scale: float = 1.0
    meta_lr: float = 0.1
    interval: int = 10
    lookahead_momentum: bool = False

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """APO over the rule."""
        rule = self._rule(model)
        phi = [p for p in rule.parameters() if p.requires_grad]
        return apo.APO(
            model,
            rule,
            proximal_objective(problem, self.fsd_weight, trust_factor=self.trust_factor),
            torch.optim.RMSprop(phi, lr=self.meta_lr),
            interval=self.interval,
            update_scale=self.update_scale,
        )

    def _rule(self, model: nn.Module) -> apo.UpdateRule:
        if self.rule == "SGDm":
            return apo.rules.SGD(
                model,
                lr=self.lr,
                momentum=MOMENTUM,
                lookahead_momentum=self.lookahead_momentum,
            )
        kinds = {"SGD": apo.rules.SGD, "RMSprop": apo.rules.RMSprop, "Adam": apo.rules.Adam}
        return kinds[self.rule](model, lr=self.lr)

    def text(self) -> str:
        """The initial η and σ."""
        return f"η₀ = {self.lr:.4g}, σ = {self.update_scale:g}"


SETTINGS: dict[Rule, SelfTuned] = {
    "SGD": SelfTuned("SGD", update_scale=1.8),
    "SGDm": SelfTuned("SGDm", lr=10.0, update_scale=0.18),
    "RMSprop": SelfTuned("RMSprop", lr=0.1, update_scale=1.8),
    "Adam": SelfTuned("Adam", update_scale=0.3),
}
