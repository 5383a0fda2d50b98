"""Tuned methods side by side: rows, curves and paired comparisons, from the records alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import numpy as np
from matplotlib.axes import Axes

from experiments.intervals import Interval, ratio_interval, summary
from experiments.plots import draw_runs, legend_below
from experiments.recipes import Recipe
from experiments.records import Record
from experiments.registry import Row
from experiments.tuning import Method, at_edge, chosen, runs_of, tried


def comparison_row(method: Method, records: Sequence[Record], paper: str) -> Row:
    """The final training loss of the method's chosen recipe over the reporting seeds."""
    best = chosen(method, records)
    runs, grid = runs_of(best, records), tried(method, records)
    track = "self-tuning, " if method.track == "self-tuning" else ""
    notes = [f"{track}best of {len(grid.grid)}: {best.text()}", at_edge(grid, best)]
    return Row(
        label=method.label,
        ours=summary([run.metric("loss") for run in runs]) if runs else "–",
        paper=paper,
        n=len(runs),
        note="; ".join(note for note in notes if note),
        costs=costs(runs),
    )


def costs(runs: Sequence[Record]) -> dict[str, str]:
    """What a run takes: seconds of steps and meta-steps, passes, MiB at the peak.

    Medians over the runs that measured it; a unit that none did is left out.
    """
    ran = [run.outcome.metrics for run in runs if not run.error]
    timed = [one for one in ran if "training_seconds" in one]
    measured = {
        "seconds": [one["training_seconds"] + one["meta_seconds"] for one in timed],
        "passes": [one["passes"] for one in ran if "passes" in one],
        "MiB": [one["peak_bytes"] / 2**20 for one in ran if "peak_bytes" in one],
    }
    return {unit: f"{median(values):.3g}" for unit, values in measured.items() if values}


def time_to_target(run: Record, target: float, axis: str = "seconds") -> float:
    """Where the run's training loss first is at most `target`, on that axis; infinite if never.

    Args:
        run: with curves "loss" and `axis`.
        target: a loss.
        axis: "seconds", "passes" or "step".
    """
    pairs = zip(run.curve(axis), run.curve("loss"), strict=True)
    return next((where for where, loss in pairs if loss <= target), math.inf)


def draw_time_to_target(
    axes: Axes,
    methods: Sequence[Method],
    records: Sequence[Record],
    axis: str = "seconds",
    targets: int = 40,
) -> None:
    """Median time at which each method's chosen recipe first has a training loss, over that loss.

    The losses lie evenly in the logarithm between the highest and the lowest of all runs; a line
    ends where the median run gets no further. Runs whose record has no such axis are left out.
    """
    chosen_runs = {
        method.label: [
            run for run in runs_of(chosen(method, records), records) if axis in run.outcome.curves
        ]
        for method in methods
    }
    losses = [
        loss
        for runs in chosen_runs.values()
        for run in runs
        for loss in run.curve("loss")
        if 0 < loss < math.inf
    ]
    if not losses:
        return
    levels = np.geomspace(max(losses), min(losses), targets)
    for label, runs in chosen_runs.items():
        if runs:
            times = [median(time_to_target(run, level, axis) for run in runs) for level in levels]
            axes.plot(
                levels, [time if time < math.inf else math.nan for time in times], label=label
            )
    axes.set(xlabel="training loss", ylabel=f"{axis} until it is reached", xscale="log")
    axes.invert_xaxis()
    legend_below(axes)


def draw_comparison(
    axes: Axes, methods: Sequence[Method], records: Sequence[Record], steps_per_unit: float = 1.0
) -> None:
    """Training loss of every method's chosen recipe: median and range over the seeds, log axis."""
    for method in methods:
        best = chosen(method, records)
        label = f"{method.label}: {best.text()}"
        draw_runs(axes, runs_of(best, records), "loss", label, steps_per_unit=steps_per_unit)
    axes.set(ylabel="training loss", yscale="log")
    legend_below(axes)


def comparison_sentence(ours: Method, others: Sequence[Method], records: Sequence[Record]) -> str:
    """Our final training loss over each of the others', paired by seed, with its 95% interval."""
    best = chosen(ours, records)
    parts = [
        f"{loss_ratio(best, chosen(other, records), records)} that of {other.label}"
        for other in others
    ]
    return (
        f"{ours.label} ends at a training loss {'; '.join(parts)} "
        "(geometric mean of paired ratios, 95% t interval)"
    )


def loss_ratio(ours: Recipe, theirs: Recipe, records: Sequence[Record]) -> str:
    """ "1.5 [1.2, 1.8] times", over the seeds that both have."""
    ratio = loss_interval(ours, theirs, records)
    return f"{ratio} times" if ratio else "not yet comparable to"


def loss_interval(ours: Recipe, theirs: Recipe, records: Sequence[Record]) -> Interval | None:
    """Our final training loss over theirs, paired by seed; None if no seed has both."""
    pairs = {run.seed: run.metric("loss") for run in runs_of(theirs, records)}
    runs = [run for run in runs_of(ours, records) if run.seed in pairs]
    if not runs:
        return None
    return ratio_interval([run.metric("loss") for run in runs], [pairs[r.seed] for r in runs])
