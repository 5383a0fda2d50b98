"""MNIST MLP: {η}, {η, ρ}, {η, ρ, ε} of RMSprop learned, and a learning rate for each layer.

RMSprop-APO starts at η = 3e-4, ρ = ½, ε = 1e-8, with P18's best λ for this network, 1e-5; SGD-APO
at 0.1 with its best, 1e-3. For one rate a layer P18 found a meta-learning rate of 0.001 and more
frequent meta-updates useful, and does not say how frequent: here every step (K = 1), beside the
default setting (0.1, K = 10) and one between them (0.01, K = 5). Several hyperparameters are
learned without and with a trust factor of 1.1, which P18 does not have.

Differs from the paper: `default` sees 5,000 examples, for 20 epochs where one learning rate is
learned and for 10 where each layer has its own: a meta-step at every step makes a run three times
as long. P18 shows curves alone; the numbers here are final training losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.apo_recipes import APOSGD, APORMSprop
from experiments.comparison import loss_ratio
from experiments.intervals import summary
from experiments.paper.adaptation import draw_adaptation, layers_of
from experiments.paper.mnist_mlp import run_mlp, steps_per_epoch, task
from experiments.plots import draw_runs, legend_below
from experiments.recipes import Recipe, RMSprop
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.tuning import Method, plan_grids, runs_of

SGD_WEIGHT = 1e-3  # P18 section 5.2.1: the best λ
RMSPROP_WEIGHT = 1e-5
SETTINGS = ((0.1, 10), (0.01, 5), (0.001, 1))  # meta-learning rate and K

FIXED = Method("RMSprop", (RMSprop(1e-4), RMSprop(3e-4)))
NAMES = {"lr": "{η}", "lr+rho": "{η, ρ}", "lr+rho+eps": "{η, ρ, ε}"}
TRUST_FACTORS = (None, 1.1)
SEVERAL = {
    (learn, factor): APORMSprop(3e-4, RMSPROP_WEIGHT, learn=learn, trust_factor=factor)
    for factor in TRUST_FACTORS
    for learn in ("lr", "lr+rho", "lr+rho+eps")
}
ONE_RATE = SEVERAL["lr", None]
LEARNED = Method("RMSprop-APO", tuple(SEVERAL.values()), "self-tuning")
GLOBAL_SGD = Method("SGD-APO", (APOSGD(0.1, SGD_WEIGHT),), "self-tuning")
GLOBAL_RMSPROP = Method("RMSprop-APO, a rate", (ONE_RATE,), "self-tuning")
LAYERED_SGD = Method(
    "SGD-APO, per layer",
    tuple(
        APOSGD(0.1, SGD_WEIGHT, meta_lr=meta_lr, interval=interval, per_layer=True)
        for meta_lr, interval in SETTINGS
    ),
    "self-tuning",
)
LAYERED_RMSPROP = Method(
    "RMSprop-APO, per layer",
    tuple(
        APORMSprop(3e-4, RMSPROP_WEIGHT, meta_lr=meta_lr, interval=interval, per_layer=True)
        for meta_lr, interval in SETTINGS
    ),
    "self-tuning",
)
LAYERED = (LAYERED_SGD, LAYERED_RMSPROP)


@dataclass(frozen=True)
class Scale:
    """What a preset runs: panel (a) with one learning rate, panels (b) and (c) with three."""

    several: dict[str, Any]
    layered: dict[str, Any]
    seeds: int
    stride: int = 1  # every how many-th setting of the per-layer grids


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(
        several=task(examples=600, epochs=4, points=4) | {"panel": "several"},
        layered=task(examples=600, epochs=4, points=4) | {"panel": "layers"},
        seeds=1,
        stride=2,
    ),
    "default": Scale(
        several=task(examples=5_000, epochs=20, points=20) | {"panel": "several"},
        layered=task(examples=5_000, epochs=10, points=20) | {"panel": "layers"},
        seeds=2,
    ),
    "paper": Scale(
        several=task(examples=60_000, epochs=100, points=100) | {"panel": "several"},
        layered=task(examples=60_000, epochs=100, points=100) | {"panel": "layers"},
        seeds=3,
    ),
}


@final
class SeveralHyperparameters(Experiment):
    """Training loss with one, two and three hyperparameters learned, and with rates for layers."""

    name = "p18-fig7"
    title = "MNIST MLP: several hyperparameters of RMSprop, and per-layer learning rates"
    source = "P18 Figures 7 (a, b, c) and 8, appendix C"
    claims = ("p18-fig7", "p18-fig8")
    embedded = False
    datasets = ("mnist",)
    scales = MappingProxyType(
        {
            "smoke": "600 examples, 4 epochs, two settings of the per-layer rates, 1 seed",
            "default": "5,000 examples, 20 epochs (10 with per-layer rates), 2 seeds",
            "paper": "60,000 examples, 100 epochs, 3 seeds",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """Every recipe with every seed: nothing is chosen."""
        scale = SCALES[preset]
        counted = range(seeds or scale.seeds)
        layered = [Method(one.label, one.grid[:: scale.stride]) for one in LAYERED]
        return [
            *plan_grids([FIXED, LEARNED], scale.several, counted),
            *plan_grids([GLOBAL_SGD, GLOBAL_RMSPROP, *layered], scale.layered, counted),
        ]

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train the MLP."""
        return run_mlp(trial, context)

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Final training loss of every recipe."""
        several, layered = _panel("several", records), _panel("layers", records)
        rows = [_row("RMSprop", one, several) for one in FIXED.grid]
        rows += [
            _row(f"RMSprop-APO, {NAMES[learn]}", one, several)
            for (learn, _), one in SEVERAL.items()
        ]
        for method in (GLOBAL_SGD, LAYERED_SGD, GLOBAL_RMSPROP, LAYERED_RMSPROP):
            rows += [_row(method.label, one, layered) for one in method.grid]
        return [row for row in rows if row.n]

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Above the losses and rates of Figure 7, below ρ, ε (Figure 8) and the layers' rates."""
        figure.set_size_inches(13, 11)
        panels = figure.subplots(2, 3).ravel()
        several, layered = _panel("several", records), _panel("layers", records)
        loss, layer_loss, sgd_rates, rho, eps, rmsprop_rates = panels
        for one in FIXED.grid:
            _draw_loss(loss, f"RMSprop, {one.text()}", one, several)
        for (learn, factor), one in SEVERAL.items():
            label = NAMES[learn] + (f", κ = {factor:g}" if factor is not None else "")
            _draw_loss(loss, f"RMSprop-APO, {label}", one, several)
            for axes, curve in ((rho, "rho"), (eps, "eps")):
                draw_adaptation(axes, runs_of(one, several), curve, label)
        for method in (GLOBAL_SGD, GLOBAL_RMSPROP, *LAYERED):
            for one in method.grid:
                _draw_loss(layer_loss, f"{method.label}, {one.text()}", one, layered)
        for axes, method in ((sgd_rates, LAYERED_SGD), (rmsprop_rates, LAYERED_RMSPROP)):
            _draw_layers(axes, method.grid[-1], layered)
            axes.set(title=f"{method.label}, {method.grid[-1].text()}")
        for axes in panels:
            axes.set(xlabel="step" if axes in (rho, eps, sgd_rates, rmsprop_rates) else "epoch")
            legend_below(axes)

    def verdict(self, records: Sequence[Record]) -> str:
        """What ρ and ε add to η, and what the layers' rates add to one, by paired ratios."""
        several, layered = _panel("several", records), _panel("layers", records)
        parts = [
            f"RMSprop-APO with {NAMES[learn]} ({one.text()}) ends at "
            f"{loss_ratio(one, SEVERAL['lr', factor], several)} the training loss with {{η}}"
            f"{_ends(one, several)}"
            for (learn, factor), one in SEVERAL.items()
            if learn != "lr"
        ]
        for method, single in ((LAYERED_SGD, GLOBAL_SGD), (LAYERED_RMSPROP, GLOBAL_RMSPROP)):
            parts += [
                f"{method.label} ({one.text()}) at {loss_ratio(one, single.grid[0], layered)} that "
                "of one rate"
                for one in method.grid
                if runs_of(one, layered)
            ]
        return (
            "; ".join(parts) + " (geometric mean of paired ratios, 95% t interval). P18 says that "
            "ρ and ε can stabilize training, and that layers need a smaller meta-learning rate "
            "and more frequent meta-updates."
        )


