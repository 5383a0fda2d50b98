"""Rosenbrock: the best fixed learning rate, the learning rate and the full preconditioner of APO.

The problem is deterministic: every recipe runs once, no seed matters, and λ_FSD = λ_WSD = 0 as in
P18 section 5.1. The fixed rate is found in two rounds, a coarse grid over four decades and a fine
one between the neighbours of its best.

P22 gives neither the number of steps nor the meta-optimizer's settings for this figure, beside
K = 10, RMSprop with 0.1 for the learning rate and Adam for the preconditioner in all experiments.
Both K = 10 and K = 1 are shown, and P starts at a small multiple of I: P = I leaves at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments import recipes
from experiments.models import Rosenbrock
from experiments.plots import draw_runs, legend_below
from experiments.problems import Batch, Problem, Stream
from experiments.recipes import SGD, APOLearningRate, APOPrecond, Recipe
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.training import train_trial
from experiments.tuning import Method, at_edge, chosen, mean_loss, plan_grids, runs_of, tried

START = (1.0, -1.5)
SEED = 0  # nothing is random
FINE_POINTS = 15
POINTS = 200  # of a curve

COARSE = Method(
    "SGD", tuple(SGD(lr) for lr in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1))
)
INITIAL_RATES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
APO_RATE = {
    interval: Method(
        f"APO learning rate, K = {interval}",
        tuple(APOLearningRate(lr, interval=interval) for lr in INITIAL_RATES),
    )
    for interval in (10, 1)
}
APO_MATRIX = {
    interval: Method(
        f"APO preconditioner, K = {interval}",
        tuple(
            APOPrecond(
                initial_lr,
                meta_lr=meta_lr,
                warmup_steps=200,
                warmup_lr=1e-4,
                interval=interval,
                structure="Dense",
            )
            for meta_lr in (1e-4, 3e-4, 1e-3)
            for initial_lr in (3e-4, 1e-3, 3e-3, 1e-2)
        ),
    )
    for interval in (10, 1)
}
ADAPTED = (*APO_RATE.values(), *APO_MATRIX.values())


@dataclass(frozen=True)
class Scale:
    """What a preset runs."""

    steps: int
    fine_points: int = FINE_POINTS
    stride: int = 1  # every how many-th recipe of APO's grids


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(steps=600, fine_points=3, stride=5),
    "default": Scale(steps=10_000),
    "paper": Scale(steps=20_000),
}


@final
class RosenbrockValue(Problem):
    """f itself: no data, and so no mini-batch."""

    loss_name = "squared_error"

    def batch(self, stream: Stream) -> Batch:
        """Nothing."""
        return ()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """f at the model's point."""
        return model()

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """No function of data, and so no function space discrepancy."""
        raise NotImplementedError("`fsd_weight` must be 0 for a problem without data.")

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """f at the model's point."""
        return {"loss": model().item()}


def fine_grid(coarse_best: float, points: int) -> tuple[float, ...]:
    """Learning rates, evenly in the logarithm, strictly between the coarse neighbours."""
    rates = [one.lr for one in COARSE.grid if isinstance(one, SGD)]
    at = rates.index(coarse_best)
    low, high = rates[max(at - 1, 0)], rates[min(at + 1, len(rates) - 1)]
    fine = np.geomspace(low, high, points + 2)[1:-1]
    return tuple(float(f"{rate:.4g}") for rate in fine)


