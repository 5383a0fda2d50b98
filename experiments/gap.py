"""The amortization gap along a run: digits, an MLP 64-64-10, K in {1, 10, 100}.

Amortization learns one φ for all mini-batches by K-spaced steps of a meta-optimizer, where the
exact proximal step would be solved anew each time. The gap says how much that costs: at points of
the run, Q̂ of φ less the least mean Q̂ over 4 mini-batches (each with another mini-batch B' for its
discrepancy) that any φ of the same form attains there, by L-BFGS from the present φ. Shown as a
share: gap / −min Q̂, where Q̂ = 0 is no step at all, so that 0 is the optimum of the form and 1 no
better than standing still. A share above 1 is worse than standing still.

φ descends the Q̂ that the gap is measured in (linear loss, quadratic discrepancy), so that none of
the gap is due to the expansion. The learning rate of SGD is one number, the diagonal of APO-Precond
4,810: part of its gap is that min Q̂ fits 4 mini-batches. Mini-batches of 128 digits, λ_FSD = 1,
λ_WSD = 0.1, RMSprop with 0.1 and Adam with 0.003, φ starts at the learning rate 0.1.

The papers have no such figure: they say that K = 10 suffices (P22 section 6.1, appendix I.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from types import MappingProxyType
from typing import Literal, final

import torch
from matplotlib.figure import Figure
from torch import nn

import apo_core as apo
from experiments import recipes
from experiments.digits import digits_problem
from experiments.intervals import ratio_interval, summary
from experiments.models import mlp
from experiments.plots import draw_runs, legend_below
from experiments.problems import Batch, Judged, Problem
from experiments.recipes import Recipe
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.training import train
from experiments.tuning import Method, plan_grids, runs_of

WIDTHS = (64, 64, 10)
PAIRS = 4  # (B, B') that the gap is measured on
MEASURING = 1 << 20  # added to the seed: the gap has mini-batches of its own
FSD_WEIGHT, WSD_WEIGHT = 1.0, 0.1
INITIAL_RATE = 0.1
INTERVALS = (1, 10, 100)


@final
@dataclass(frozen=True)
class QuadraticAPO(Recipe):
    """SGD's learning rate or a diagonal P, learned by descending Q̂ every `interval` steps."""

    form: Literal["SGD", "Diagonal"]
    interval: int

    def build(self, model: nn.Module, problem: Problem) -> apo.APO:
        """APO with the linear loss and the quadratic discrepancy."""
        if self.form == "SGD":
            rule = apo.rules.SGD(model, lr=INITIAL_RATE)
            meta_optimizer = torch.optim.RMSprop(rule.parameters(), lr=0.1)
        else:
            rule = apo.rules.Preconditioned(model, apo.Diagonal, math.sqrt(INITIAL_RATE))
            meta_optimizer = torch.optim.Adam(rule.parameters(), lr=0.003)
        objective = apo.ProximalObjective("kl", FSD_WEIGHT, WSD_WEIGHT, "linear", "quadratic")
        return apo.APO(model, rule, objective, meta_optimizer, self.interval)

    def text(self) -> str:
        """K."""
        return f"K = {self.interval}"


METHODS = (
    Method("learning rate", tuple(QuadraticAPO("SGD", interval) for interval in INTERVALS)),
    Method("diagonal", tuple(QuadraticAPO("Diagonal", interval) for interval in INTERVALS)),
)


@dataclass(frozen=True)
class Scale:
    """What a preset runs; `solver_steps` are the most iterations of L-BFGS."""

    steps: int
    record_every: int
    seeds: int
    solver_steps: int


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(steps=10, record_every=10, seeds=1, solver_steps=5),
    "default": Scale(steps=1_000, record_every=200, seeds=3, solver_steps=100),
    "paper": Scale(steps=5_000, record_every=250, seeds=5, solver_steps=1_000),
}


JUDGED = ("share", "best", "converged")


