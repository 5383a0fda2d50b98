"""Small trainings that the tests of this folder run: a model, two mini-batches, a rule, an APO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import apo_core as apo

RULES: dict[str, Callable[[nn.Module], apo.UpdateRule]] = {
    "sgd": lambda model: apo.rules.SGD(model, lr=0.05),
    "sgd per layer": lambda model: apo.rules.SGD(model, lr=0.05, per_layer=True),
    "heavy ball": lambda model: apo.rules.SGD(model, lr=0.05, momentum=0.9),
    "nesterov": lambda model: apo.rules.SGD(model, lr=0.05, momentum=0.9, nesterov=True),
    "heavy ball ahead": lambda model: apo.rules.SGD(
        model, lr=0.05, momentum=0.9, lookahead_momentum=True
    ),
    "rmsprop": lambda model: apo.rules.RMSprop(
        model, 0.01, eps=1e-2, learn=("lr", "rho", "eps"), per_layer=True
    ),
    "adamw": lambda model: apo.rules.Adam(
        model, 0.01, eps=1e-3, weight_decay=0.1, learn=("lr", "eps")
    ),
    "any optimizer": lambda model: apo.rules.LearningRate(
        model, torch.optim.NAdam(model.parameters(), lr=0.01)
    ),
    "diagonal": lambda model: apo.rules.Preconditioned(model, apo.Diagonal, 0.2),
    "dense": lambda model: apo.rules.Preconditioned(model, apo.Dense, 0.2),
    "ekfac": lambda model: apo.rules.Preconditioned(model, apo.EKFAC, 0.2),
    "grouped": lambda model: apo.rules.Grouped(
        model,
        lambda name, parameter: "matrices" if parameter.dim() > 1 else "rest",
        matrices=lambda m: apo.rules.Preconditioned(m, apo.EKFAC, 0.2),
        rest=lambda m: apo.rules.LearningRate(m, torch.optim.AdamW(m.parameters(), lr=0.01)),
    ),
}

MODES = [
    ("exact", "exact"),
    ("exact", "quadratic"),
    ("linear", "exact"),
    ("linear", "quadratic"),
    ("quadratic", "quadratic"),
]


@final
@dataclass
class Scene:
    """A model with its mini-batches B and B', trained by an APO."""

    model: nn.Sequential
    optimizer: apo.APO
    x: Tensor
    y: Tensor
    x_other: Tensor

    def loss(self) -> Tensor:
        """J_B, at the present parameters."""
        return cross_entropy(self.model(self.x), self.y)

    def outputs(self) -> Tensor:
        """The outputs on B', at the present parameters."""
        return self.model(self.x_other)

    def backward(self) -> None:
        """g into `.grad`."""
        self.optimizer.zero_grad()
        self.loss().backward()

    def meta_step(self) -> apo.ProximalTerms:
        """A meta-step on B and B'."""
        return self.optimizer.meta_step(loss=self.loss, outputs=self.outputs)

    @property
    def lr(self) -> Tensor:
        """η of an SGD rule."""
        assert isinstance(self.optimizer.rule, apo.rules.SGD)
        return self.optimizer.rule.lr

    def run(self, steps: int) -> None:
        """Algorithm 1, with a fresh B and B' drawn at every step."""
        for _ in range(steps):
            self.x, self.x_other = torch.randn_like(self.x), torch.randn_like(self.x_other)
            self.backward()
            if self.optimizer.meta_due:
                self.meta_step()
            self.optimizer.step()


def classifier() -> nn.Sequential:
    """Convolution, BatchNorm, dropout and Linear: all that a lookahead could disturb; float64."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 2),
        nn.BatchNorm2d(2),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).double()


def scene(
    rule: str = "sgd",
    *,
    seed: int = 0,
    objective: apo.ProximalObjective | None = None,
    meta_lr: float = 0.05,
    interval: int = 2,
    update_scale: float = 1.0,
    warmup_steps: int | None = None,
    device: str = "cpu",
) -> Scene:
    """A `classifier` on random mini-batches, with the rule of that name."""
    torch.manual_seed(seed)
    model = classifier().to(device)
    x, x_other = torch.randn(2, 6, 1, 3, 3, dtype=torch.float64)
    y = torch.randint(3, (6,))
    built = RULES[rule](model)
    warmup = None
    if warmup_steps is not None:
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        warmup = apo.Warmup(base, warmup_steps)
    optimizer = apo.APO(
        model,
        built,
        objective or apo.ProximalObjective("kl", fsd_weight=0.3, wsd_weight=0.1),
        torch.optim.RMSprop(built.parameters(), lr=meta_lr),
        interval,
        update_scale,
        warmup,
    )
    return Scene(model, optimizer, x, y, x_other)


@final
class Quadratic(nn.Module):
    """θ = (1, ..., 1), with a loss ½ θᵀ diag(h) θ."""

    def __init__(self, curvature: list[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(len(curvature), dtype=torch.float64))
        self.h = torch.tensor(curvature, dtype=torch.float64)

    def loss(self) -> Tensor:
        """½ θᵀ diag(h) θ."""
        return 0.5 * (self.h * self.theta.square()).sum()


def values(module: nn.Module) -> list[Tensor]:
    """Copies of a module's parameters, in order."""
    return [p.detach().clone() for p in module.parameters()]
