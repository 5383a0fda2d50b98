"""MNIST, MLP 784-1000-1000-10: SGD, SGDm and RMSprop, each with and without APO.

SGDm is Nesterov's, 0.9, as in P18; RMSprop-APO starts at 3e-4, SGD-APO and SGDm-APO at 0.1, as in
P22 section 6.1. RMSprop 0.1 is the meta-optimizer, every 10 steps. The preset `paper` searches the
grids of P18 section 5.2 as they are printed, {0.1, 0.01, 0.001} for SGD and SGDm, {0.01, 0.001,
0.0001} for RMSprop, with each base optimizer's own grid of λ.

Differs from the paper: P18 and P22 choose λ on the run that they show, here it is chosen on a seed
of its own. `default` sees 5,000 examples for 20 epochs, and gives each method 4 trials. Its fixed
rates lie around the best, which P18's grid of SGD leaves out: 0.3 is above its largest. So do the λ
of SGDm-APO: η is tuned as if there were no momentum, and with a λ of at most 0.1 it is soon too
large for the steps with momentum. The verdict says what APO gains over both, the best of our grid
and the best of those rates that P18 tried too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

from matplotlib.figure import Figure

from experiments.apo_recipes import APOSGD, APORMSprop
from experiments.comparison import comparison_row, loss_ratio
from experiments.paper.adaptation import draw_adaptation
from experiments.paper.mnist_mlp import run_mlp, steps_per_epoch, task
from experiments.plots import draw_runs, legend_below
from experiments.recipes import SGD, Nesterov, Recipe, RMSprop
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.tuning import Method, at_edge, chosen, plan_search, runs_of, tried, union

# P18 section 5.2
P18_RATES: dict[str, tuple[float, ...]] = {
    "SGD": (0.1, 0.01, 0.001),
    "SGDm": (0.1, 0.01, 0.001),
    "RMSprop": (0.01, 0.001, 0.0001),
}
# P18 section 5.2.1 and Figure 2
FOUND = {
    "SGD": "figure only; 0.1 and 0.01 shown",
    "SGDm": "figure only; 0.01 shown",
    "RMSprop": "figure only; best rate 1e-4",
    "SGD-APO": "figure only; best λ 1e-3",
    "SGDm-APO": "figure only; best λ 0.1",
    "RMSprop-APO": "figure only; best λ 1e-5; 1/1000 of RMSprop's loss",
}
MOMENTUM = 0.9
INITIAL = {"SGD": 0.1, "SGDm": 0.1, "RMSprop": 3e-4}


@dataclass(frozen=True)
class Grids:
    """Fixed learning rates, and λ of APO, for each base optimizer."""

    sgd: Sequence[float] = P18_RATES["SGD"]
    sgdm: Sequence[float] = P18_RATES["SGDm"]
    rmsprop: Sequence[float] = P18_RATES["RMSprop"]
    sgd_weights: Sequence[float] = (0.1, 0.01, 1e-3)
    sgdm_weights: Sequence[float] = (0.1, 0.01, 1e-3)
    rmsprop_weights: Sequence[float] = (0.1, 0.01, 1e-3, 1e-4, 1e-5, 0.0)

    def methods(self) -> list[Method]:
        """Each base optimizer, and after it its APO-tuned variant."""
        return [
            Method("SGD", tuple(SGD(lr) for lr in self.sgd)),
            Method("SGD-APO", tuple(APOSGD(INITIAL["SGD"], w) for w in self.sgd_weights)),
            Method("SGDm", tuple(Nesterov(lr, MOMENTUM) for lr in self.sgdm)),
            Method(
                "SGDm-APO",
                tuple(APOSGD(INITIAL["SGDm"], w, momentum=MOMENTUM) for w in self.sgdm_weights),
            ),
            Method("RMSprop", tuple(RMSprop(lr) for lr in self.rmsprop)),
            Method(
                "RMSprop-APO",
                tuple(APORMSprop(INITIAL["RMSprop"], w) for w in self.rmsprop_weights),
            ),
        ]


@dataclass(frozen=True)
class Scale:
    """What a preset runs."""

    task: dict[str, Any]
    grids: Grids
    seeds: int = 3
    tuning_seeds: int = 1


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(
        task(examples=600, epochs=4, points=4),
        Grids(
            sgd=(0.1,),
            sgdm=(0.01,),
            rmsprop=(3e-4,),
            sgd_weights=(1e-3,),
            sgdm_weights=(0.1,),
            rmsprop_weights=(1e-4,),
        ),
        seeds=1,
    ),
    "default": Scale(
        task(examples=5_000, epochs=20, points=10),
        Grids(
            sgd=(0.03, 0.1, 0.3, 1.0),
            sgdm=(0.01, 0.03, 0.1, 0.3),
            rmsprop=(1e-4, 3e-4, 1e-3, 3e-3),
            sgd_weights=(0.1, 0.01, 1e-3, 0.0),
            sgdm_weights=(100.0, 10.0, 1.0, 0.1),
            rmsprop_weights=(1e-3, 1e-4, 1e-5, 0.0),
        ),
    ),
    "paper": Scale(task(examples=60_000, epochs=100, points=50), Grids()),
}


METHODS = union(scale.grids.methods() for scale in SCALES.values())
PAIRS = tuple(zip(METHODS[::2], METHODS[1::2], strict=True))  # (base optimizer, with APO)


@final
class MNISTFigure(Experiment):
    """Training loss of three base optimizers and of their APO-tuned variants."""

    name = "p22-fig5"
    title = "MNIST MLP: SGD, SGDm and RMSprop with and without APO"
    source = "P22 Figure 5, section 6.3; P18 Figure 2 (a, b), section 5.2.1"
    claims = ("p22-fig5", "p18-fig2")
    embedded = False
    datasets = ("mnist",)
    edges = MappingProxyType(
        {
            **{("paper", method.label): "the grid is P18's" for method in METHODS},
            ("default", "SGD-APO"): "no λ is less than 0",
            ("default", "RMSprop-APO"): "no λ is less than 0",
        }
    )
    scales = MappingProxyType(
        {
            "smoke": "600 examples, 4 epochs, a recipe for each method, 1 seed",
            "default": "5,000 examples, 20 epochs; 4 recipes for each method, 3 seeds",
            "paper": "60,000 examples, 100 epochs, the grids of P18 section 5.2, 3 seeds",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """The grids with a tuning seed, then the chosen recipes."""
        scale = SCALES[preset]
        return plan_search(
            scale.grids.methods(),
            scale.task,
            tuning_seeds=scale.tuning_seeds,
            seeds=seeds or scale.seeds,
            records=records,
        )

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train the MLP."""
        return run_mlp(trial, context)

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Final training loss of each method's chosen recipe."""
        return [comparison_row(method, records, FOUND[method.label]) for method in METHODS]

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Training loss, test error and learning rate over epochs; APO dashed, as in P22."""
        figure.set_size_inches(12, 5.5)
        loss, test, rate = figure.subplots(1, 3)
        for method in METHODS:
            best = chosen(method, records)
            runs, label = runs_of(best, records), f"{method.label}: {best.text()}"
            if not runs:
                continue
            unit = steps_per_epoch(runs[0].options)
            draw_runs(loss, runs, "loss", label, steps_per_unit=unit)
            draw_runs(test, runs, "test", method.label, steps_per_unit=unit)
            draw_adaptation(rate, runs, "learning_rate", method.label, steps_per_unit=unit)
            for axes in (loss, test, rate):
                axes.get_lines()[-1].set_linestyle("--" if "APO" in method.label else "-")
        loss.set(xlabel="epoch", ylabel="training loss", yscale="log")
        test.set(xlabel="epoch", ylabel="test error", yscale="log")
        rate.set(xlabel="epoch")
        for axes in (loss, test, rate):
            legend_below(axes)

    def verdict(self, records: Sequence[Record]) -> str:
        """Each APO-tuned variant over its base optimizer's best fixed rate, and P18's best."""
        parts = [_compared(base, apo, records) for base, apo in PAIRS]
        return (
            "; ".join(parts) + " (final training loss, geometric mean of paired ratios, 95% t "
            "interval). P22 and P18 report substantially lower losses with APO for all three."
        )


def _compared(base: Method, apo: Method, records: Sequence[Record]) -> str:
    """The paired ratio to the best of our grid; to P18's best from the tuning seeds alone."""
    ours, best = chosen(apo, records), chosen(base, records)
    printed = tuple(one for one in base.grid if _rate(one) in P18_RATES[base.label])
    there = tried(Method(base.label, printed), records)
    where = at_edge(tried(base, records), best) or "inside the grid"
    text = (
        f"{apo.label} ({ours.text()}) ends at {loss_ratio(ours, best, records)} the best fixed "
        f"{base.label} ({best.text()}, {where})"
    )
    if not there.grid or (rival := chosen(there, records)) == best:
        return text
    mine, theirs = (runs_of(one, records, tuning=True) for one in (ours, rival))
    if not mine or not theirs:
        return text
    return (
        f"{text}, on the tuning seed at {mine[0].metric('loss'):.2g} where P18's best rate "
        f"({rival.text()}) ends at {theirs[0].metric('loss'):.2g}"
    )


def _rate(one: Recipe) -> float:
    return getattr(one, "lr", 0.0)


register(MNISTFigure())
