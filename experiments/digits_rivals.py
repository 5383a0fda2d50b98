"""Digits beside every rival: whose learning rate was searched, and whose tunes itself.

MLP 64-256-256-10, 60 epochs of 12 mini-batches of 128, as in `digits`. Two tracks:

tuned          each method's grid of five with tuning seeds of its own; the recipe with the lowest
               mean final training loss runs again with the reporting seeds
self-tuning    one recipe for all tasks, its authors' default; nothing is searched

APO's defaults are those of `self_tuned`. They were chosen by the worst of the tasks of `limits` and
`limits-rules`, of which digits is one, with seeds that report here too; so their place on digits is
not out of sample. The test set has no say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType
from typing import final

from matplotlib.figure import Figure

from experiments.comparison import comparison_row, costs, draw_time_to_target, loss_ratio
from experiments.digits import STEPS_PER_EPOCH, WIDTHS, digits_problem
from experiments.intervals import summary
from experiments.models import mlp
from experiments.plots import draw_runs, legend_below
from experiments.recipes import SGD, Adam, Recipe, Shampoo
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.rivals import rivals
from experiments.self_tuned import SETTINGS
from experiments.training import train_epochs
from experiments.tuning import Method, chosen, plan_grids, plan_search, runs_of

POINTS = 30  # of a curve


def methods(steps: int) -> tuple[list[Method], list[Method]]:
    """The tuned, and those that tune themselves, whose default stands first."""
    others = rivals(steps)
    tuned = [
        Method("SGD", tuple(SGD(lr) for lr in (0.1, 0.2, 0.5, 1.0, 2.0))),
        Method("SGDm", tuple(SGD(lr, momentum=0.9) for lr in (0.01, 0.03, 0.1, 0.3, 1.0))),
        Method("Adam", tuple(Adam(lr) for lr in (1e-3, 3e-3, 1e-2, 3e-2, 0.1))),
        Method("Shampoo", tuple(Shampoo(lr, interval=10) for lr in (1e-3, 3e-3, 1e-2, 3e-2, 0.1))),
        *(method for method in others if method.track == "tuned"),
    ]
    own = [Method(f"APO-{rule}", (one,), "self-tuning") for rule, one in SETTINGS.items()]
    return tuned, [*own, *(method for method in others if method.track == "self-tuning")]


@dataclass(frozen=True)
class Scale:
    """What a preset runs."""

    epochs: int
    seeds: int
    tuning_seeds: int
    grid: int = 5  # of each tuned method's recipes, the first so many


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(epochs=2, seeds=1, tuning_seeds=1, grid=1),
    "default": Scale(epochs=60, seeds=5, tuning_seeds=2),
    "paper": Scale(epochs=300, seeds=10, tuning_seeds=5),
}


@final
class DigitsRivals(Experiment):
    """Final training loss of every optimizer at hand, on two tracks."""

    name = "digits-rivals"
    title = "Handwritten digits: APO beside tuned and self-tuning rivals"
    source = "ours; the papers compare with SGD, SGDm, RMSprop, Adam, KFAC and Shampoo"
    datasets = ("digits",)
    scales = MappingProxyType(
        {
            "smoke": "2 epochs, one recipe each, 1 seed",
            "default": "60 epochs, grids of 5 with 2 tuning seeds, 5 seeds",
            "paper": "300 epochs, grids of 5 with 5 tuning seeds, 10 seeds",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """The self-tuning defaults; the tuned methods' grids, then their best."""
        scale = SCALES[preset]
        tuned, own = methods(scale.epochs * STEPS_PER_EPOCH)
        task = {"epochs": scale.epochs}
        count = seeds or scale.seeds
        defaults = [Method(one.label, one.grid[:1]) for one in own]
        return plan_grids(defaults, task, range(count)) + plan_search(
            [Method(one.label, one.grid[: scale.grid]) for one in tuned],
            task,
            tuning_seeds=scale.tuning_seeds,
            seeds=count,
            records=records,
        )

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train on 80% of the digits; "loss" is the training loss, "test" the test error."""
        problem = digits_problem(context, trial.seed)
        model = mlp(WIDTHS, seed=trial.seed, device=context.device)
        return train_epochs(
            trial, context, model, problem, steps_per_epoch=problem.steps_per_epoch, points=POINTS
        )

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Each method's final training loss and test accuracy, the self-tuning first."""
        tuned, own = _methods(records)
        rows = []
        for method in own:
            runs = runs_of(method.grid[0], records)
            rows.append(
                Row(
                    label=method.label,
                    ours=_figures(runs),
                    paper="–",
                    n=len(runs),
                    note=f"self-tuning, its default: {method.grid[0].text()}",
                    costs=costs(runs),
                )
            )
        for method in tuned:
            row = comparison_row(method, records, "–")
            ours = _figures(runs_of(chosen(method, records), records))
            rows.append(Row(row.label, ours, row.paper, row.n, row.note, row.costs))
        return rows

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Training loss over steps, a track each, and the time until a loss is reached."""
        figure.set_size_inches(14, 6)
        tuned, own = _methods(records)
        left, middle, right = figure.subplots(1, 3)
        for method in own:
            draw_runs(left, runs_of(method.grid[0], records), "loss", method.label)
        for method in tuned:
            best = chosen(method, records)
            label = f"{method.label}: {best.text()}"
            draw_runs(middle, runs_of(best, records), "loss", label)
        lowest = min(
            (v for r in records for v in r.outcome.curves.get("loss", []) if v > 0), default=1e-6
        )
        for axes, title in ((left, "self-tuning, the defaults"), (middle, "tuned, the best of 5")):
            axes.set(title=title, xlabel="step", ylabel="training loss", yscale="log")
            axes.set_ylim(lowest / 2, 10)
            legend_below(axes)
        shown = [method for method in (*own, *tuned) if method.label in _SHOWN]
        draw_time_to_target(right, shown, records)
        right.set(title="time to a training loss", yscale="log")

    def verdict(self, records: Sequence[Record]) -> str:
        """The best default of APO beside the best of both tracks."""
        tuned, own = _methods(records)
        amortized = {m.label: m.grid[0] for m in own if m.label.startswith("APO")}
        others = {m.label: m.grid[0] for m in own if not m.label.startswith("APO")}
        searched = {m.label: chosen(m, records) for m in tuned}
        best, rival, top = (_best(entries, records) for entries in (amortized, others, searched))
        pairs = [
            (f"APO-{base}", base, amortized[f"APO-{base}"], searched[base])
            for base in ("SGD", "SGDm", "Adam")
        ]
        beside = "; ".join(
            f"{ours} {loss_ratio(one, other, records)} that of tuned {base}"
            for ours, base, one, other in pairs
        )
        return (
            f"Of APO's defaults {best} ends lowest: at a training loss "
            f"{loss_ratio(amortized[best], others[rival], records)} that of {rival}, the best "
            f"other default, and {loss_ratio(amortized[best], searched[top], records)} that of "
            f"{top}, the best tuned method. {beside} (geometric mean of paired ratios, 95% t "
            "interval)."
        )


_SHOWN = ("APO-SGD", "APO-SGDm", "APO-RMSprop", "Prodigy", "Muon", "SGDm", "Adam", "SGDm, cosine")


def _best(entries: dict[str, Recipe], records: Sequence[Record]) -> str:
    """The name with the lowest median final training loss."""
    losses = {
        name: [run.metric("loss") for run in runs_of(one, records)] for name, one in entries.items()
    }
    return min(losses, key=lambda name: median(losses[name]) if losses[name] else math.inf)


def _figures(runs: Sequence[Record]) -> str:
    """Final training loss, and mean test accuracy."""
    if not runs:
        return "–"
    accuracy = 100 * (1 - sum(run.metric("test", 1.0) for run in runs) / len(runs))
    return f"{summary([run.metric('loss') for run in runs])}; {accuracy:.1f}%"


def _methods(records: Sequence[Record]) -> tuple[list[Method], list[Method]]:
    """The methods at the records' length."""
    epochs = max((record.options["epochs"] for record in records), default=1)
    return methods(epochs * STEPS_PER_EPOCH)


register(DigitsRivals())