def descend(trial: Trial, context: Context, start: tuple[float, float]) -> Outcome:
    """The trial's recipe on the Rosenbrock function, from a point."""
    steps = trial.options["steps"]
    model = Rosenbrock(start).to(context.device)
    return train_trial(
        trial,
        context,
        model,
        RosenbrockValue(),
        steps=steps,
        record_every=max(1, steps // POINTS),
    )


@final
class RosenbrockFigure(Experiment):
    """Training loss on the Rosenbrock function."""

    name = "p22-fig7"
    title = "Rosenbrock: best fixed learning rate, APO learning rate, APO preconditioner"
    source = "P22 Figure 7, appendix C.1"
    claims = ("p22-fig7",)
    scales = MappingProxyType(
        {
            "smoke": "600 steps, thinned grids",
            "default": "10,000 steps, float64; 9 + 15 fixed rates, 36 recipes of APO",
            "paper": "20,000 steps (the paper does not say how many)",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """The coarse grid and APO's; then the fine grid. `seeds` is idle: nothing is random."""
        scale = SCALES[preset]
        task = {"steps": scale.steps}
        adapted = [Method(one.label, one.grid[:: scale.stride]) for one in ADAPTED]
        trials = plan_grids([COARSE, *adapted], task, [SEED])
        if all(runs_of(one, records) for one in COARSE.grid):
            best = chosen(COARSE, records, tuning=False)
            assert isinstance(best, SGD)
            fine = [SGD(lr) for lr in fine_grid(best.lr, scale.fine_points)]
            fresh = tuple(one for one in fine if one not in COARSE.grid)
            trials += plan_grids([Method("SGD", fresh)], task, [SEED])
        return trials

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Descend from (1, −1.5)."""
        return descend(trial, context, START)

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Final f of the best fixed rate and of each adaptive method's best recipe."""
        fixed = _fixed(records)
        best = chosen(fixed, records, tuning=False)
        rows = [_row("SGD, best fixed rate", fixed, best, records)]
        for method in ADAPTED:
            grid = tried(method, records)
            if grid.grid:
                best = chosen(grid, records, tuning=False)
                rows.append(_row(method.label, grid, best, records))
        return rows

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """f over steps, and the effective learning rate ‖Δθ‖/‖g‖."""
        figure.set_size_inches(10, 5)
        left, right = figure.subplots(1, 2)
        for method in (_fixed(records), *(tried(one, records) for one in ADAPTED)):
            if method.grid:
                best = chosen(method, records, tuning=False)
                runs, label = runs_of(best, records), f"{method.label}: {best.text()}"
                draw_runs(left, runs, "loss", label)
                draw_runs(right, runs, "step_ratio", method.label)
        left.set(xlabel="step", ylabel="f(x, y)", yscale="log")
        right.set(xlabel="step", ylabel="effective learning rate ‖Δθ‖/‖g‖", yscale="log")
        legend_below(left)
        legend_below(right)

    def verdict(self, records: Sequence[Record]) -> str:
        """Whether each adaptive method ends below the best fixed rate."""
        fixed = _fixed(records)
        best = chosen(fixed, records, tuning=False)
        reference = mean_loss(runs_of(best, records))
        interior = at_edge(fixed, best) or "the best inside the grid"
        parts = [f"The best of {len(fixed.grid)} fixed rates ({interior}) ends at {reference:.2g}"]
        for method in ADAPTED:
            grid = tried(method, records).grid
            losses = [mean_loss(runs_of(one, records)) for one in grid]
            if losses:
                below = sum(loss < reference for loss in losses)
                word = "below" if min(losses) < reference else "not below"
                parts.append(
                    f"{method.label} at {min(losses):.2g}, {word} it ({below} of {len(losses)} "
                    "recipes are)"
                )
        return "; ".join(parts) + ". One deterministic run each: no interval."


def _fixed(records: Sequence[Record]) -> Method:
    """Every fixed rate that has run, coarse and fine."""
    found = {recipes.recipe(r.options) for r in records if r.options["optimizer"] == "SGD"}
    return Method("SGD", tuple(sorted(found, key=lambda one: one.slug())))


def _row(label: str, method: Method, best: Recipe, records: Sequence[Record]) -> Row:
    losses = [mean_loss(runs_of(one, records)) for one in method.grid]
    diverged = sum(math.isinf(loss) for loss in losses)
    notes = [f"best of {len(losses)} recipes: {best.text()}"]
    notes += [f"{diverged} diverged"] * (diverged > 0)
    notes += [at_edge(method, best)] * bool(at_edge(method, best))
    return Row(label, f"{min(losses):.2g}", "figure only", 1, "; ".join(notes))


register(RosenbrockFigure())
