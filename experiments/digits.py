"""Handwritten digits, an MLP 64-256-256-10: fixed learning rates, and those that APO learns.

The embedded stand-in for the papers' classification experiments; the papers have no such table. The
question is P22's claim that a learning rate adapted by APO beats the best fixed one, from any
initial value. The whole grid is reported, and the best cell of a method is the one with the lowest
mean training loss over the reporting seeds, of fixed rates and of APO alike; only APO-Precond,
which diverges for some seeds, is tuned on five seeds of its own. The test set chooses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from types import MappingProxyType
from typing import final

import torch
from matplotlib.figure import Figure

from experiments.comparison import loss_ratio
from experiments.intervals import difference_interval, summary
from experiments.models import mlp
from experiments.plots import draw_runs, legend_below
from experiments.problems import Supervised
from experiments.recipes import SGD, APOLearningRate, APOPrecond, Recipe
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.training import train_trial
from experiments.tuning import Method, at_edge, chosen, plan_grids, plan_search, runs_of, tried

WIDTHS = (64, 256, 256, 10)
BATCH_SIZE = 128
STEPS_PER_EPOCH = 12  # 1,438 examples
EPOCHS_PER_POINT = 2

RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
MOMENTUM_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
INITIAL_RATES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
FSD_WEIGHTS = (1e-2, 1e-3)

FIXED = Method("SGD", tuple(SGD(lr=lr) for lr in RATES))
FIXED_MOMENTUM = Method("SGDm", tuple(SGD(lr=lr, momentum=0.9) for lr in MOMENTUM_RATES))
APO_SGD = Method(
    "APO-SGD",
    tuple(APOLearningRate(lr, fsd_weight=fsd) for fsd in FSD_WEIGHTS for lr in INITIAL_RATES),
)
APO_SGDM = Method(
    "APO-SGDm",
    tuple(
        APOLearningRate(lr, momentum=0.9, fsd_weight=fsd)
        for fsd in FSD_WEIGHTS
        for lr in INITIAL_RATES[::2]
    ),
)
APO_PRECOND = Method(
    "APO-Precond",
    tuple(
        APOPrecond(lr, meta_lr=meta_lr, fsd_weight=1e-2, warmup_steps=120)
        for meta_lr in (3e-4, 1e-3, 3e-3)
        for lr in (0.3, 1.0, 3.0)
    ),
)
REPORTED = (FIXED, APO_SGD, FIXED_MOMENTUM, APO_SGDM)

# Final training loss and test accuracy (%) of an independent throwaway prototype with another split
# and other initial weights, 60 epochs, means of 5 seeds: a check of the order of magnitude.
PROTOTYPE: dict[Recipe, str] = {
    SGD(1.0): "1.4e-3 / 97.2",
    SGD(0.1): "5.9e-2 / 96.4",
    APOLearningRate(1e-1, fsd_weight=1e-2): "4.5e-2 / 96.9",
    APOLearningRate(1e-2, fsd_weight=1e-2): "5.6e-2 / 96.6",
    APOLearningRate(1e-3, fsd_weight=1e-2): "4.8e-2 / 96.2",
    APOLearningRate(1e-4, fsd_weight=1e-2): "2.5e-2 / 97.0",
    APOLearningRate(1e-5, fsd_weight=1e-2): "5.9e-2 / 96.6",
    APOLearningRate(1e-1, fsd_weight=1e-3): "2.6e-2 / 96.7",
    APOLearningRate(1e-2, fsd_weight=1e-3): "3.6e-2, one of 5 dead",
    APOLearningRate(1e-3, fsd_weight=1e-3): "2.9e-2 / 96.6",
    APOLearningRate(1e-4, fsd_weight=1e-3): "2.2e-2 / 96.9",
    APOLearningRate(1e-5, fsd_weight=1e-3): "3.8e-2 / 96.6",
}


@dataclass(frozen=True)
class Scale:
    """What a preset runs."""

    epochs: int
    seeds: int
    tuning_seeds: int = 5  # of APO-Precond
    stride: int = 1  # every how many-th recipe of each grid

    def thinned(self, methods: Sequence[Method]) -> list[Method]:
        """Every `stride`-th recipe of each grid."""
        return [Method(method.label, method.grid[:: self.stride]) for method in methods]


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(epochs=12, seeds=1, tuning_seeds=1, stride=6),
    "default": Scale(epochs=60, seeds=5),
    "paper": Scale(epochs=300, seeds=10),
}


def digits_problem(context: Context, seed: int) -> Supervised:
    """80% of the digits to train on, the rest held out; `seed` orders the mini-batches."""
    data = context.load("digits")
    train_part, test_part = (
        (
            torch.tensor(part.inputs, dtype=torch.float32),
            torch.tensor(part.targets, dtype=torch.int64),
        )
        for part in (data.train, data.test)
    )
    return Supervised(
        train_part,
        test_part,
        "cross_entropy",
        batch_size=BATCH_SIZE,
        seed=seed,
        device=context.device,
    )


@final
class Digits(Experiment):
    """Final training loss and test accuracy of fixed and of learned learning rates."""

    name = "digits"
    title = "Handwritten digits: fixed learning rates, APO's, and APO-Precond"
    source = "ours; the question is that of P22 section 6.3 and Figure 28"
    datasets = ("digits",)
    scales = MappingProxyType(
        {
            "smoke": "12 epochs, 1 seed, every 6th recipe of each grid",
            "default": "60 epochs of 12 mini-batches of 128, 5 seeds",
            "paper": "300 epochs, 10 seeds (the papers have no such table)",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """The reported grids with every seed; APO-Precond's with a tuning seed, then the best."""
        scale = SCALES[preset]
        task = {"epochs": scale.epochs}
        count = seeds or scale.seeds
        return plan_grids(scale.thinned(REPORTED), task, range(count)) + plan_search(
            scale.thinned([APO_PRECOND]),
            task,
            tuning_seeds=scale.tuning_seeds,
            seeds=count,
            records=records,
        )

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train on 80% of the digits; "loss" is the training loss, "test" the test error."""
        problem = digits_problem(context, trial.seed)
        model = mlp(WIDTHS, seed=trial.seed, device=context.device)
        return train_trial(
            trial,
            context,
            model,
            problem,
            steps=trial.options["epochs"] * problem.steps_per_epoch,
            record_every=EPOCHS_PER_POINT * problem.steps_per_epoch,
        )

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Every cell: final training loss, test accuracy."""
        rows = []
        for method in REPORTED:
            for one in method.grid:
                if runs := runs_of(one, records):
                    rows.append(_row(method, one, runs, _prototype(one, runs)))
        best = chosen(APO_PRECOND, records)
        if runs := runs_of(best, records):
            note = at_edge(tried(APO_PRECOND, records), best) or "inside its grid"
            rows.append(_row(APO_PRECOND, best, runs, f"tuned on seeds of its own, {note}"))
        return rows

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Training loss of each method's best cell; the learning rates of APO-SGD."""
        figure.set_size_inches(10, 6.5)
        left, right = figure.subplots(1, 2)
        weight = _fsd_weight(chosen(APO_SGD, records, tuning=False))
        for one in APO_SGD.grid:
            if _fsd_weight(one) == weight:
                draw = partial(
                    draw_runs,
                    runs=runs_of(one, records),
                    label=f"APO-SGD: {one.text()}",
                    steps_per_unit=STEPS_PER_EPOCH,
                )
                draw(left, curve="loss", band=False)
                draw(right, curve="learning_rate")
        fixed = chosen(FIXED, records, tuning=False)
        cells = {
            FIXED: fixed,
            FIXED_MOMENTUM: chosen(FIXED_MOMENTUM, records, tuning=False),
            APO_SGDM: chosen(APO_SGDM, records, tuning=False),
            APO_PRECOND: chosen(APO_PRECOND, records),
        }
        for method, one in cells.items():
            label, runs = f"{method.label}: {one.text()}", runs_of(one, records)
            draw_runs(left, runs, "loss", label, steps_per_unit=STEPS_PER_EPOCH)
        assert isinstance(fixed, SGD)
        right.axhline(fixed.lr, color="black", lw=1, label=f"best fixed rate of SGD, {fixed.lr:g}")
        left.set(xlabel="epoch", ylabel="training loss", yscale="log")
        right.set(xlabel="epoch", ylabel="learning rate η", yscale="log")
        legend_below(left)
        legend_below(right)

    def verdict(self, records: Sequence[Record]) -> str:
        """APO beside the best fixed rate, and how much the initial rate matters."""
        fixed, momentum, learned, learned_momentum = (
            chosen(method, records, tuning=False)
            for method in (FIXED, FIXED_MOMENTUM, APO_SGD, APO_SGDM)
        )
        where = at_edge(tried(FIXED, records), fixed) or "inside the grid"
        parts = [
            f"Best fixed rate of SGD: {fixed.text()}, {where}",
            _compared("the best of APO-SGD", learned, "it", fixed, records),
            _compared("the best of APO-SGDm", learned_momentum, "the best SGDm", momentum, records),
            _compared("APO-Precond", chosen(APO_PRECOND, records), "the best SGD", fixed, records),
        ]
        for weight in FSD_WEIGHTS:
            cells = [
                runs
                for one in APO_SGD.grid
                if _fsd_weight(one) == weight and (runs := runs_of(one, records))
            ]
            medians = [median(run.metric("loss") for run in runs) for runs in cells]
            if len(medians) > 1:
                parts.append(
                    f"λ_FSD = {weight:g}: over {len(cells)} initial rates APO-SGD's median loss "
                    f"lies between {min(medians):.2g} and {max(medians):.2g}, and "
                    f"{sum(map(_dead, cells))} of {sum(map(len, cells))} runs are dead"
                )
        return "; ".join(parts) + "."


