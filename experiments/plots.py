"""Curves of several seeds as one line: the median, with the range over the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation

from experiments.records import Record

LABELS_HEIGHT = 0.45  # inches below the axes, for the ticks' labels and the axis' own


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

    A run that diverged counts as infinite from there on: the line ends where the median run does,
    and the legend counts them. Nothing is drawn where there is no run.

    Args:
        axes: where.
        runs: records of one recipe, one a seed.
        curve: which curve.
        label: for the legend.
        steps_per_unit: steps to one unit of the x axis.
        band: shade the range over the runs that are left.
    """
    if not runs:
        return
    diverged = sum(run.status != "finished" for run in runs)
    if diverged:
        label += f" ({diverged} of {len(runs)} diverged)"
    x = np.array(max((run.curve("step") for run in runs), key=len)) / steps_per_unit
    values = np.full((len(runs), len(x)), math.inf)  # (runs, points)
    for row, run in zip(values, runs, strict=True):
        one = run.curve(curve)
        row[: len(one)] = one
    middle = np.median(values, axis=0)
    (line,) = axes.plot(x, np.where(np.isfinite(middle), middle, math.nan), label=label)
    if band and len(runs) > 1:
        left = np.ma.masked_invalid(values)
        axes.fill_between(
            x, left.min(axis=0), left.max(axis=0), color=line.get_color(), alpha=0.15, lw=0
        )


def legend_below(axes: Axes) -> None:
    """The legend under the axes, where it hides no curve."""
    if axes.get_legend_handles_labels()[0]:
        figure = axes.get_figure(root=True)
        assert figure is not None
        below = ScaledTranslation(0, -LABELS_HEIGHT, figure.dpi_scale_trans)
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            bbox_transform=axes.transAxes + below,
            fontsize=7,
            frameon=False,
        )
