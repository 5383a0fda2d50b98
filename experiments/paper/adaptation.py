"""How a learned hyperparameter moves: its curves over steps, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from experiments.plots import draw_runs
from experiments.records import Record


def draw_adaptation(
    axes: Axes, runs: Sequence[Record], curve: str, label: str, *, steps_per_unit: float = 1.0
) -> None:
    """The curve of a hyperparameter, median and range over the seeds; nothing where no run has it.

    Args:
        axes: where.
        runs: records of one recipe, one a seed.
        curve: "learning_rate", "rho", "eps" or "damping", with "/layer" where layers differ.
        label: for the legend.
        steps_per_unit: steps to one unit of the x axis.
    """
    having = [run for run in runs if curve in run.outcome.curves]
    draw_runs(axes, having, curve, label, steps_per_unit=steps_per_unit)
    axes.set(ylabel=curve.replace("_", " "), yscale="log")


def layers_of(runs: Sequence[Record], curve: str) -> list[str]:
    """The layers that have a curve of their own, such as ["0", "2"] for "learning_rate/0", ..."""
    names = {name for run in runs for name in run.outcome.curves}
    return sorted(name.partition("/")[2] for name in names if name.startswith(f"{curve}/"))