def judged_by_gap(
    problem: Problem,
    optimizer: apo.APO,
    pairs: Sequence[tuple[Batch, Batch]],
    solver_steps: int,
) -> Judged:
    """A problem that is judged by the gap too: "share", "best" = −min Q̂, "converged" (0 or 1).

    Args:
        problem: what is minimized.
        optimizer: whose gap is measured.
        pairs: (B, B') of each mini-batch pair.
        solver_steps: the most iterations of L-BFGS.
    """

    def judge(model: nn.Module) -> dict[str, float]:
        closures = [
            (partial(problem.loss, model, batch), partial(problem.outputs, model, other))
            for batch, other in pairs
        ]
        found = apo.amortization_gap(optimizer, closures, steps=solver_steps)
        share = found.gap / -found.best if found.best < 0 else math.inf
        values = (share, -found.best, float(found.converged))
        return dict(zip(JUDGED, values, strict=True))

    return Judged(problem, judge, JUDGED)


@final
class GapExperiment(Experiment):
    """The gap over steps for every form and K."""

    name = "amortization-gap"
    title = "Digits: how far amortized φ is from the best of its form, over K"
    source = "ours; P22 eq. 43, section 6.1 (K = 10), appendix I.2"
    datasets = ("digits",)
    scales = MappingProxyType(
        {
            "smoke": "10 steps, 1 seed, 5 iterations of L-BFGS",
            "default": "1,000 steps, 6 points, 3 seeds, 100 iterations of L-BFGS",
            "paper": "5,000 steps, 21 points, 5 seeds (the papers have no such figure)",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """Every form and K with every seed."""
        scale = SCALES[preset]
        task = {
            "steps": scale.steps,
            "record_every": scale.record_every,
            "solver_steps": scale.solver_steps,
        }
        return plan_grids(METHODS, task, range(seeds or scale.seeds))

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train on 80% of the digits, and measure the gap at every point of the curves."""
        problem, measuring = (
            digits_problem(context, seed) for seed in (trial.seed, trial.seed + MEASURING)
        )
        pairs = [(measuring.batch("loss"), measuring.batch("discrepancy")) for _ in range(PAIRS)]
        model = mlp(WIDTHS, seed=trial.seed, device=context.device)
        optimizer = recipes.recipe(trial.options).build(model, problem)
        assert isinstance(optimizer, apo.APO)
        return train(
            model,
            optimizer,
            judged_by_gap(problem, optimizer, pairs, trial.options["solver_steps"]),
            steps=trial.options["steps"],
            record_every=trial.options["record_every"],
            progress=context.progress,
        )

    def table(self, records: Sequence[Record]) -> list[Row]:
        """The median share over the second half of the run, and the final training loss."""
        rows = []
        for method in METHODS:
            for one in method.grid:
                if runs := runs_of(one, records):
                    solved = min(min(run.curve("converged")) for run in runs)
                    rows.append(
                        Row(
                            label=f"{method.label}, {one.text()}",
                            ours=f"share {summary([late_share(run) for run in runs])}; loss "
                            f"{summary([run.metric('loss') for run in runs])}",
                            paper="–",
                            n=len(runs),
                            note="" if solved else "not every minimum converged: a lower bound",
                        )
                    )
        return rows

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """The share over steps, a panel for each form."""
        figure.set_size_inches(10, 5)
        for axes, method in zip(figure.subplots(1, 2), METHODS, strict=True):
            for one in method.grid:
                draw_runs(axes, runs_of(one, records), "share", one.text())
            axes.set(title=method.label, xlabel="step", ylabel="gap / −min Q̂", yscale="log")
            legend_below(axes)

    def verdict(self, records: Sequence[Record]) -> str:
        """The late share at K = 10 and 100 over that at K = 1, paired by seed."""
        parts = []
        for method in METHODS:
            shares = [
                {run.seed: late_share(run) for run in runs_of(one, records)} for one in method.grid
            ]
            for one, longer in zip(method.grid[1:], shares[1:], strict=True):
                if seeds := sorted(shares[0].keys() & longer.keys()):
                    ratio = ratio_interval(
                        [longer[seed] for seed in seeds], [shares[0][seed] for seed in seeds]
                    )
                    parts.append(
                        f"{method.label}: the gap at {one.text()} is {ratio} times that at K = 1, "
                        f"{summary([longer[seed] for seed in seeds])} of what is attainable"
                    )
        return "; ".join(parts or ["No pair of K has run"]) + " (second half, 95% t intervals)."


def late_share(run: Record) -> float:
    """The median share over the second half of the run; infinite if it diverged."""
    if run.status != "finished":
        return math.inf
    shares = run.curve("share")
    return median(shares[len(shares) // 2 :])


register(GapExperiment())
