"""Optimizers as data: a recipe names the hyperparameters, and builds the optimizer for a model.

A grid is a list of recipes; a record holds `options()`, from which `recipe` brings it back. The
optimizers of P18 stand in `experiments.apo_recipes`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from torch import nn

import apo_core as apo
from experiments import baselines
from experiments.problems import Problem

JSON = str | int | float | bool | None

# What the curves call a hyperparameter, and what a rule calls its logarithm.
LOGARITHMS = {
    "learning_rate": "log_lr",
    "rho": "log_rho",
    "eps": "log_eps",
    "damping": "log_damping",
}
# The discrepancy whose metric is the Fisher of the loss.
DISCREPANCIES = {
    "cross_entropy": "kl",
    "bernoulli": "bernoulli_kl",
    "squared_error": "squared_error",
}


@dataclass(frozen=True)
class Recipe(ABC):
    """An optimizer with its hyperparameters. Each subclass is a frozen dataclass of numbers."""

    kinds: ClassVar[dict[str, type[Recipe]]] = {}

    def __init_subclass__(cls) -> None:
        Recipe.kinds[cls.__name__] = cls

    @abstractmethod
    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """The optimizer, over all parameters of `model`."""

    @abstractmethod
    def text(self) -> str:
        """Its hyperparameters for people, in the papers' letters, such as "η = 0.1"."""

    def options(self) -> dict[str, JSON]:
        """Its name as "optimizer", and the hyperparameters: plain JSON."""
        return {"optimizer": type(self).__name__, **asdict(self)}

    def slug(self) -> str:
        """Its name and every hyperparameter that is not the default, for file names and tables."""
        chosen = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return "-".join([type(self).__name__, *chosen])


def recipe(options: Mapping[str, Any]) -> Recipe:
    """The recipe that `options()` came from; entries that are not its own are left out."""
    kind = Recipe.kinds[options["optimizer"]]
    return kind(**{f.name: options[f.name] for f in fields(kind) if f.name in options})


