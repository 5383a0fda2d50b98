"""Rivals beyond the papers: second-order and schedule-free, self-tuning and scheduled.

Each is a recipe whose defaults are what its authors recommend, and `rivals` gives each a grid with
that default in it. The algorithms are those of `torch.optim`, `pytorch_optimizer` and their
authors' own packages; hypergradient descent, which no package has, is here.

track            methods                                       what is given to them
"tuned"          SOAP, Muon, Schedule-Free SGD, schedules      a searched learning rate
"self-tuning"    Prodigy, Mechanic, MoMo, SPS, hypergradients  little: they adapt the rate
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import momo
import pytorch_optimizer
import torch
from mechanic_pytorch import mechanize
from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from experiments.problems import Problem
from experiments.recipes import Recipe
from experiments.tuning import Method

MILESTONES = (0.3, 0.6, 0.8)  # of a run, where a step schedule decays: P22 appendix B.4
DECAY = 0.2


@final
@dataclass(frozen=True)
class SOAP(Recipe):
    """Adam in the eigenbasis of Shampoo's factors.

    Source: Vyas et al. (2024), and its authors' code for the defaults.
    """

    lr: float = 3e-3
    weight_decay: float = 0.01
    interval: int = 10

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """pytorch_optimizer.SOAP, an eigenbasis every `interval` steps; its first step is none."""
        return pytorch_optimizer.SOAP(
            model.parameters(),
            lr=self.lr,
            betas=(0.95, 0.95),
            weight_decay=self.weight_decay,
            precondition_frequency=self.interval,
        )

    def text(self) -> str:
        """η."""
        return f"η = {self.lr:.4g}"


@final
class MuonInFloat32(pytorch_optimizer.Muon):
    """Muon whose Newton-Schulz iteration is in float32 where the library's is in bfloat16.

    A CPU without instructions for bfloat16 multiplies such matrices a hundred times slower.
    """

    @staticmethod
    def _orthogonalize(group: dict[str, Any], updates: list[Tensor]) -> list[Tensor]:
        return [
            zero_power_via_newton_schulz_5(
                update.flatten(1),
                num_steps=group["ns_steps"],
                weights=group["ns_coeffs"],
                dtype=torch.float32,
            )
            for update in updates
        ]


@final
@dataclass(frozen=True)
class Muon(Recipe):
    """Momentum orthogonalized by Newton and Schulz for the matrices, AdamW for the rest.

    The rest are biases, gains and the last matrix, which maps to the outputs, as its author
    advises; a network with one matrix has it moved by Muon.

    Source: Jordan et al. (2024), and its author's code for the defaults.
    """

    lr: float = 0.02
    adamw_lr: float = 3e-4
    momentum: float = 0.95
    weight_decay: float = 0.01

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """pytorch_optimizer.Muon, on a CPU in float32; a kernel is a matrix of its channels."""
        params = list(model.parameters())
        matrices = [p for p in params if p.ndim >= 2]
        hidden = matrices[:-1] or matrices
        rest = [p for p in params if all(p is not one for one in hidden)]
        groups: list[dict[str, Any]] = [
            {"params": hidden, "lr": self.lr, "momentum": self.momentum, "use_muon": True},
            {"params": rest, "lr": self.adamw_lr, "betas": (0.9, 0.95), "use_muon": False},
        ]
        for group in groups:
            group["weight_decay"] = self.weight_decay
        kind = pytorch_optimizer.Muon if params[0].is_cuda else MuonInFloat32
        return kind([group for group in groups if group["params"]])

    def text(self) -> str:
        """Both learning rates."""
        return f"η = {self.lr:.4g}, AdamW's {self.adamw_lr:.4g}"


@final
@dataclass(frozen=True)
class Prodigy(Recipe):
    """Adam whose learning rate is an estimate of the distance to the solution.

    Source: Mishchenko and Defazio (2023), and their code for the defaults.
    """

    lr: float = 1.0
    d_coef: float = 1.0

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """pytorch_optimizer.Prodigy."""
        return pytorch_optimizer.Prodigy(model.parameters(), lr=self.lr, d_coef=self.d_coef)

    def text(self) -> str:
        """The factor of the estimate."""
        return f"d_coef = {self.d_coef:.4g}"


@final
@dataclass(frozen=True)
class Mechanic(Recipe):
    """SGD whose steps since the start are scaled as a whole, by online learning of the scale.

    Source: Cutkosky et al. (2023), and their code for the defaults.
    """

    s_decay: float = 0.01

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """mechanic_pytorch's wrapper of torch.optim.SGD."""
        return mechanize(torch.optim.SGD, s_decay=self.s_decay)(model.parameters(), lr=1.0)

    def text(self) -> str:
        """The weight of its decay."""
        return f"s_decay = {self.s_decay:.4g}"


@final
@dataclass(frozen=True)
class MoMo(Recipe):
    """SGD with momentum whose rate is a Polyak step on the averaged loss, at most `lr`.

    Without momentum it is the stochastic Polyak step size SPS_max with c = 1.

    Source: Schaipp et al. (2024), and their code for the defaults; Loizou et al. (2021), eq. 3.
    """

    lr: float = 1.0
    momentum: float = 0.9

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """momo.Momo, the loss bounded below by 0."""
        return momo.Momo(model.parameters(), lr=self.lr, beta=self.momentum)

    def text(self) -> str:
        """The bound of η."""
        return f"η ≤ {self.lr:.4g}, μ = {self.momentum:.4g}"


