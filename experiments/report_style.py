"""How every figure looks: colours that the colour-blind tell apart, lines that survive grey print.

Colour, dash and marker change together, so that no two of the first 14 lines look alike even where
two of the three are lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design" (2008), without the yellow, which is too faint for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "d", "p", "h", "8")
MARKS = 10  # markers on one line, spread over its points

SETTINGS: dict[Any, Any] = {
    # After 7 lines the dashes shift by one against the colours, so that pairs do not return.
    "axes.prop_cycle": (
        cycler(color=COLOURS * 2)
        + cycler(linestyle=DASHES + DASHES[1:] + DASHES[:1])
        + cycler(marker=MARKERS)
    ),
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 150,
    "figure.figsize": (8.0, 4.5),
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.framealpha": 0.9,
    "legend.handlelength": 3.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}


@contextmanager
def report_style() -> Iterator[None]:
    """Matplotlib's settings inside the context; those of before after it."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", **SETTINGS}):
        yield


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, with its markers thinned out; call it inside `report_style`."""
    for axes in figure.axes:
        for i, line in enumerate(axes.get_lines()):
            step = max(1, np.size(line.get_xdata()) // MARKS)
            if step > 1 and line.get_markevery() is None:
                # Each line starts its markers elsewhere, so that they do not lie on one another.
                line.set_markevery((i * step // MARKS % step, step))
    file = BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", metadata={"Software": None})
    return file.getvalue()