def _fsd_weight(one: Recipe) -> float:
    return one.fsd_weight if isinstance(one, APOLearningRate) else 0.0


def _row(method: Method, one: Recipe, runs: Sequence[Record], note: str) -> Row:
    losses = [run.metric("loss") for run in runs]
    finished = [100 * (1 - run.metric("test")) for run in runs if run.status == "finished"]
    accuracy = f"; accuracy {summary(finished, '.1f')} %" if finished else ""
    dead = f"{_dead(runs)} of {len(runs)} dead" if 0 < _dead(runs) < len(runs) else ""
    return Row(
        label=f"{method.label}, {one.text()}",
        ours=f"loss {summary(losses)}{accuracy}",
        paper="–",
        n=len(runs),
        note="; ".join(text for text in (dead, note) if text),
    )


def _dead(runs: Sequence[Record]) -> int:
    """How many runs end no better than half the loss of guessing, ½ log 10."""
    return sum(run.metric("loss") > 0.5 * math.log(10) for run in runs)


def _prototype(one: Recipe, runs: Sequence[Record]) -> str:
    comparable = runs[0].options["epochs"] == SCALES["default"].epochs
    return f"prototype: {PROTOTYPE[one]}" if comparable and one in PROTOTYPE else ""


def _compared(what: str, ours: Recipe, whom: str, theirs: Recipe, records: Sequence[Record]) -> str:
    """The paired ratio of final training losses, and difference of test accuracies, in words."""
    pairs = {run.seed: run.metric("test") for run in runs_of(theirs, records)}
    runs = [run for run in runs_of(ours, records) if run.seed in pairs]
    if not runs:
        return f"{what} is not yet comparable to {whom}"
    points = difference_interval(
        [-100 * run.metric("test") for run in runs], [-100 * pairs[run.seed] for run in runs]
    )
    return (
        f"{what} ({ours.text()}) ends at {loss_ratio(ours, theirs, records)} the training loss of "
        f"{whom}, and {points} points of test accuracy from it (paired, 95%, n = {points.n})"
    )


register(Digits())