def hyperparameters(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The hyperparameters that APO learns, or the learning rate that was given.

    Returns:
        "learning_rate", "rho", "eps" and "damping", as far as φ has their logarithms and learns
        them; "learning_rate/0" for layer "0" where each layer has its own. Of a `torch.optim`
        optimizer the group's "learning_rate".
    """
    if not isinstance(optimizer, apo.APO):
        return {"learning_rate": float(optimizer.param_groups[0]["lr"])}
    layers = getattr(optimizer.rule, "layers", ())
    found = {}
    for name, logarithm in LOGARITHMS.items():
        phi = getattr(optimizer.rule, logarithm, None)
        if isinstance(phi, nn.Parameter) and phi.requires_grad:
            values = phi.detach().double().exp().reshape(-1).tolist()
            names = [f"{name}/{layer}" for layer in layers] or [name]
            found |= dict(zip(names, values, strict=True))
    return found


@final
@dataclass(frozen=True)
class SGD(Recipe):
    """θ ← θ − η v, v ← μv + g."""

    lr: float
    momentum: float = 0.0

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """torch.optim.SGD."""
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum)

    def text(self) -> str:
        """η."""
        return f"η = {self.lr:.4g}"


@final
@dataclass(frozen=True)
class Nesterov(Recipe):
    """θ ← θ − η (g + μv), v ← μv + g: the SGDm of P18 (eq. 18 and eq. 19)."""

    lr: float
    momentum: float = 0.9

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """torch.optim.SGD with Nesterov's momentum."""
        params = model.parameters()
        return torch.optim.SGD(params, lr=self.lr, momentum=self.momentum, nesterov=True)

    def text(self) -> str:
        """η."""
        return f"η = {self.lr:.4g}"


@final
@dataclass(frozen=True)
class RMSprop(Recipe):
    """RMSprop with torch's γ = 0.99 and ε = 1e-8."""

    lr: float

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """torch.optim.RMSprop."""
        return torch.optim.RMSprop(model.parameters(), lr=self.lr)

    def text(self) -> str:
        """η."""
        return f"η = {self.lr:.4g}"


@final
@dataclass(frozen=True)
class Adam(Recipe):
    """Adam with the usual β = (0.9, 0.999) and ε = 1e-8."""

    lr: float

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """torch.optim.Adam."""
        return torch.optim.Adam(model.parameters(), lr=self.lr)

    def text(self) -> str:
        """η."""
        return f"η = {self.lr:.4g}"


@final
@dataclass(frozen=True)
class KFAC(Recipe):
    """`baselines.KFAC`, rebuilt every `interval` steps."""

    lr: float
    damping: float
    momentum: float = 0.9
    interval: int = 10

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """Curvlinops' factors from the problem's curvature stream."""
        return baselines.KFAC(
            model,
            partial(problem.batch, "curvature"),
            problem.loss_name,
            lr=self.lr,
            damping=self.damping,
            momentum=self.momentum,
            interval=self.interval,
        )

    def text(self) -> str:
        """η and the damping."""
        return f"η = {self.lr:.4g}, damping = {self.damping:.4g}"


@final
@dataclass(frozen=True)
class Shampoo(Recipe):
    """`baselines.shampoo`, inverse roots taken every `interval` steps."""

    lr: float
    interval: int = 1

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """pytorch_optimizer.Shampoo."""
        return baselines.shampoo(model, lr=self.lr, interval=self.interval)

    def text(self) -> str:
        """η."""
        return f"η = {self.lr:.4g}"


@final
@dataclass(frozen=True)
class APOLearningRate(Recipe):
    """SGD whose learning rate APO tunes: φ = log η, RMSprop with 0.1 every 10 steps.

    The discrepancy is the KL divergence where the loss is the cross-entropy, and ½‖z − z₀‖² where
    it is the squared error.

    Source: P22 section 6.1.
    """

    lr: float
    momentum: float = 0.0
    fsd_weight: float = 0.0
    wsd_weight: float = 0.0
    meta_lr: float = 0.1
    interval: int = 10

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """APO over `rules.SGD`."""
        rule = apo.rules.SGD(model, lr=self.lr, momentum=self.momentum)
        return apo.APO(
            model,
            rule,
            objective=proximal_objective(problem, self.fsd_weight, self.wsd_weight),
            meta_optimizer=torch.optim.RMSprop(rule.parameters(), lr=self.meta_lr),
            interval=self.interval,
        )

    def text(self) -> str:
        """The initial η and the weights λ."""
        return f"η₀ = {self.lr:.4g}{weights_text(self.fsd_weight, self.wsd_weight)}"


@final
@dataclass(frozen=True)
class APOPrecond(Recipe):
    """A preconditioner that APO learns: φ = A, B, S of every layer (or all of P), Adam.

    P starts at `initial_lr` · I, where P22 starts at I. For the first `warmup_steps` steps SGD with
    `warmup_lr` and momentum 0.9 moves θ while φ learns.

    Source: P22 section 6.1.
    """

    initial_lr: float
    meta_lr: float
    fsd_weight: float = 0.0
    wsd_weight: float = 0.0
    warmup_steps: int = 0
    warmup_lr: float = 0.1
    update_scale: float = 0.9
    interval: int = 10
    structure: Literal["EKFAC", "Diagonal", "Dense"] = "EKFAC"

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """APO over `rules.Preconditioned`."""
        structure = {"EKFAC": apo.EKFAC, "Diagonal": apo.Diagonal, "Dense": apo.Dense}
        rule = apo.rules.Preconditioned(
            model, structure=structure[self.structure], initial_scale=self.initial_lr**0.5
        )
        base = torch.optim.SGD(model.parameters(), lr=self.warmup_lr, momentum=0.9)
        return apo.APO(
            model,
            rule,
            objective=proximal_objective(problem, self.fsd_weight, self.wsd_weight),
            meta_optimizer=torch.optim.Adam(rule.parameters(), lr=self.meta_lr),
            interval=self.interval,
            update_scale=self.update_scale,
            warmup=apo.Warmup(base, self.warmup_steps) if self.warmup_steps else None,
        )

    def text(self) -> str:
        """The initial P, the meta-optimizer's α and the weights λ."""
        weights = weights_text(self.fsd_weight, self.wsd_weight)
        return f"P₀ = {self.initial_lr:.4g} I, α = {self.meta_lr:.4g}{weights}"


def weights_text(fsd_weight: float, wsd_weight: float = 0.0) -> str:
    """λ_FSD and λ_WSD, those that are not 0, after a comma."""
    fsd = f", λ_FSD = {fsd_weight:.4g}" if fsd_weight else ""
    return fsd + (f", λ_WSD = {wsd_weight:.4g}" if wsd_weight else "")


def proximal_objective(
    problem: Problem,
    fsd_weight: float,
    wsd_weight: float = 0.0,
    trust_factor: float | None = None,
) -> apo.ProximalObjective:
    """Q with the KL divergence of what the loss models, or ½‖z − z₀‖² with the squared error."""
    return apo.ProximalObjective(
        discrepancy=DISCREPANCIES[problem.loss_name],
        fsd_weight=fsd_weight,
        wsd_weight=wsd_weight,
        trust_factor=trust_factor,
    )
