"""Tuned methods side by side: rows, curves and paired comparisons, from the records alone."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from experiments.intervals import ratio_interval, summary
from experiments.plots import draw_runs, legend_below
from experiments.recipes import Recipe
from experiments.records import Record
from experiments.registry import Row
from experiments.tuning import Method, at_edge, chosen, runs_of, tried


def comparison_row(method: Method, records: Sequence[Record], paper: str) -> Row:
    """The final training loss of the method's chosen recipe over the reporting seeds."""
    best = chosen(method, records)
    runs, grid = runs_of(best, records), tried(method, records)
    notes = [f"best of {len(grid.grid)}: {best.text()}", at_edge(grid, best)]
    return Row(
        label=method.label,
        ours=summary([run.metric("loss") for run in runs]) if runs else "–",
        paper=paper,
        n=len(runs),
        note="; ".join(note for note in notes if note),
    )


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
    pairs = {run.seed: run.metric("loss") for run in runs_of(theirs, records)}
    runs = [run for run in runs_of(ours, records) if run.seed in pairs]
    if not runs:
        return "not yet comparable to"
    ratio = ratio_interval([run.metric("loss") for run in runs], [pairs[r.seed] for r in runs])
    return f"{ratio} times"
