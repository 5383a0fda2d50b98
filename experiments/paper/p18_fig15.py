"""MNIST MLP: RMSprop's learning rate by APO, by population based training, and by a fixed grid.

Four networks with RMSprop, one after another on one device; after each epoch the worst takes over
the best's weights and its learning rate times 0.8 or 1.2, with nothing drawn anew. Their first
rates are drawn log-uniformly from P18's range for RMSprop, [1e-4, 1e-2], by the seed. Beside them
RMSprop-APO from 3e-4 with P18's best λ for this network, 1e-5, and RMSprop with four fixed rates:
P18's three and 3e-4, as dear as the population. Of the members, and of the four fixed rates, each
point of a curve is the one with the lowest training loss there; seconds and passes are of all.

Differs from the paper: P18 trains ResNet-34 on CIFAR-10, which is beyond a laptop's CPU; here the
network is that of its MNIST experiments, and `paper` trains it on all images for 100 epochs. P18
does not say how often its population is perturbed: here after each epoch. The population's seconds
leave out Ray's own work, its processes and checkpoints.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, final

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.apo_recipes import APORMSprop
from experiments.comparison import costs, time_to_target
from experiments.intervals import ratio_interval, summary
from experiments.models import mlp
from experiments.paper.mnist_mlp import WIDTHS, image_problem, run_mlp, task
from experiments.plots import legend_below
from experiments.recipes import RMSprop
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.tuning import Method, plan_grids

MEMBERS = 4
RATES = (1e-4, 1e-2)  # P18 section 5.2: the ends of its grid for RMSprop
BASE = RMSprop(3e-4)  # a member's rate replaces it

POPULATION = "RMSprop-PBT"
FIXED_RATES = (1e-4, 3e-4, 1e-3, 1e-2)
FIXED = Method("RMSprop", tuple(map(RMSprop, FIXED_RATES)))
APO = Method("RMSprop-APO", (APORMSprop(3e-4, 1e-5),), "self-tuning")
TEXTS = {
    APO.label: APO.grid[0].text(),
    POPULATION: f"{MEMBERS} members from η in [{RATES[0]:g}, {RATES[1]:g}], times 0.8 or 1.2",
    FIXED.label: f"the best of η = {', '.join(f'{rate:g}' for rate in FIXED_RATES)}",
}


@dataclass(frozen=True)
class Scale:
    """What a preset runs."""

    task: dict[str, Any]
    seeds: int


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(task(examples=600, epochs=4, points=4), seeds=1),
    "default": Scale(task(examples=5_000, epochs=20, points=20), seeds=3),
    "paper": Scale(task(examples=60_000, epochs=100, points=100), seeds=3),
}


@final
class AgainstAPopulation(Experiment):
    """Training loss and test error over seconds and passes: APO, a population, four fixed rates."""

    name = "p18-fig15"
    title = "MNIST MLP: RMSprop-APO against population based training"
    source = "P18 Figure 15, appendix H"
    claims = ("p18-fig15",)
    embedded = False
    datasets = ("mnist",)
    timed = True
    scales = MappingProxyType(
        {
            "smoke": "600 examples, 4 epochs, a population of 4, 1 seed",
            "default": "5,000 examples, 20 epochs, a population of 4, 3 seeds",
            "paper": "60,000 examples, 100 epochs, a population of 4, 3 seeds (not ResNet-34)",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """Each method with every seed: nothing is chosen."""
        scale = SCALES[preset]
        counted = range(seeds or scale.seeds)
        population = {"optimizer": "population", "members": MEMBERS, **scale.task}
        return [
            *(Trial(f"PBT-seed{seed}", population, seed, POPULATION) for seed in counted),
            *plan_grids([APO, FIXED], scale.task, counted),
        ]

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train the MLP, or a population of it.

        Raises:
            ModuleNotFoundError: a population needs the extra `sweep`.
        """
        if trial.label != POPULATION:
            return run_mlp(trial, context)
        # Ray, which this imports, comes with the extra `sweep` alone
        from experiments.population import Population, train_population

        problem = partial(
            image_problem, context.load("mnist"), trial, flat=True, device=context.device
        )
        population = Population(
            network=partial(mlp, WIDTHS, device=context.device),
            problem=problem,
            recipe=BASE,
            rates=first_rates(trial.seed, trial.options["members"]),
            epochs=trial.options["epochs"],
            seed=trial.seed,
            threads=torch.get_num_threads(),
        )
        return train_population(population, context.progress)

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Final training loss and test error of each method, and what all its runs took."""
        rows = []
        for label, text in TEXTS.items():
            runs = list(by_seed(label, records).values())
            ended = [run for run in runs if not run.error]
            ours = f"loss {summary([run.metric('loss') for run in runs])}" if runs else "–"
            if ended:
                ours += f", test error {summary([run.metric('test') for run in ended])}"
            rows.append(Row(label, ours, "figure only", len(runs), text, costs(runs)))
        return rows

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Loss and error over seconds and over passes, and the rate of the best; a line a seed."""
        figure.set_size_inches(13, 9)
        runs = {label: list(by_seed(label, records).values()) for label in TEXTS}
        panels = figure.subplots(2, 3)
        curves = (("loss", "training loss"), ("test", "test error"), ("learning_rate", "rate"))
        for row, unit in zip(panels, ("seconds", "passes"), strict=True):
            for axes, (curve, name) in zip(row, curves, strict=True):
                for color, label in enumerate(TEXTS):
                    _draw(axes, runs[label], unit, curve, label, f"C{color}")
                axes.set(xlabel=unit, ylabel=name, yscale="log")
                legend_below(axes)

    def verdict(self, records: Sequence[Record]) -> str:
        """APO over the population: loss, and time to the higher of both losses; then the grid."""
        return (
            f"{_compared(APO.label, POPULATION, records)}; "
            f"{_compared(POPULATION, FIXED.label, records)} (geometric mean of paired ratios, 95% "
            "t interval; seconds and passes are of all members and of all four rates). P18 reports "
            "for ResNet-34 on CIFAR-10 a training loss of APO an order of magnitude below that of "
            "the population, and the same test accuracy much more quickly."
        )


