"""Rosenbrock, RMSprop-APO: initial points (Figure 9), initial learning rates (Figure 10).

The five points are P18's, APO starting at the rate 3e-4; beside each stands the best of six fixed
rates of RMSprop from that point. P18 calls its initial rates "a wide range" without naming them:
here 1e-1 to 1e-7, all from (1, −1.5). λ = 0, float64, one deterministic run each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

from matplotlib.figure import Figure

from experiments.apo_recipes import APORMSprop
from experiments.paper.adaptation import draw_adaptation
from experiments.paper.p18_fig1 import APO, INITIAL_RATE, rosenbrock_row, rosenbrock_sentence
from experiments.paper.p22_fig7 import descend
from experiments.plots import draw_runs, legend_below
from experiments.recipes import RMSprop
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.tuning import Method, mean_loss, plan_grids, runs_of

# P18 Figure 9, and the start of all other experiments on Rosenbrock.
POINTS: dict[str, tuple[float, float]] = {
    "x=-1_y=1.5": (-1.0, 1.5),
    "x=-2_y=2": (-2.0, 2.0),
    "x=0_y=0": (0.0, 0.0),
    "x=0.5_y=0.5": (0.5, 0.5),
    "x=1_y=-1": (1.0, -1.0),
}
USUAL = "x=1_y=-1.5"
STARTS = {**POINTS, USUAL: (1.0, -1.5)}

FIXED = Method("RMSprop", tuple(RMSprop(lr) for lr in (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)))
RATES = Method(
    "RMSprop-APO",
    tuple(APORMSprop(lr) for lr in (1e-1, 1e-2, 1e-3, INITIAL_RATE, 1e-4, 1e-5, 1e-6, 1e-7)),
    "self-tuning",
)


@dataclass(frozen=True)
class Scale:
    """What a preset runs."""

    steps: int
    stride: int = 1  # every how many-th recipe of each grid


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(steps=100, stride=4),
    "default": Scale(steps=20_000),
    "paper": Scale(steps=40_000),
}


@final
class RosenbrockStarts(Experiment):
    """Objective values and learning rates from several points and several initial rates."""

    name = "p18-fig9"
    title = "Rosenbrock: RMSprop-APO from several points and initial learning rates"
    source = "P18 Figures 9 and 10, appendices D and E"
    claims = ("p18-fig9", "p18-fig10")
    scales = MappingProxyType(
        {
            "smoke": "100 steps, every fourth rate",
            "default": "20,000 steps; 5 points with 6 fixed rates each, 8 initial rates",
            "paper": "40,000 steps (the paper does not say how many)",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """Every recipe once from every start. `seeds` is idle: nothing is random."""
        scale = SCALES[preset]
        fixed = Method(FIXED.label, FIXED.grid[:: scale.stride])
        rates = Method(RATES.label, RATES.grid[:: scale.stride], RATES.track)
        trials = [
            trial
            for start in POINTS
            for trial in plan_grids([APO, fixed], _task(start, scale.steps), [0])
        ]
        return trials + plan_grids([rates], _task(USUAL, scale.steps), [0])

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Descend from the trial's point."""
        return descend(trial, context, STARTS[trial.options["start"]])

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Final f from every point, of APO and of the best fixed rate; from every initial rate."""
        rows = [
            rosenbrock_row(f"{method.label}, from {point}", method, _of(start, records))
            for start, point in POINTS.items()
            for method in (APO, FIXED)
        ]
        rows += [
            rosenbrock_row(
                f"RMSprop-APO, {one.text()}", Method(RATES.label, (one,)), _of(USUAL, records)
            )
            for one in RATES.grid
        ]
        return [row for row in rows if row.n]

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Figure 9 on the left, Figure 10 on the right: objectives above, learning rates below."""
        figure.set_size_inches(11, 10)
        (left, right), (left_rate, right_rate) = figure.subplots(2, 2)
        for start, point in POINTS.items():
            runs = runs_of(APO.grid[0], _of(start, records))
            draw_runs(left, runs, "loss", str(point))
            draw_adaptation(left_rate, runs, "learning_rate", str(point))
        for one in RATES.grid:
            runs = runs_of(one, _of(USUAL, records))
            draw_runs(right, runs, "loss", one.text())
            draw_adaptation(right_rate, runs, "learning_rate", one.text())
        for axes in (left, right):
            axes.set(ylabel="f(x, y)", yscale="log")
        for axes in (left, right, left_rate, right_rate):
            axes.set(xlabel="step")
        left.set(title="initial points")
        right.set(title="initial learning rates")
        legend_below(left_rate)
        legend_below(right_rate)

    def verdict(self, records: Sequence[Record]) -> str:
        """APO beside the best fixed rate from each point, and the spread over initial rates."""
        parts = [
            f"from {point}: {rosenbrock_sentence(APO, FIXED, _of(start, records))}"
            for start, point in POINTS.items()
        ]
        usual = _of(USUAL, records)
        finals = [mean_loss(runs_of(one, usual)) for one in RATES.grid if runs_of(one, usual)]
        if finals:
            parts.append(
                f"from {len(finals)} initial learning rates the final f lies between "
                f"{min(finals):.2g} and {max(finals):.2g}"
            )
        return (
            "; ".join(parts) + ". One deterministic run each: no interval. P18 reports very low "
            "losses from all points, and nearly identical losses from all initial rates."
        )


def _of(start: str, records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.options["start"] == start]


def _task(start: str, steps: int) -> dict[str, Any]:
    return {"start": start, "steps": steps}


register(RosenbrockStarts())
