"""Handwritten digits, an MLP 64-256-256-10: fixed learning rates, and those that APO learns.

The embedded stand-in for the papers' classification experiments; the papers have no such table. The
question is P22's claim that a learning rate adapted by APO beats the best fixed one, from any
initial value. The whole grid is reported, and the best cell of a method is the one with the lowest
mean training loss over the reporting seeds, of fixed rates and of APO alike; only APO-Precond,
whose grid is larger, is tuned on a seed of its own. The test set chooses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from matplotlib.figure import Figure

from experiments.intervals import difference_interval, ratio_interval, summary
from experiments.models import mlp
from experiments.plots import draw_runs
from experiments.problems import Supervised
from experiments.recipes import SGD, APOLearningRate, APOPrecond, Recipe, recipe
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.training import train
from experiments.tuning import Method, at_edge, chosen, mean_loss, plan_grids, plan_search, runs_of

WIDTHS = (64, 256, 256, 10)
BATCH_SIZE = 128
EPOCHS_PER_POINT = 2

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
INITIAL_RATES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
FSD_WEIGHTS = (1e-2, 1e-3)

FIXED = Method("SGD", tuple(SGD(lr=lr) for lr in RATES))
FIXED_MOMENTUM = Method("SGDm", tuple(SGD(lr=lr, momentum=0.9) for lr in RATES[:7]))
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
        APOPrecond(lr, meta_lr=meta_lr, fsd_weight=fsd, warmup_steps=120)
        for fsd in (1e-2, 0.3)
        for meta_lr in (1e-3, 3e-3, 1e-2)
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
    """What a preset runs: how long, how many reporting seeds, and every how many-th recipe."""

    epochs: int
    seeds: int
    stride: int = 1

    def thinned(self, methods: Sequence[Method]) -> list[Method]:
        """Every `stride`-th recipe of each grid."""
        return [Method(method.label, method.grid[:: self.stride]) for method in methods]


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(epochs=12, seeds=1, stride=6),
    "default": Scale(epochs=60, seeds=5),
    "paper": Scale(epochs=300, seeds=10),
}


@final
class Digits(Experiment):
    """Final training loss and test accuracy of fixed and of learned learning rates."""

    name = "digits"
    title = "Handwritten digits: fixed learning rates, APO's, and APO-Precond"
    source = "ours; the question is that of P22 section 6.3 and Figure 28"
    claims = ("p22-fig28-30",)
    datasets = ("digits",)
    scales = {
        "smoke": "12 epochs, 1 seed, every 6th recipe of each grid",
        "default": "60 epochs of 12 mini-batches of 128, 5 seeds",
        "paper": "300 epochs, 10 seeds (the papers have no such table)",
    }

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """The reported grids with every seed; APO-Precond's with a tuning seed, then the best."""
        scale = SCALES[preset]
        task = {"epochs": scale.epochs}
        count = seeds or scale.seeds
        return plan_grids(scale.thinned(REPORTED), task, range(count)) + plan_search(
            scale.thinned([APO_PRECOND]), task, tuning_seeds=1, seeds=count, records=records
        )

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train on 80% of the digits; "loss" is the training loss, "test" the test error."""
        data = context.load("digits")
        train_part, test_part = (
            (
                torch.tensor(part.inputs, dtype=torch.float32),
                torch.tensor(part.targets, dtype=torch.int64),
            )
            for part in (data.train, data.test)
        )
        problem = Supervised(
            train_part,
            test_part,
            "cross_entropy",
            batch_size=BATCH_SIZE,
            seed=trial.seed,
            device=context.device,
        )
        model = mlp(WIDTHS, seed=trial.seed, device=context.device)
        return train(
            model,
            recipe(trial.options).build(model, problem),
            problem,
            steps=trial.options["epochs"] * problem.steps_per_epoch,
            record_every=EPOCHS_PER_POINT * problem.steps_per_epoch,
            progress=context.progress,
        )

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Every cell: final training loss, test accuracy."""
        rows = []
        for method in (*REPORTED, APO_PRECOND):
            for one in method.grid:
                runs = runs_of(one, records)
                if not runs:
                    continue
                losses = [run.metric("loss") for run in runs]
                note = f"prototype: {PROTOTYPE[one]}" if one in PROTOTYPE else ""
                if method is APO_PRECOND:
                    note = _edges(method, one) or "tuned on a seed of its own"
                rows.append(
                    Row(
                        label=f"{method.label}, {_hyperparameters(one)}",
                        ours=f"loss {summary(losses)}; accuracy {_accuracy(runs)}",
                        paper="–",
                        n=len(runs),
                        note=note,
                    )
                )
        return rows

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Training loss of each method's best cell; the learning rates of APO-SGD."""
        figure.set_size_inches(10, 4.5)
        left, right = figure.subplots(1, 2)
        weight = _weight(chosen(APO_SGD, records, tuning=False))
        epoch = 12
        for method in (FIXED, FIXED_MOMENTUM, APO_SGDM):
            best = chosen(method, records, tuning=False)
            label = f"{method.label}, {_hyperparameters(best)}"
            draw_runs(left, runs_of(best, records), "loss", label, steps_per_unit=epoch)
        for one in APO_SGD.grid:
            if _weight(one) == weight:
                runs = runs_of(one, records)
                label = f"APO-SGD, {_hyperparameters(one)}"
                draw_runs(left, runs, "loss", label, steps_per_unit=epoch, band=False)
                draw_runs(right, runs, "learning_rate", label, steps_per_unit=epoch)
        best = chosen(APO_PRECOND, records)
        label = f"APO-Precond, {_hyperparameters(best)}"
        draw_runs(left, runs_of(best, records), "loss", label, steps_per_unit=epoch)
        left.set(xlabel="epoch", ylabel="training loss", yscale="log")
        right.set(xlabel="epoch", ylabel="learning rate η", yscale="log")
        best = chosen(FIXED, records, tuning=False)
        if isinstance(best, SGD):
            right.axhline(best.lr, color="black", lw=1, label=f"best fixed, η = {best.lr:g}")
        for axes in (left, right):
            axes.legend(fontsize=7)

    def verdict(self, records: Sequence[Record]) -> str:
        """APO-SGD beside the best fixed rate, and how much its initial rate matters."""
        fixed = chosen(FIXED, records, tuning=False)
        learned = chosen(APO_SGD, records, tuning=False)
        edge = _edges(FIXED, fixed)
        sentences = [
            f"The best fixed rate of SGD is {_hyperparameters(fixed)}"
            + (f" ({edge})" if edge else " (inside the grid)"),
            _compared("APO-SGD's best cell", learned, fixed, records),
        ]
        best_momentum = chosen(FIXED_MOMENTUM, records, tuning=False)
        learned_momentum = chosen(APO_SGDM, records, tuning=False)
        sentences.append(
            _compared("APO-SGDm's best cell beside the best SGDm", learned_momentum,
                      best_momentum, records)
        )
        sentences.append(
            _compared("APO-Precond beside the best SGD", chosen(APO_PRECOND, records), fixed,
                      records)
        )
        for weight in FSD_WEIGHTS:
            means = [mean_loss(runs_of(one, records)) for one in APO_SGD.grid
                     if _weight(one) == weight and runs_of(one, records)]
            if len(means) > 1:
                sentences.append(
                    f"with λ_FSD = {weight:g} the worst of {len(means)} initial rates of APO-SGD "
                    f"ends {max(means) / min(means):.2g} times above the best of them"
                )
        return "; ".join(sentences) + "."