def first_rates(seed: int, members: int) -> tuple[float, ...]:
    """Every member's first learning rate, log-uniform in `RATES`, by the seed."""
    source = random.Random(f"first rates {seed}")  # not the stream of the population's factors
    low, high = map(math.log, RATES)
    return tuple(math.exp(source.uniform(low, high)) for _ in range(members))


def by_seed(label: str, records: Sequence[Record]) -> dict[int, Record]:
    """One record a seed: the method's run, or of its several rates `side_by_side`."""
    found: dict[int, list[Record]] = {}
    for record in sorted(records, key=lambda one: (one.seed, one.trial.name)):
        if record.label == label:
            found.setdefault(record.seed, []).append(record)
    return {seed: side_by_side(runs) for seed, runs in found.items()}


def side_by_side(runs: Sequence[Record]) -> Record:
    """Runs one after another on one device: at each point the lowest loss, and the cost of all.

    A run that diverged has an infinite loss from there on. A failed one is returned as it is: what
    the others would have been with it is not known.
    """
    failed = [run for run in runs if run.error]
    if len(runs) == 1 or failed:
        return [*failed, *runs][0]
    points = max((run.curve("step") for run in runs), key=len)
    curves: dict[str, list[float]] = {"step": points}
    for name in ("seconds", "passes"):
        values = [_padded(run.curve(name), len(points), run.curve(name)[-1]) for run in runs]
        curves[name] = [math.fsum(point) for point in zip(*values, strict=True)]
    padded = {
        name: [_padded(run.curve(name), len(points), math.inf) for run in runs]
        for name in ("loss", "test", "learning_rate")
    }
    best = [
        min(range(len(runs)), key=point.__getitem__) for point in zip(*padded["loss"], strict=True)
    ]
    for name, values in padded.items():
        curves[name] = [values[index][at] for at, index in enumerate(best)]
    metrics = {name: curves[name][-1] for name in ("loss", "test")}
    for name in ("training_seconds", "meta_seconds", "evaluation_seconds", "passes"):
        metrics[name] = math.fsum(run.outcome.metrics[name] for run in runs)
    metrics["peak_bytes"] = max(run.outcome.metrics["peak_bytes"] for run in runs)
    return replace(runs[0], outcome=Outcome(metrics, curves))


def _padded(values: list[float], length: int, last: float) -> list[float]:
    """So many values, the missing ones `last`; NaN is infinite, as it is in comparisons of runs."""
    known = [math.inf if math.isnan(value) else value for value in values]
    return known + [last] * (length - len(known))


def _draw(
    axes: Axes, runs: Sequence[Record], unit: str, curve: str, label: str, color: str
) -> None:
    for index, run in enumerate(run for run in runs if not run.error):
        shown = label if index == 0 else None
        axes.plot(run.curve(unit), run.curve(curve), label=shown, color=color, lw=1)


def _compared(ours: str, theirs: str, records: Sequence[Record]) -> str:
    """ "A ends at … times the training loss of B, and reaches the higher … in … its seconds"."""
    left, right = by_seed(ours, records), by_seed(theirs, records)
    pairs = [(left[seed], right[seed]) for seed in left if seed in right]
    if not pairs:
        return f"{ours} is not yet comparable to {theirs}"
    ratio = ratio_interval(
        [mine.metric("loss") for mine, _ in pairs], [other.metric("loss") for _, other in pairs]
    )
    text = f"{ours} ends at {ratio} times the training loss of {theirs}"
    ended = [pair for pair in pairs if all(run.status == "finished" for run in pair)]
    if not ended:
        return f"{text}, and no seed has a finished run of both"
    ratios = {}
    targets = [max(run.metric("loss") for run in pair) for pair in ended]
    for unit in ("seconds", "passes"):
        times = [
            [
                time_to_target(pair[side], target, unit)
                for pair, target in zip(ended, targets, strict=True)
            ]
            for side in (0, 1)
        ]
        ratios[unit] = ratio_interval(times[0], times[1])
    return (
        f"{text}, and reaches the higher of both losses in {ratios['seconds']} times the seconds "
        f"and {ratios['passes']} times the passes (n = {len(ended)})"
    )


register(AgainstAPopulation())
