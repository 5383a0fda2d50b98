"""P18 Theorem 1: where its printed condition fails, and the corrected condition.

The plane of lambda / L against C G / L, by which alone the theorem's constants enter once lengths
and losses are scaled. Two families of counterexamples are run through projected gradient descent:
a circle, which one branch of M suffices for, and two turns of a helix. A cell fails if the run ends
in a cycle away from every stationary point; eq. 15 is then false from a finite T on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

import numpy as np
from matplotlib.figure import Figure

from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from reference.cycles import Cycle, circle_cycle, failing_horizon, helix_cycle
from reference.output_space import printed_weight, projected_gradient_descent, sufficient_weight

STEPS = 60
# A run cycles where its last ten gradients are at least this share of its first. No cell lies so
# near the circle's boundary (L + C G) / 4 that a run shrinks by less in 60 steps and yet converges.
CYCLE = 0.5


def turns(ratio: float, bend: float) -> Cycle:
    """The helix whose own C G is `bend` (L = 1)."""
    radius = helix_cycle(ratio).G / bend
    return helix_cycle(ratio, radius)


FAMILIES: dict[str, Callable[[float, float], Cycle]] = {
    "circle": circle_cycle,
    "helix": turns,
}
LABELS = {"circle": "on a circle", "helix": "between two turns of a helix"}


@dataclass(frozen=True)
class Scale:
    """The grid of a preset."""

    ratios: int
    bends: int


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(ratios=4, bends=3),
    "default": Scale(ratios=14, bends=9),
    "paper": Scale(ratios=27, bends=20),
}


@final
class TheoremOneRegion(Experiment):
    """The region of (lambda, L, C, G) in which P18 Theorem 1 is false."""

    name = "p18-thm1"
    title = "P18 Theorem 1: where λ ≥ max(CG, L/4) is not enough"
    source = "P18 theorem 1, appendix A"
    claims = ("p18-thm1",)
    scales = MappingProxyType(
        {
            "smoke": "4 x 3 cells for each family, 60 steps",
            "default": "14 x 9 cells for each family, 60 steps",
            "paper": "27 x 20 cells for each family, 60 steps (the paper has no such figure)",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """One trial for each family; `seeds` is idle: nothing is random."""
        scale = SCALES[preset]
        options = {"ratios": scale.ratios, "bends": scale.bends, "steps": STEPS}
        return [
            Trial(family, {"family": family, **options}, 0, LABELS[family]) for family in FAMILIES
        ]

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Every cell of the grid that meets the printed condition and lies below L / 2."""
        family = FAMILIES[trial.options["family"]]
        cells = [
            (float(ratio), float(bend))
            for ratio in np.linspace(0.25, 0.51, trial.options["ratios"])
            for bend in np.linspace(0.03, 0.51, trial.options["bends"])
            if printed_weight(1.0, bend, 1.0) <= ratio < sufficient_weight(1.0, bend, 1.0)
        ]
        rows = []
        for done, (ratio, bend) in enumerate(cells):
            context.progress(done, len(cells), f"λ/L {ratio:.2f}, CG/L {bend:.2f}")
            rows.append((float(done), ratio, bend, *_descend(family(ratio, bend), STEPS)))
        names = ("cell", "ratio", "bend", "failed", "horizon")
        curves = {
            name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)
        }
        broken = [row for row in rows if row[3]]
        return Outcome(
            {
                "cells": float(len(rows)),
                "failed": float(len(broken)),
                "highest_ratio": max((row[1] for row in broken), default=0.0),
            },
            curves,
        )

    def table(self, records: Sequence[Record]) -> list[Row]:
        """How many cells fail, and up to which lambda."""
        return [
            Row(
                record.label,
                f"{record.metric('failed'):.0f} of {record.metric('cells'):.0f} cells fail, "
                f"up to λ = {record.metric('highest_ratio'):.2f} L",
                "none may fail",
                1,
                f"eq. 15 is false from some T on: {_horizons(record)}",
            )
            for record in _in_order(records)
        ]

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """The printed and the corrected condition, and the cells that fail between them."""
        figure.set_size_inches(6.5, 5)
        axes = figure.subplots()
        bend = np.linspace(0.0, 0.6, 241)
        printed = np.array([printed_weight(1.0, b, 1.0) for b in bend])
        corrected = np.array([sufficient_weight(1.0, b, 1.0) for b in bend])
        between = printed < corrected
        axes.fill_between(
            bend[between],
            printed[between],
            corrected[between],
            color="0.88",
            lw=0,
            label="false: printed, and not corrected",
        )
        axes.plot(bend, printed, "k-", label="printed: λ ≥ max(CG, L/4)")
        axes.plot(bend, corrected, "k--", label="corrected: λ ≥ max(CG, L)/2")
        single = bend[bend <= 1.0 / 3.0]
        axes.plot(single, (1.0 + single) / 4.0, "k:", label="one branch: λ = (L + CG)/4")
        for record, marker, color in zip(
            _in_order(records), ("x", "."), ("C1", "C0"), strict=False
        ):
            failed = np.array(record.curve("failed")) > 0.0
            axes.scatter(
                np.array(record.curve("bend"))[failed],
                np.array(record.curve("ratio"))[failed],
                s=25,
                marker=marker,
                c=color,
                label=f"a run that cycles {record.label}",
            )
        axes.set(xlabel="CG / L", ylabel="λ / L", xlim=(0.0, 0.6), ylim=(0.2, 0.62))
        axes.legend(loc="upper left", fontsize=7, frameon=False)

    def verdict(self, records: Sequence[Record]) -> str:
        """Whether the printed condition fails, and whether any failure reaches L / 2."""
        failed = sum(record.metric("failed", 0.0) for record in records)
        cells = sum(record.metric("cells", 0.0) for record in records)
        highest = max(record.metric("highest_ratio", 0.0) for record in records)
        if not failed:
            return f"None of {cells:.0f} runs under the printed condition cycles."
        return (
            f"False as printed: {failed:.0f} of {cells:.0f} runs that meet λ ≥ max(CG, L/4) cycle "
            f"for ever, up to λ = {highest:.2f} L; none can from max(CG, L)/2 on, which is proved. "
            "Deterministic runs: no interval."
        )


def _in_order(records: Sequence[Record]) -> list[Record]:
    """One record for each family, the circle first."""
    return sorted(records, key=lambda record: list(FAMILIES).index(record.options["family"]))


def _descend(cycle: Cycle, steps: int) -> tuple[float, float]:
    """Whether the run cycles, and the T from which eq. 15 is then false (0 where it does not)."""
    norms = projected_gradient_descent(
        cycle.manifold, cycle.loss, cycle.start, cycle.weight, steps
    ).gradient_norm
    if norms[-10:].min() < CYCLE * norms[0]:
        return 0.0, 0.0
    return 1.0, float(failing_horizon(cycle, float(norms.min())))


def _horizons(record: Record) -> str:
    """The least and the largest such T of the cells that fail."""
    horizons = [T for T in record.curve("horizon") if T > 0.0]
    return f"{min(horizons):.0f} to {max(horizons):.0f}" if horizons else "none"


register(TheoremOneRegion())
