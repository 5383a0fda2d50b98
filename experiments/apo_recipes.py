"""The optimizers whose hyperparameters P18 tunes: SGD, SGD with momentum, RMSprop, K-FAC.

The meta-optimizer is RMSprop, by default with 0.1 every 10 steps (P18 section 5). `learn` names
hyperparameters joined by "+", such as "lr+rho".

Source: P18 section 5 and appendix C.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import apo_core as apo
from experiments.problems import Problem
from experiments.recipes import Recipe, proximal_objective, weights_text
from experiments.seeds import generator

OBSERVATION_INTERVAL = 10
"""Steps from one mini-batch for K-FAC's factors to the next."""


@dataclass(frozen=True)
class Amortized(Recipe):
    """An update rule whose hyperparameters APO tunes.

    Attributes:
        lr: the initial η.
        fsd_weight: λ_FSD, P18's λ.
        meta_lr: of the meta-optimizer.
        interval: K.
        trust_factor: see `apo.ProximalObjective`; None for none, as in the papers.
    """

    lr: float
    fsd_weight: float = 0.0
    meta_lr: float = 0.1
    interval: int = 10
    trust_factor: float | None = None

    def amortize(self, model: nn.Module, problem: Problem, rule: apo.UpdateRule) -> apo.APO:
        """APO over the rule."""
        phi = [p for p in rule.parameters() if p.requires_grad]
        return apo.APO(
            model,
            rule,
            objective=proximal_objective(problem, self.fsd_weight, trust_factor=self.trust_factor),
            meta_optimizer=torch.optim.RMSprop(phi, lr=self.meta_lr),
            interval=self.interval,
        )

    def text(self) -> str:
        """The initial η and λ; K, the meta-learning rate and the trust factor where unusual."""
        parts = [f"η₀ = {self.lr:.4g}{weights_text(self.fsd_weight)}"]
        if self.interval != 10:
            parts.append(f"K = {self.interval}")
        if self.meta_lr != 0.1:
            parts.append(f"α = {self.meta_lr:g}")
        if self.trust_factor is not None:
            parts.append(f"κ = {self.trust_factor:g}")
        return ", ".join(parts)


@final
@dataclass(frozen=True)
class APOSGD(Amortized):
    """SGD: η tuned "as if there's no momentum", Nesterov's momentum applied on top.

    Source: P18 eq. 18, eq. 19.
    """

    momentum: float = 0.0
    per_layer: bool = False

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """APO over `rules.SGD`."""
        rule = apo.rules.SGD(
            model,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.momentum > 0,
            per_layer=self.per_layer,
        )
        return self.amortize(model, problem, rule)


@final
@dataclass(frozen=True)
class APORMSprop(Amortized):
    """RMSprop with any of η, ρ, ε tuned; the others stay at torch's values.

    Source: P18 eq. 20, eq. 21.
    """

    learn: Literal["lr", "lr+rho", "lr+rho+eps"] = "lr"
    per_layer: bool = False
    eps: float = 1e-8

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """APO over `rules.RMSprop`."""
        rule = apo.rules.RMSprop(
            model,
            lr=self.lr,
            eps=self.eps,
            learn=tuple(self.learn.split("+")),
            per_layer=self.per_layer,
        )
        return self.amortize(model, problem, rule)


@final
@dataclass(frozen=True)
class APOKFAC(Amortized):
    """K-FAC with η, or η and the damping γ, tuned.

    Source: P18 section 5.2.2, appendix C.
    """

    damping: float = 1e-3
    learn: Literal["lr", "lr+damping"] = "lr+damping"

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """APO over `rules.KFAC`."""
        learn = tuple(self.learn.split("+"))
        rule = apo.rules.KFAC(model, lr=self.lr, damping=self.damping, learn=learn)
        return observing(self.amortize(model, problem, rule), rule, model, problem)


@final
@dataclass(frozen=True)
class FixedKFAC(Recipe):
    """The same K-FAC with η and γ as they are given: no meta-step changes them."""

    lr: float
    damping: float = 1e-3

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """`rules.KFAC`, moved by an APO whose meta-learning rate is 0."""
        rule = apo.rules.KFAC(model, lr=self.lr, damping=self.damping)
        optimizer = apo.APO(
            model,
            rule,
            objective=proximal_objective(problem, 0.0),
            meta_optimizer=torch.optim.RMSprop(rule.parameters(), lr=0.0),
            interval=10**9,  # steps: one meta-step, the first
        )
        return observing(optimizer, rule, model, problem)

    def text(self) -> str:
        """η and the damping."""
        return f"η = {self.lr:.4g}, damping = {self.damping:.4g}"


def observing(
    optimizer: apo.APO, rule: apo.rules.KFAC, model: nn.Module, problem: Problem
) -> apo.APO:
    """The optimizer, its rule's factors renewed before the first and after every 10th step.

    The mini-batches are those of the problem's curvature stream, whose labels the model draws: the
    factors are of the Fisher. Leaves gradients in `.grad`, which the next `zero_grad` removes.
    """
    source = generator(0, "curvature")

    def observe() -> None:
        batch = problem.batch("curvature")
        with torch.enable_grad(), rule.observe(model):
            outputs = problem.outputs(model, batch)
            chances = outputs.detach().softmax(dim=1).cpu()
            drawn = torch.multinomial(chances, 1, generator=source)[:, 0].to(outputs.device)
            cross_entropy(outputs, drawn).backward()

    def observe_if_due(
        moved: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if optimizer.steps % OBSERVATION_INTERVAL == 0:
            observe()

    observe()
    hook: Callable[..., None] = observe_if_due
    optimizer.register_step_post_hook(hook)
    return optimizer
