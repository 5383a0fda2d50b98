"""MNIST: how little the initial learning rate matters to SGDm-APO and RMSprop-APO.

P22 Figure 28 shows ResNet-32 on CIFAR-10 from 1e-1, 1e-3, 1e-5 and 1e-7, P18 Figure 11 RMSprop-APO
on MNIST from 1e-2 to 1e-7. Here both start from P22's four on P18's MNIST network, and RMSprop-APO
in the preset `paper` from P18's too. λ is P18's best for this network, 0.1 for SGDm-APO and 1e-5
for RMSprop-APO, fixed in advance. Every start runs without and with a trust factor of 1.1, which
the papers do not have; and SGDm with σ = 0.3 too, the best of `limits-rules` from a small rate:
P18's rate "as if there's no momentum" is too large for the steps with momentum.

Differs from the papers: `default` sees 5,000 examples for 20 epochs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType
from typing import Any, final

from matplotlib.figure import Figure

from experiments.apo_recipes import APOSGD, Amortized, APORMSprop
from experiments.intervals import summary
from experiments.paper.adaptation import draw_adaptation
from experiments.paper.mnist_mlp import run_mlp, spread, steps_per_epoch, task
from experiments.plots import draw_runs, legend_below
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.self_tuned import SelfTuned
from experiments.tuning import Method, plan_grids, runs_of, union

P22_RATES = (1e-1, 1e-3, 1e-5, 1e-7)
P18_RATES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
SGDM_WEIGHT = 0.1  # P18 section 5.2.1: the best λ
RMSPROP_WEIGHT = 1e-5
TRUST_FACTORS = (None, 1.1)
SHORTER = 0.3  # σ
DEAD = 0.5 * math.log(10)  # half the loss of guessing


@dataclass(frozen=True)
class Scale:
    """What a preset runs."""

    task: dict[str, Any]
    seeds: int
    sgdm: Sequence[float] = P22_RATES
    rmsprop: Sequence[float] = P22_RATES

    def methods(self) -> list[Method]:
        """Each base optimizer over its initial rates: as printed, in a trust region, shorter."""
        methods = []
        for factor in TRUST_FACTORS:
            suffix = "" if factor is None else f", κ = {factor:g}"
            sgdm = (APOSGD(lr, SGDM_WEIGHT, momentum=0.9, trust_factor=factor) for lr in self.sgdm)
            rmsprop = (APORMSprop(lr, RMSPROP_WEIGHT, trust_factor=factor) for lr in self.rmsprop)
            methods += [
                Method(f"SGDm-APO{suffix}", tuple(sgdm), "self-tuning"),
                Method(f"RMSprop-APO{suffix}", tuple(rmsprop), "self-tuning"),
            ]
        shorter = (SelfTuned("SGDm", lr=lr, update_scale=SHORTER) for lr in self.sgdm)
        label = f"SGDm-APO, κ = 1.1, σ = {SHORTER:g}"
        return [*methods, Method(label, tuple(shorter), "self-tuning")]


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(
        task(examples=600, epochs=4, points=4), seeds=1, sgdm=(1e-1, 1e-3), rmsprop=(1e-2, 1e-3)
    ),
    "default": Scale(task(examples=5_000, epochs=20, points=20), seeds=2),
    "paper": Scale(
        task(examples=60_000, epochs=100, points=100), seeds=3, rmsprop=(1e-1, *P18_RATES)
    ),
}


def _initial(one: object) -> float:
    assert isinstance(one, Amortized | SelfTuned)
    return one.lr


# the preset with the most rates first, in whose order the others' are
METHODS = union(scale.methods() for scale in reversed(SCALES.values()))


@final
class InitialRates(Experiment):
    """Final training loss over initial learning rates that span six orders of magnitude."""

    name = "p22-fig28"
    title = "MNIST MLP: robustness to the initial learning rate"
    source = "P22 Figure 28 (a, b), appendix I.2; P18 Figure 11 (top), appendix E"
    claims = ("p22-fig28-30", "p18-fig11")
    embedded = False
    datasets = ("mnist",)
    scales = MappingProxyType(
        {
            "smoke": "600 examples, 4 epochs, 2 initial rates, 1 seed",
            "default": "5,000 examples, 20 epochs, 4 initial rates, 2 seeds",
            "paper": "60,000 examples, 100 epochs, 4 and 7 initial rates, 3 seeds",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """Every initial rate with every seed: nothing is chosen."""
        scale = SCALES[preset]
        return plan_grids(scale.methods(), scale.task, range(seeds or scale.seeds))

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train the MLP."""
        return run_mlp(trial, context)

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Final training loss from every initial rate, and the learning rate that it ends with."""
        return [
            _row(method, one, runs)
            for method in METHODS
            for one in method.grid
            if (runs := runs_of(one, records))
        ]

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """A column a method: training loss above, learning rate below."""
        figure.set_size_inches(17, 9)
        panels = figure.subplots(2, len(METHODS), sharex="col", sharey="row", squeeze=False)
        for (loss, rate), method in zip(panels.T, METHODS, strict=True):
            for one in method.grid:
                if runs := runs_of(one, records):
                    unit, label = steps_per_epoch(runs[0].options), f"η₀ = {_initial(one):g}"
                    draw_runs(loss, runs, "loss", label, steps_per_unit=unit)
                    draw_adaptation(rate, runs, "learning_rate", label, steps_per_unit=unit)
            loss.set(title=method.label, yscale="log")
            rate.set(xlabel="epoch")
            legend_below(rate)
        panels[0, 0].set(ylabel="training loss")
        panels[0, 0].set_ylim(top=10.0)  # what diverges leaves through the top

    def verdict(self, records: Sequence[Record]) -> str:
        """Max over min of the mean final training loss over initial rates, and the dead runs."""
        parts = [text for method in METHODS if (text := _spread(method, records))]
        return (
            "; ".join(parts) + ". P22 and P18 report almost identical losses and learning rates "
            "from all of them."
        )


def _dead(runs: Sequence[Record]) -> int:
    """How many runs end no better than half the loss of guessing."""
    return sum(run.metric("loss") > DEAD for run in runs)


def _row(method: Method, one: object, runs: Sequence[Record]) -> Row:
    ends = [run.curve("learning_rate")[-1] for run in runs if run.status == "finished"]
    notes = [f"{_dead(runs)} of {len(runs)} dead"] if _dead(runs) else []
    notes += [f"η ends at {summary(ends)}"] if ends else []
    return Row(
        label=f"{method.label}, η₀ = {_initial(one):g}",
        ours=f"loss {summary([run.metric('loss') for run in runs])}",
        paper="figure only",
        n=len(runs),
        note="; ".join(notes),
    )


def _spread(method: Method, records: Sequence[Record]) -> str:
    cells = [runs for one in method.grid if (runs := runs_of(one, records))]
    if not cells:
        return ""
    alive = [runs for runs in cells if not _dead(runs)]
    dead, total = sum(map(_dead, cells)), sum(map(len, cells))
    text = f"{method.label}: {dead} of {total} runs from {len(cells)} initial rates are dead"
    if not alive:
        return text
    means = [fmean(run.metric("loss") for run in runs) for runs in alive]
    which = "over all" if len(alive) == len(cells) else f"over the {len(alive)} without a dead run"
    return f"{text}; {which} the mean final loss lies {spread(means)}"


register(InitialRates())