def _hyperparameters(one: Recipe) -> str:
    """What tells the recipes of one method apart."""
    match one:
        case SGD():
            return f"η = {one.lr:g}"
        case APOLearningRate():
            return f"η₀ = {one.lr:g}, λ_FSD = {one.fsd_weight:g}"
        case APOPrecond():
            return f"P₀ = {one.initial_lr:g} I, α = {one.meta_lr:g}, λ_FSD = {one.fsd_weight:g}"
        case _:
            return one.slug()


def _weight(one: Recipe) -> float:
    return one.fsd_weight if isinstance(one, APOLearningRate) else 0.0


def _edges(method: Method, choice: Recipe) -> str:
    names = at_edge(method, choice)
    return f"{' and '.join(names)} at the grid's edge" if names else ""


def _accuracy(runs: Sequence[Record]) -> str:
    """Test accuracy in percent, over the runs that have one."""
    values = [100 * (1 - run.metric("test")) for run in runs if run.status == "finished"]
    return summary(values, ".1f") + " %" if values else "–"


def _compared(what: str, ours: Recipe, theirs: Recipe, records: Sequence[Record]) -> str:
    """The paired ratio of final training losses and difference of test errors, in words."""
    pairs = {run.seed: run for run in runs_of(theirs, records)}
    runs = [run for run in runs_of(ours, records) if run.seed in pairs]
    if not runs:
        return f"{what}: no pair of runs yet"
    ratio = ratio_interval(
        [run.metric("loss") for run in runs], [pairs[run.seed].metric("loss") for run in runs]
    )
    accuracy = difference_interval(
        [-100 * run.metric("test") for run in runs],
        [-100 * pairs[run.seed].metric("test") for run in runs],
    )
    return (
        f"{what} ({_hyperparameters(ours)}) ends at {ratio} times its training loss and "
        f"{accuracy} points of test accuracy from it (95% paired t intervals, n = {ratio.n})"
    )


register(Digits())
