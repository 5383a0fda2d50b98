"""Poorly-conditioned regression: t = Ax with κ(A) = 10¹⁰, a two-layer linear network.

J(θ) = E_{x ~ N(0, I)} ‖Ax − W₂W₁x‖² = ‖A − W₂W₁‖²_F: mini-batches are drawn anew at every step, and
the curves show J itself. The network trains on ½‖·‖², this project's convention.

P22 gives neither the sizes nor the spectrum. The sizes are those of the problem it cites (Rahimi
and Recht, 2017): 6 inputs, 6 hidden units, 10 outputs; A = U diag(σ) Vᵀ with random orthogonal U
and V, σ evenly in the logarithm from 1 to 10⁻¹⁰, so that κ(A) is 10¹⁰ by construction. One A, drawn
from a seed of its own, for all runs. float64: J falls below what float32 resolves. KFAC's best
damping is the grid's least: there J reaches σ_min² = 10⁻²⁰, and nothing is left to gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments.comparison import comparison_row, comparison_sentence, draw_comparison
from experiments.models import mlp
from experiments.problems import Batch, Problem, Stream, mean_loss
from experiments.recipes import KFAC, SGD, Adam, APOPrecond, Shampoo
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.seeds import generator
from experiments.training import train_trial
from experiments.tuning import Method, plan_search

WIDTHS = (6, 6, 10)
CONDITION = 1e10
TASK_SEED = 0
BATCH_SIZE = 128

SGDM = Method("SGDm", tuple(SGD(lr, momentum=0.9) for lr in (1.0, 0.3, 0.1, 0.03, 0.01)))
ADAM = Method("Adam", tuple(Adam(lr) for lr in (0.1, 3e-2, 1e-2, 3e-3, 1e-3)))
SHAMPOO = Method("Shampoo", tuple(Shampoo(lr) for lr in (3.0, 1.0, 0.3, 0.1, 0.03)))
# No momentum: with 0.9 and factors up to 10 steps old, it left at a damping of 1e-3.
KFAC_ = Method(
    "KFAC",
    tuple(
        KFAC(lr, damping, momentum=0.0)
        for lr in (0.1, 0.03, 0.01)
        for damping in (1e-4, 1e-6, 1e-8, 1e-10, 1e-12)
    ),
)
APO = Method(
    "APO-Precond",
    tuple(
        APOPrecond(initial_lr, meta_lr=meta_lr, warmup_steps=300, warmup_lr=0.3)
        for initial_lr in (0.5, 1.0, 2.0)
        for meta_lr in (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    ),
)
METHODS = (SGDM, ADAM, SHAMPOO, KFAC_, APO)


@dataclass(frozen=True)
class Scale:
    """What a preset runs."""

    steps: int
    seeds: int
    tuning_seeds: int = 1
    stride: int = 1  # every how many-th recipe of each grid


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(steps=400, seeds=2, stride=3),
    "default": Scale(steps=2_000, seeds=5, tuning_seeds=3),
    "paper": Scale(steps=20_000, seeds=5, tuning_seeds=3),
}


def ill_conditioned(outputs: int, inputs: int, condition: float, seed: int) -> Tensor:
    """A = U diag(σ) Vᵀ, (outputs, inputs), σ from 1 to 1/condition evenly in the logarithm."""
    source = generator(seed, "task")
    rank = min(outputs, inputs)
    U, V = (
        torch.linalg.qr(torch.randn(size, rank, generator=source, dtype=torch.float64))[0]
        for size in (outputs, inputs)
    )
    exponents = torch.linspace(0, 1, rank, dtype=torch.float64)
    return U @ torch.diag(condition**-exponents) @ V.T


@final
class LinearRegression(Problem):
    """½‖Ax − W₂W₁x‖² on fresh x ~ N(0, I); "loss" is the exact J = ‖A − W₂W₁‖²_F.

    Args:
        A: the matrix to learn, (outputs, inputs).
        batch_size: fresh examples in every mini-batch of every stream.
        seed: of the examples.
    """

    loss_name = "squared_error"

    def __init__(self, A: Tensor, batch_size: int, seed: int) -> None:
        self.A = A
        self.batch_size = batch_size
        streams: tuple[Stream, ...] = ("loss", "discrepancy", "curvature")
        self._sources = {name: generator(seed, name) for name in streams}

    def batch(self, stream: Stream) -> Batch:
        """(x, Ax), x ~ N(0, I)."""
        x = torch.randn(
            self.batch_size, self.A.shape[1], generator=self._sources[stream], dtype=self.A.dtype
        ).to(self.A.device)
        return x, x @ self.A.T

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean of ½‖·‖² over the mini-batch."""
        return mean_loss("squared_error", model(batch[0]), batch[1])

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """W₂W₁x."""
        return model(batch[0])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """J(θ), P22 eq. 11: the network is linear, so it is known by its image of the basis."""
        basis = torch.eye(self.A.shape[1], dtype=self.A.dtype, device=self.A.device)
        return {"loss": (model(basis).T - self.A).square().sum().item()}


def regress(trial: Trial, context: Context, *, record_every: int) -> Outcome:
    """The trial's recipe on the regression, from the two-layer linear network of its seed."""
    A = ill_conditioned(WIDTHS[-1], WIDTHS[0], CONDITION, TASK_SEED).to(context.device)
    problem = LinearRegression(A, BATCH_SIZE, trial.seed)
    model = mlp(
        WIDTHS,
        seed=trial.seed,
        activation=None,
        bias=False,
        dtype=torch.float64,
        device=context.device,
    )
    return train_trial(
        trial,
        context,
        model,
        problem,
        steps=trial.options["steps"],
        record_every=record_every,
    )


@final
class PoorlyConditioned(Experiment):
    """Training loss of five optimizers on the poorly-conditioned regression."""

    name = "p22-fig4-left"
    title = "Poorly-conditioned regression, κ = 10¹⁰"
    source = "P22 Figure 4 (left), section 6.2.1, eq. 11"
    claims = ("p22-fig4-left",)
    scales = MappingProxyType(
        {
            "smoke": "400 steps, every third recipe, 2 seeds",
            "default": "2,000 steps of 128 fresh examples, float64, 3 tuning seeds, 5 seeds",
            "paper": "20,000 steps, 3 tuning seeds, 5 seeds (the paper gives neither)",
        }
    )
    edges = MappingProxyType(
        {("default", "KFAC"): "at a damping of 1e-12 J reaches float64's rounding, 1e-32"}
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """Grids with the tuning seeds, then the chosen recipes."""
        scale = SCALES[preset]
        return plan_search(
            [Method(one.label, one.grid[:: scale.stride]) for one in METHODS],
            {"steps": scale.steps},
            tuning_seeds=scale.tuning_seeds,
            seeds=seeds or scale.seeds,
            records=records,
        )

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train on fresh examples."""
        return regress(trial, context, record_every=trial.options["steps"] // 100)

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Final J of each method's chosen recipe."""
        return [comparison_row(method, records, "figure only") for method in METHODS]

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """J over steps."""
        axes = figure.subplots()
        draw_comparison(axes, METHODS, records)
        axes.set(xlabel="step", ylabel="J = ‖A − W₂W₁‖²")

    def verdict(self, records: Sequence[Record]) -> str:
        """APO-Precond beside each of the others; the paper has it below KFAC."""
        sentence = comparison_sentence(APO, METHODS[:-1], records)
        return f"{sentence}. P22 reports it comparable to second-order methods and below KFAC."


register(PoorlyConditioned())
