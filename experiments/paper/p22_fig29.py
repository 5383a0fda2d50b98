"""MNIST, SGDm-APO: how little the meta-update interval K matters, and what a meta-step costs.

P22 Figures 28 (c) and 29 show ResNet-32 on CIFAR-10 with K = 10, 20, 50 and 100, at 1.3 to 1.03
times the time of the base optimizer. Here the network is P18's on MNIST, the optimizer the SGDm of
`p22-fig28` from 0.1, λ = 0.1, beside SGDm with the fixed rate 0.01 that P18 shows. Figure 30, a
preconditioner, is not here.

The overhead is that of the records: seconds of steps and meta-steps of a run over those of the base
optimizer's run with the same seed, evaluation left out. `overhead` measures it apart from training,
and more exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType
from typing import Any, final

from matplotlib.figure import Figure

from experiments.apo_recipes import APOSGD
from experiments.intervals import ratio_interval, summary
from experiments.paper.adaptation import draw_adaptation
from experiments.paper.mnist_mlp import run_mlp, spread, steps_per_epoch, task
from experiments.plots import draw_runs, legend_below
from experiments.recipes import Nesterov, Recipe
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.tuning import Method, plan_grids, runs_of

INTERVALS = (10, 20, 50, 100)
BASE = Nesterov(0.01)
APO = {K: APOSGD(0.1, 0.1, momentum=0.9, interval=K) for K in INTERVALS}
METHOD = Method("SGDm", (BASE, *APO.values()))
PRINTED = {10: "1.3", 100: "1.03"}  # times the base optimizer's time, P22 Figure 28


@dataclass(frozen=True)
class Scale:
    """What a preset runs."""

    task: dict[str, Any]
    seeds: int


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(task(examples=600, epochs=2, points=4), seeds=1),
    "default": Scale(task(examples=5_000, epochs=20, points=20), seeds=2),
    "paper": Scale(task(examples=60_000, epochs=100, points=100), seeds=3),
}


@final
class Intervals(Experiment):
    """Final training loss and overhead over meta-update intervals."""

    name = "p22-fig29"
    title = "MNIST MLP: robustness to the meta-update interval, and its overhead"
    source = "P22 Figures 28 (c) and 29, appendix I.2"
    claims = ("p22-fig28-30",)
    embedded = False
    datasets = ("mnist",)
    timed = True
    scales = MappingProxyType(
        {
            "smoke": "600 examples, 2 epochs, 1 seed",
            "default": "5,000 examples, 20 epochs, K = 10, 20, 50, 100, 2 seeds",
            "paper": "60,000 examples, 100 epochs, 3 seeds",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """The base optimizer and every interval with every seed."""
        scale = SCALES[preset]
        return plan_grids([METHOD], scale.task, range(seeds or scale.seeds))

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train the MLP."""
        return run_mlp(trial, context)

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Final training loss, and the time over the base optimizer's."""
        base = runs_of(BASE, records)
        rows = [_row("SGDm, no APO", BASE, base, "1")] if base else []
        for K, one in APO.items():
            if runs := runs_of(one, records):
                note = f"{overhead(one, records)} times the time of SGDm"
                rows.append(_row(f"SGDm-APO, K = {K}", one, runs, PRINTED.get(K, "–"), note))
        return rows

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Training loss and learning rate over epochs."""
        figure.set_size_inches(10, 5)
        loss, rate = figure.subplots(1, 2)
        for label, one in {"SGDm": BASE, **{f"K = {K}": one for K, one in APO.items()}}.items():
            if runs := runs_of(one, records):
                unit = steps_per_epoch(runs[0].options)
                draw_runs(loss, runs, "loss", label, steps_per_unit=unit)
                draw_adaptation(rate, runs, "learning_rate", label, steps_per_unit=unit)
        loss.set(xlabel="epoch", ylabel="training loss", yscale="log")
        rate.set(xlabel="epoch")
        legend_below(loss)
        legend_below(rate)

    def verdict(self, records: Sequence[Record]) -> str:
        """Max over min of the mean final loss over K, and the overhead at each."""
        cells = {K: runs for K, one in APO.items() if (runs := runs_of(one, records))}
        if not cells:
            return "No run of SGDm-APO yet."
        means = [fmean(run.metric("loss") for run in runs) for runs in cells.values()]
        times = ", ".join(f"{overhead(APO[K], records)} at K = {K}" for K in cells)
        return (
            f"Over K = {', '.join(map(str, cells))} SGDm-APO's mean final training loss lies "
            f"{spread(means)}; its time over SGDm's is {times} (95% t interval). "
            "P22 reports similar losses and 1.3 to 1.03 times the time."
        )


def overhead(one: Recipe, records: Sequence[Record]) -> str:
    """Seconds of training and meta-steps over the base optimizer's, paired by seed."""
    pairs = {run.seed: run for run in runs_of(BASE, records) if run.status == "finished"}
    runs = [r for r in runs_of(one, records) if r.seed in pairs and r.status == "finished"]
    if not runs:
        return "an unknown number of"
    return str(ratio_interval([_seconds(r) for r in runs], [_seconds(pairs[r.seed]) for r in runs]))


def _seconds(run: Record) -> float:
    return run.metric("training_seconds") + run.metric("meta_seconds")


def _row(label: str, one: Recipe, runs: Sequence[Record], paper: str, note: str = "") -> Row:
    loss = summary([run.metric("loss") for run in runs])
    notes = [note] * bool(note)
    return Row(label, f"loss {loss}", paper, len(runs), "; ".join([one.text(), *notes]))


register(Intervals())
