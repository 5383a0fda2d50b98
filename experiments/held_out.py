"""The settings of `apo.self_tuning` on tasks that had no part in choosing them.

`limits` and `limits-rules` chose them on four tasks, all of them MLPs, three of which classify.
Here is a regression (5,000 of Protein, an MLP) and a network of another kind (LeNet on 5,000 of
CIFAR-10), with a grid of fixed rates for each rule, its best chosen on the same seeds' training
loss, and Prodigy, of which nothing is searched either. No setting of APO was changed after a look
at these tasks; that SGDm is `apo.self_tuning`'s default was decided after it.

The papers have no such table: they search λ for every task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

from matplotlib.figure import Figure

from experiments.comparison import costs
from experiments.intervals import summary
from experiments.plots import draw_runs, legend_below
from experiments.recipes import SGD, RMSprop
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.rivals import Prodigy
from experiments.self_tuned import MOMENTUM, SETTINGS
from experiments.small_tasks import HELD_OUT, final_ratio, of_task, plan_tasks, train_task
from experiments.tuning import Method, at_edge, chosen, runs_of

FIXED = {
    "SGD": Method("SGD", tuple(map(SGD, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)))),
    "SGDm": Method(
        "SGDm",
        tuple(SGD(lr, momentum=MOMENTUM) for lr in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)),
    ),
    "RMSprop": Method("RMSprop", tuple(map(RMSprop, (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)))),
}
OURS = {
    "SGD": Method("APO-SGD", (SETTINGS["SGD"],), "self-tuning"),
    "SGDm": Method("APO-SGDm", (SETTINGS["SGDm"],), "self-tuning"),
    "RMSprop": Method("APO-RMSprop", (SETTINGS["RMSprop"],), "self-tuning"),
}
RIVAL = Method("Prodigy", (Prodigy(),), "self-tuning")


@dataclass(frozen=True)
class Scale:
    """What a preset runs: a share of the epochs, every how many-th fixed rate."""

    epochs: float
    seeds: int
    stride: int = 1


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(epochs=0.05, seeds=1, stride=3),
    "default": Scale(epochs=1.0, seeds=3),
    "paper": Scale(epochs=5.0, seeds=10),
}


@final
class HeldOut(Experiment):
    """Final training loss of the settings beside each rule's best fixed rate, and Prodigy."""

    name = "held-out"
    title = "apo.self_tuning on tasks that its settings were not chosen on"
    source = "ours"
    embedded = False
    datasets = tuple(HELD_OUT)
    scales = MappingProxyType(
        {
            "smoke": "1 epoch, 1 seed, 3 fixed rates",
            "default": "20 epochs of 5,000 examples, 7 fixed rates, 3 seeds",
            "paper": "five times the epochs, 10 seeds (the papers have no such table)",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """Every setting, fixed rate and Prodigy with every seed on every task."""
        scale = SCALES[preset]
        grids = [Method(one.label, one.grid[:: scale.stride]) for one in FIXED.values()]
        methods = [*grids, *OURS.values(), RIVAL]
        return plan_tasks(HELD_OUT, methods, scale.epochs, seeds or scale.seeds)

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train; "loss" is the training loss."""
        return train_task(trial, context)

    def table(self, records: Sequence[Record]) -> list[Row]:
        """On each task, every method's final training loss, and the settings' ratio to the best."""
        rows = []
        for task in HELD_OUT:
            ours = of_task(task, records)
            rows += [_row(task, one, ours) for one in (*FIXED.values(), *OURS.values(), RIVAL)]
        return [row for row in rows if row.n]

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Training loss and learning rate over steps: a row a task."""
        figure.set_size_inches(13, 10)
        for line, task in zip(figure.subplots(len(HELD_OUT), 2), HELD_OUT, strict=True):
            ours = of_task(task, records)
            for method in (*FIXED.values(), *OURS.values(), RIVAL):
                best = chosen(method, ours, tuning=False)
                name = f"fixed {method.label}, {best.text()}" if method.track == "tuned" else ""
                draw_runs(line[0], runs_of(best, ours), "loss", name or method.label)
            for method in OURS.values():
                runs = runs_of(method.grid[0], ours)
                draw_runs(line[1], runs, "learning_rate", method.label)
            line[0].set(title=task, xlabel="step", ylabel="training loss", yscale="log")
            line[1].set(title=task, xlabel="step", ylabel="η", yscale="log")
            for axes in line:
                legend_below(axes)

    def verdict(self, records: Sequence[Record]) -> str:
        """Each rule's settings over its best fixed rate and over Prodigy, task by task."""
        parts = []
        for task in HELD_OUT:
            ours = of_task(task, records)
            for rule, method in OURS.items():
                setting = method.grid[0]
                for other in (FIXED[rule], RIVAL):
                    best = chosen(other, ours, tuning=False)
                    if ratio := final_ratio(setting, best, ours):
                        name = "Prodigy" if other is RIVAL else f"the best fixed {rule}"
                        parts.append(f"{task}: {method.label} {ratio} of {name}")
        return (
            "Final training loss with nothing searched (geometric mean of ratios paired by seed, "
            f"95% t interval): {'; '.join(parts) or 'no run yet'}."
        )


def _row(task: str, method: Method, records: Sequence[Record]) -> Row:
    best = chosen(method, records, tuning=False)
    runs = runs_of(best, records)
    notes = [f"nothing searched, {best.text()}"]
    if method.track == "tuned":
        notes = [f"best of {len(method.grid)}: {best.text()}", at_edge(method, best)]
    notes.append(f"test {summary([run.metric('test') for run in runs])}" if runs else "")
    return Row(
        label=f"{task}: {method.label}",
        ours=summary([run.metric("loss") for run in runs]) if runs else "–",
        paper="–",
        n=len(runs),
        note="; ".join(filter(None, notes)),
        costs=costs(runs),
    )


register(HeldOut())
