"""Curves of several seeds as one line: the mean, with the range from the least to the greatest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from experiments.records import Record


def draw_runs(
    axes: Axes,
    runs: Sequence[Record],
    curve: str,
    label: str,
    *,
    steps_per_unit: float = 1.0,
    band: bool = True,
) -> None:
    """One line for the runs of a method, over steps (or epochs, of `steps_per_unit` steps).

    Runs that stopped early end the line where the first of them stops, and the legend counts them.
    Nothing is drawn where there is no run.

    Args:
        axes: where.
        runs: records of one recipe, one a seed.
        curve: which curve.
        label: for the legend.
        steps_per_unit: steps to one unit of the x axis.
        band: shade the range over the runs.
    """
    curves = [run.curve(curve) for run in runs]
    if not curves:
        return
    length = min(len(values) for values in curves)
    stopped = sum(run.status != "finished" for run in runs)
    if stopped:
        label += f" ({stopped} of {len(runs)} diverged)"
    x = np.array(runs[0].curve("step")[:length]) / steps_per_unit
    values = np.array([one[:length] for one in curves])  # (runs, points)
    (line,) = axes.plot(x, values.mean(axis=0), label=label)
    if band and len(runs) > 1:
        axes.fill_between(
            x, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.15, lw=0
        )
