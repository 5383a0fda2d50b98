"""Toy problems: the fixed learning rates of RMSprop, and the one that APO learns.

Rosenbrock from (1, −1.5), λ = 0, float64: deterministic, one run each. The poorly-conditioned
regression is that of `p22-fig4-left`, with fresh mini-batches of 128; its curves show the exact
J(θ). P18 gives no λ for it, which is searched here like the fixed rates, on a seed of its own.

P18 prints neither the fixed rates, nor the numbers of steps, nor APO's initial rate: the rates are
a grid around the best, the initial rate is P22's 3e-4, and the steps are in the presets. RMSprop
keeps γ = 0.99 and ε = 1e-8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

from matplotlib.figure import Figure

from experiments.apo_recipes import APORMSprop
from experiments.comparison import comparison_row, comparison_sentence
from experiments.paper.adaptation import draw_adaptation
from experiments.paper.p22_fig4_left import regress
from experiments.paper.p22_fig7 import POINTS, START, descend
from experiments.plots import draw_runs, legend_below
from experiments.recipes import Recipe, RMSprop
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.tuning import (
    Method,
    at_edge,
    chosen,
    mean_loss,
    plan_grids,
    plan_search,
    runs_of,
    tried,
)

INITIAL_RATE = 3e-4  # P22 section 6.1

FIXED = Method("RMSprop", tuple(RMSprop(lr) for lr in (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)))
APO = Method("RMSprop-APO", (APORMSprop(INITIAL_RATE),), "self-tuning")
REGRESSION_FIXED = Method("RMSprop", tuple(RMSprop(lr) for lr in (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)))
REGRESSION_APO = Method(
    "RMSprop-APO",
    tuple(APORMSprop(INITIAL_RATE, weight) for weight in (1e3, 100.0, 10.0, 1.0, 0.1)),
    "self-tuning",
)


@dataclass(frozen=True)
class Scale:
    """What a preset runs."""

    steps: int  # of Rosenbrock
    regression_steps: int
    seeds: int  # of the regression
    stride: int = 1  # every how many-th recipe of each grid


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(steps=200, regression_steps=200, seeds=2, stride=3),
    "default": Scale(steps=40_000, regression_steps=10_000, seeds=3),
    "paper": Scale(steps=40_000, regression_steps=40_000, seeds=5),
}


@final
class ToyProblems(Experiment):
    """Objective values of RMSprop-APO and of RMSprop with fixed rates on two toy problems."""

    name = "p18-fig1"
    title = "RMSprop-APO on Rosenbrock and on the poorly-conditioned regression"
    source = "P18 Figure 1, section 5.1"
    claims = ("p18-fig1",)
    edges = MappingProxyType(
        {("default", "Regression, RMSprop-APO"): "a λ_FSD above 1000 was not tried"}
    )
    scales = MappingProxyType(
        {
            "smoke": "200 steps, every third recipe of each grid, 2 seeds of the regression",
            "default": "40,000 steps of Rosenbrock, 10,000 of the regression with 3 seeds",
            "paper": "40,000 steps (the paper does not say how many), 5 seeds",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """Rosenbrock's recipes once; the regression's with a tuning seed, then the chosen."""
        scale = SCALES[preset]
        return [
            *plan_grids(
                _thinned([FIXED, APO], scale.stride), _task("rosenbrock", scale.steps), [0]
            ),
            *plan_search(
                _thinned([REGRESSION_FIXED, REGRESSION_APO], scale.stride),
                _task("regression", scale.regression_steps),
                tuning_seeds=1,
                seeds=seeds or scale.seeds,
                records=_of("regression", records),
            ),
        ]

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Descend from (1, −1.5), or train the two-layer linear network."""
        if trial.options["problem"] == "rosenbrock":
            return descend(trial, context, START)
        return regress(trial, context, record_every=max(1, trial.options["steps"] // POINTS))

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Final f of Rosenbrock's best fixed rate and of APO, final J of the regression's."""
        toy, regression = _of("rosenbrock", records), _of("regression", records)
        rows = [rosenbrock_row(f"Rosenbrock, {one.label}", one, toy) for one in (FIXED, APO)]
        return rows + [
            comparison_row(
                Method(f"Regression, {method.label}", method.grid, method.track),
                regression,
                "figure only",
            )
            for method in (REGRESSION_FIXED, REGRESSION_APO)
        ]

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Objectives above, learning rates below; every fixed rate is shown on Rosenbrock."""
        figure.set_size_inches(11, 10)
        (left, right), (left_rate, right_rate) = figure.subplots(2, 2)
        toy, regression = _of("rosenbrock", records), _of("regression", records)
        for method in (FIXED, APO):
            for one in tried(method, toy).grid:
                runs, label = runs_of(one, toy), f"{method.label}, {one.text()}"
                draw_runs(left, runs, "loss", label)
                draw_adaptation(left_rate, runs, "learning_rate", label)
        for method in (REGRESSION_FIXED, REGRESSION_APO):
            one = chosen(method, regression)
            runs, label = runs_of(one, regression), f"{method.label}, {one.text()}"
            draw_runs(right, runs, "loss", label)
            draw_adaptation(right_rate, runs, "learning_rate", label)
        left.set(title="Rosenbrock", ylabel="f(x, y)", yscale="log")
        right.set(title="regression, κ = 10¹⁰", ylabel="J(θ)", yscale="log")
        for axes in (left, right, left_rate, right_rate):
            axes.set(xlabel="step")
        legend_below(left_rate)
        legend_below(right_rate)

    def verdict(self, records: Sequence[Record]) -> str:
        """Whether RMSprop-APO ends below the best fixed rate, on either problem."""
        toy, regression = _of("rosenbrock", records), _of("regression", records)
        sentence = comparison_sentence(REGRESSION_APO, (REGRESSION_FIXED,), regression)
        return (
            f"Rosenbrock: {rosenbrock_sentence(APO, FIXED, toy)}; one deterministic run each, no "
            f"interval. Regression: {sentence}. P18 reports RMSprop-APO substantially lower on "
            "Rosenbrock, and lower by orders of magnitude on the regression."
        )


def rosenbrock_row(label: str, method: Method, records: Sequence[Record]) -> Row:
    """Final f of the method's best recipe, one deterministic run each."""
    grid = tried(method, records)
    if not grid.grid:
        return Row(label, "–", "figure only", 0)
    best = chosen(grid, records, tuning=False)
    notes = [f"best of {len(grid.grid)}: {best.text()}", at_edge(grid, best)]
    loss = _final(best, records)
    return Row(label, f"{loss:.2g}", "figure only", 1, "; ".join(note for note in notes if note))


def rosenbrock_sentence(ours: Method, fixed: Method, records: Sequence[Record]) -> str:
    """ "RMSprop-APO ends at 1e-6, 0.1 times the best of 7 fixed rates, 1e-5 (η = 0.001)"."""
    mine, theirs = tried(ours, records), tried(fixed, records)
    if not mine.grid or not theirs.grid:
        return "not yet comparable"
    best, rival = (chosen(method, records, tuning=False) for method in (mine, theirs))
    value, reference = _final(best, records), _final(rival, records)
    times = f"{value / reference:.2g} times " if reference else ""
    where = at_edge(theirs, rival) or "inside the grid"
    return (
        f"{ours.label} ({best.text()}) ends at {value:.2g}, {times}the best of "
        f"{len(theirs.grid)} fixed rates, {reference:.2g} ({rival.text()}, {where})"
    )


def _final(one: Recipe, records: Sequence[Record]) -> float:
    return mean_loss(runs_of(one, records))


def _of(problem: str, records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.options["problem"] == problem]


def _task(problem: str, steps: int) -> dict[str, Any]:
    return {"problem": problem, "steps": steps}


def _thinned(methods: Sequence[Method], stride: int) -> list[Method]:
    return [Method(one.label, one.grid[::stride], one.track) for one in methods]


register(ToyProblems())