def _panel(panel: str, records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.options["panel"] == panel]


def _row(label: str, one: Recipe, records: Sequence[Record]) -> Row:
    runs = runs_of(one, records)
    losses = [run.metric("loss") for run in runs]
    return Row(
        label=f"{label}, {one.text()}",
        ours=f"loss {summary(losses)}" if runs else "–",
        paper="figure only",
        n=len(runs),
        note=_ends(one, records).strip(" ()"),
    )


def _ends(one: Recipe, records: Sequence[Record]) -> str:
    """Where ρ and ε end, by the seeds: " (ρ ends at 0.48 … 0.5)"."""
    texts = []
    for letter, curve in (("ρ", "rho"), ("ε", "eps")):
        ends = [r.curve(curve)[-1] for r in runs_of(one, records) if curve in r.outcome.curves]
        if ends:
            texts.append(f"{letter} ends at {min(ends):.3g} … {max(ends):.3g}")
    return f" ({', '.join(texts)})" if texts else ""


def _draw_loss(axes: Axes, label: str, one: Recipe, records: Sequence[Record]) -> None:
    if runs := runs_of(one, records):
        unit = steps_per_epoch(runs[0].options)
        draw_runs(axes, runs, "loss", label, steps_per_unit=unit)
    axes.set(ylabel="training loss", yscale="log")


def _draw_layers(axes: Axes, one: Recipe, records: Sequence[Record]) -> None:
    runs = runs_of(one, records)
    for layer in layers_of(runs, "learning_rate"):
        draw_adaptation(axes, runs, f"learning_rate/{layer}", f"layer {layer}")
    axes.set(ylabel="learning rate", yscale="log")


register(SeveralHyperparameters())