@final
@dataclass(frozen=True)
class ScheduleFreeSGD(Recipe):
    """SGD whose average of iterates stands in for a schedule; the average is evaluated.

    Source: Defazio et al. (2024), and their code for the defaults.
    """

    lr: float = 1.0
    momentum: float = 0.9
    warmup_steps: int = 0

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """pytorch_optimizer.ScheduleFreeSGD, in training mode."""
        return pytorch_optimizer.ScheduleFreeSGD(
            model.parameters(),
            lr=self.lr,
            momentum=self.momentum,
            warmup_steps=self.warmup_steps,
        )

    def text(self) -> str:
        """η and the warm-up."""
        return f"η = {self.lr:.4g}, {self.warmup_steps} steps of warm-up"


@final
class HypergradientDescent(torch.optim.Optimizer):
    """η ← η + β gᵀg₋₁, then θ ← θ − η g, where g₋₁ is the gradient of the step before.

    It is here because no maintained library has it: `pytorch_optimizer`, `torch.optim` and
    TorchOpt do not, and the authors' own code is no package.

    Source: Baydin et al. (2018), algorithm 4 (SGD-HD).

    Args:
        params: what it moves.
        lr: η of the first step, positive.
        hypergradient_lr: β ≥ 0.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, hypergradient_lr: float
    ) -> None:
        if not lr > 0 or not hypergradient_lr >= 0:
            raise ValueError(
                "`lr` must be positive and `hypergradient_lr` non-negative, got "
                f"{lr} and {hypergradient_lr}; the authors' are both 1e-3."
            )
        super().__init__(params, {"lr": lr, "hypergradient_lr": hypergradient_lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients in `.grad`; each group has a learning rate of its own."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            along = sum(
                (p.grad * self.state[p]["before"]).sum().item() for p in params if self.state[p]
            )
            group["lr"] += group["hypergradient_lr"] * along
            for p in params:
                self.state[p]["before"] = p.grad.clone()
                p.add_(p.grad, alpha=-group["lr"])
        return loss


@final
@dataclass(frozen=True)
class HypergradientSGD(Recipe):
    """`HypergradientDescent`, with what its authors take for an MLP on MNIST.

    Source: Baydin et al. (2018), section 5.2.
    """

    lr: float = 1e-3
    hypergradient_lr: float = 1e-3

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """SGD whose learning rate descends too."""
        return HypergradientDescent(
            model.parameters(), lr=self.lr, hypergradient_lr=self.hypergradient_lr
        )

    def text(self) -> str:
        """The initial η, and β."""
        return f"η₀ = {self.lr:.4g}, β = {self.hypergradient_lr:.4g}"


@final
@dataclass(frozen=True)
class CosineSGD(Recipe):
    """SGD with momentum; η falls along half a cosine to 0 at the run's last step.

    Source: Loshchilov and Hutter (2017), without restarts.
    """

    steps: int
    lr: float = 0.1
    momentum: float = 0.9

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """torch.optim.SGD with CosineAnnealingLR."""
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum)
        return scheduled(optimizer, CosineAnnealingLR(optimizer, T_max=self.steps))

    def text(self) -> str:
        """The initial η."""
        return f"η₀ = {self.lr:.4g}"


@final
@dataclass(frozen=True)
class StepSGD(Recipe):
    """SGD with momentum; η is divided by 5 after 30, 60 and 80% of the run.

    Source: P22 appendix B.4 (epochs 60, 120 and 160 of 200), after Zagoruyko and Komodakis (2016).
    """

    steps: int
    lr: float = 0.1
    momentum: float = 0.9

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """torch.optim.SGD with MultiStepLR."""
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum)
        milestones = [round(part * self.steps) for part in MILESTONES]
        return scheduled(optimizer, MultiStepLR(optimizer, milestones, gamma=DECAY))

    def text(self) -> str:
        """The initial η."""
        return f"η₀ = {self.lr:.4g}"


def scheduled(optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> torch.optim.Optimizer:
    """The optimizer, with the schedule taken a step further after each of its steps."""
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


def rivals(steps: int) -> list[Method]:
    """Every rival with its grid, in which its authors' default stands first.

    Args:
        steps: of a whole run, which the schedules end with.
    """
    return [
        Method("SOAP", (SOAP(), *(SOAP(lr=lr) for lr in (3e-2, 1e-2, 1e-3, 3e-4)))),
        Method("Muon", (Muon(), *(Muon(lr=lr) for lr in (0.2, 0.06, 0.006, 0.002)))),
        Method(
            "Schedule-Free SGD",
            (ScheduleFreeSGD(), *(ScheduleFreeSGD(lr=lr) for lr in (10.0, 3.0, 0.3, 0.1))),
        ),
        Method(
            "SGDm, cosine",
            (CosineSGD(steps), *(CosineSGD(steps, lr=lr) for lr in (1.0, 0.3, 0.03, 0.01))),
        ),
        Method(
            "SGDm, steps",
            (StepSGD(steps), *(StepSGD(steps, lr=lr) for lr in (1.0, 0.3, 0.03, 0.01))),
        ),
        Method(
            "Prodigy",
            (Prodigy(), *(Prodigy(d_coef=factor) for factor in (3.0, 0.3))),
            track="self-tuning",
        ),
        Method(
            "Mechanic SGD",
            (Mechanic(), *(Mechanic(s_decay=decay) for decay in (0.1, 0.0))),
            track="self-tuning",
        ),
        Method("MoMo", (MoMo(), MoMo(lr=10.0), MoMo(lr=0.1)), track="self-tuning"),
        Method(
            "SPS",
            tuple(MoMo(lr=lr, momentum=0.0) for lr in (1.0, 10.0, 0.1)),
            track="self-tuning",
        ),
        Method(
            "SGD-HD",
            (HypergradientSGD(), *(HypergradientSGD(hypergradient_lr=b) for b in (1e-2, 1e-4))),
            track="self-tuning",
        ),
    ]
