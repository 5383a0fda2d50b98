"""The exact proximal step on one datum: WSD alone, FSD alone, both.

A model of one input is fitted to a curve; then one datum, off the curve by 1, is shown to it, and
the objective of P22 eq. 3 is minimized exactly (the oracle's certified minimizer), with the squared
error as loss and as output-space divergence, and x~ uniform over the model's domain.

* tanh network: 1-H-1, whose hidden units' kinks are spread over the domain.
* cosine features: linear in theta, f = sum_k theta_k cos(k pi (x + 1) / 2) / (k + 1), k < H. There
  the step is a kernel phi(x)^T (lambda_FSD G + lambda_WSD I)^-1 phi(x_0): WSD alone leaves
  the model's own broad kernel, FSD alone a Dirichlet kernel, whose width 2 / H is the model's
  resolution, both something between.

With lambda_WSD = 0 the minimizer need not exist (what no x~ sees may grow without bound), so "FSD
alone" keeps a trace of WSD, 1e-4 of lambda_FSD. P22 gives neither the model nor the weights of its
figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import NamedTuple, final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from reference import (
    MLP,
    Batch,
    Linear,
    MetaObjective,
    Network,
    Problem,
    SquaredError,
    SquaredEuclidean,
    exact_step,
)
from reference.arrays import Array

SEED = 0  # of the tanh network's initial weights
DATUM, SURPRISE = 0.3, 1.0  # x_0, and t - f(x_0)
NEAR, FAR = 0.15, 0.5  # |x - x_0| of what counts as near (up to) and far (from)
FSD_GRID = ((2.0 * np.arange(160) + 1.0) / 160.0 - 1.0)[:, None]  # x~: midpoints
PLOT_GRID = np.linspace(-1.0, 1.0, 401)[:, None]

# lambda_WSD / lambda_FSD where both are positive
RATIOS = {"FSD": 1e-4, "both": 0.1}
WEIGHTS = {
    "WSD": (10.0, 3.0, 1.0, 0.3, 0.1),
    "FSD": (100.0, 30.0, 10.0, 3.0, 1.0),
    "both": (100.0, 30.0, 10.0, 3.0, 1.0),
}
TERMS = {"WSD": "WSD alone", "FSD": "FSD alone", "both": "WSD and FSD"}
PANELS = {
    "WSD": "WSD alone, λ = λ_WSD",
    "FSD": "FSD alone, λ = λ_FSD",
    "both": "WSD and FSD, λ = λ_FSD = 10 λ_WSD",
}
COSINES, TANH = "cosine features", "tanh network"


@dataclass(frozen=True)
class Scale:
    """Widths of the models, and every how many-th weight."""

    widths: dict[str, tuple[int, ...]]
    stride: int = 1


SCALES: dict[Preset, Scale] = {
    "smoke": Scale({COSINES: (16,), TANH: (6,)}, stride=2),
    "default": Scale({COSINES: (32, 128), TANH: (6, 12)}),
    "paper": Scale({COSINES: (32, 64, 128), TANH: (6, 12, 24)}),
}


class Fitted(NamedTuple):
    """A model that fits the curve."""

    network: Network
    theta: Array

    def inputs(self, x: Array) -> Array:
        """What the network reads for x (N, 1)."""
        if isinstance(self.network, MLP):
            return x
        k = np.arange(self.network.input_size)
        return np.cos(0.5 * np.pi * k * (x + 1.0)) / (k + 1.0)

    def outputs(self, theta: Array, x: Array) -> Array:
        """f(x, theta), (N,)."""
        return self.network.outputs(theta, self.inputs(x))[:, 0]


def curve(x: Array) -> Array:
    """What the model is fitted to, (N, 1)."""
    return 0.7 * np.sin(3.0 * x)


@cache
def fitted(model: str, width: int) -> Fitted:
    """The model after a proximal step on the whole curve, from its initial weights."""
    if model == COSINES:
        start = Fitted(Linear(width, 1, bias=False), np.zeros(width))
    else:
        rng = np.random.default_rng(SEED)
        slopes = 3.0 * rng.choice([-1.0, 1.0], width) * rng.uniform(0.5, 1.5, width)
        kinks = np.linspace(-1.0, 1.0, width)
        head = rng.standard_normal(width) / np.sqrt(width)
        start = Fitted(
            MLP([1, width, 1]), np.concatenate([slopes, -slopes * kinks, head, np.zeros(1)])
        )
    point = _step(start, Batch(start.inputs(FSD_GRID), curve(FSD_GRID)), 0.0, 1e-4)
    return Fitted(start.network, point)


def steps(model: Fitted, weights: Sequence[tuple[float, float]]) -> list[Array]:
    """The exact steps on the datum for each (lambda_FSD, lambda_WSD), each from the one before.

    Raises:
        RuntimeError: a minimizer is not certified.
    """
    x = np.array([[DATUM]])
    batch = Batch(model.inputs(x), model.outputs(model.theta, x)[:, None] + SURPRISE)
    found: list[Array] = []
    for fsd, wsd in weights:
        found.append(_step(model, batch, fsd, wsd, start=found[-1] if found else None))
    return found


def _step(model: Fitted, batch: Batch, fsd: float, wsd: float, start: Array | None = None) -> Array:
    objective = MetaObjective(Problem(model.network, SquaredError()), SquaredEuclidean(), fsd, wsd)
    point = exact_step(objective, model.theta, batch, model.inputs(FSD_GRID), start)
    if not point.certified:
        raise RuntimeError(
            f"`weights` must give a certified minimizer, got {point.kind} at lambda_FSD = {fsd:g} "
            f"and lambda_WSD = {wsd:g}; raise `wsd`."
        )
    return point.u


def reach(change: Array, at: float) -> dict[str, float]:
    """How far the change of the function on the plot's grid reaches, in units of that at x_0.

    Args:
        change: on `PLOT_GRID`, (N,).
        at: the change at x_0.
    """
    distance = np.abs(PLOT_GRID[:, 0] - DATUM)
    relative = change / at
    below = distance[relative < 0.5]
    return {
        "at": at,
        "near": float(np.sqrt(np.mean(relative[distance <= NEAR] ** 2))),
        "far": float(np.sqrt(np.mean(relative[distance >= FAR] ** 2))),
        # the domain's end where the change never halves
        "half_width": float(below.min() if below.size else distance.max()),
    }


@final
class ProximalStep(Experiment):
    """The function before and after the exact proximal step on one datum."""

    name = "p22-fig1"
    title = "The exact proximal step on one datum: WSD alone, FSD alone, both"
    source = "P22 Figure 1, section 3.1"
    claims = ("p22-fig1",)
    scales = MappingProxyType(
        {
            "smoke": "16 cosine features and 6 hidden units, every second weight",
            "default": "32 and 128 cosine features, 6 and 12 hidden units; 5 weights a panel",
            "paper": "the same with 64 features and 24 hidden units (the paper gives no model)",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """A trial for each model and panel. `seeds` is idle: the steps are deterministic."""
        scale = SCALES[preset]
        return [
            Trial(
                name=f"{model.replace(' ', '-')}-{width}-{terms}",
                options={
                    "model": model,
                    "width": width,
                    "terms": terms,
                    "weights": list(WEIGHTS[terms][:: scale.stride]),
                },
                seed=SEED,
                label=f"{model}, width {width}, {TERMS[terms]}",
            )
            for model, widths in scale.widths.items()
            for width in widths
            for terms in TERMS
        ]

    def run(self, trial: Trial, context: Context) -> Outcome:
        """The steps of one panel, from the largest weight to the smallest."""
        terms = trial.options["terms"]
        weights = [
            (0.0, weight) if terms == "WSD" else (weight, RATIOS[terms] * weight)
            for weight in trial.options["weights"]
        ]
        model = fitted(trial.options["model"], trial.options["width"])
        found = steps(model, weights)
        before = model.outputs(model.theta, PLOT_GRID)
        after = [model.outputs(u, PLOT_GRID) for u in found]
        datum = np.array([[DATUM]])
        at = model.outputs(found[-1], datum) - model.outputs(model.theta, datum)
        curves = {"x": PLOT_GRID[:, 0], "before": before}
        curves |= {f"after {k}": values for k, values in enumerate(after)}
        return Outcome(
            reach(after[-1] - before, float(at[0])),
            {name: [float(value) for value in values] for name, values in curves.items()},
        )

    def table(self, records: Sequence[Record]) -> list[Row]:
        """The reach of the change at the smallest weight of each panel."""
        return [
            Row(
                record.label,
                f"near/at {record.metric('near'):.2f}, far/at {record.metric('far'):.3f}",
                "figure only",
                1,
                f"change at the datum {record.metric('at'):.2f} of {SURPRISE:g}, half-width "
                f"{record.metric('half_width'):.3f}, λ = {record.options['weights'][-1]:g}",
            )
            for record in _ordered(records)
        ]

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """A row for the narrowest of each model (its spike can be seen), a column a panel."""
        narrowest = {
            model: min(r.options["width"] for r in records if r.options["model"] == model)
            for model in dict.fromkeys(r.options["model"] for r in _ordered(records))
        }
        figure.set_size_inches(11, 3.4 * len(narrowest) + 0.4)
        panels = figure.subplots(len(narrowest), 3, sharex=True, sharey=True, squeeze=False)
        for row, (model, width) in zip(panels, narrowest.items(), strict=True):
            for axes, terms in zip(row, TERMS, strict=True):
                for record in records:
                    options = record.options
                    if (options["model"], options["width"], options["terms"]) == (
                        model,
                        width,
                        terms,
                    ):
                        _draw_panel(axes, record)
                axes.set_title(f"{PANELS[terms]}\n{model}, width {width}", fontsize=9)
            row[0].set_ylabel("f(x)")
        for axes in panels[-1]:
            axes.set_xlabel("x")

    def verdict(self, records: Sequence[Record]) -> str:
        """Each claim of the figure as a comparison of panels, model by model."""
        by_panel = {
            (r.options["model"], r.options["width"], r.options["terms"]): r for r in records
        }
        models = sorted({(model, width) for model, width, _ in by_panel})

        def ratios(first: str, second: str, metric: str) -> list[float]:
            return [
                by_panel[*one, first].metric(metric) / by_panel[*one, second].metric(metric)
                for one in models
            ]

        far, near = ratios("WSD", "both", "far"), ratios("FSD", "both", "near")
        kept = [by_panel[*one, "both"].metric("near") for one in models]
        narrow = ratios("FSD", "both", "half_width")
        return (
            f"WSD alone changes the function far from the datum {_span(far)} times as much as both "
            f"do (more in {sum(x > 1 for x in far)} of {len(far)} models: global); FSD alone "
            f"passes on {_span(near)} times as much to the neighbours as both do, with a "
            f"half-width {_span(narrow)} times theirs (less in {sum(x < 1 for x in near)} of "
            f"{len(near)}: a spike); with both the neighbours get {_span(kept)} of the datum's "
            "change. Deterministic: no interval."
        )


def _ordered(records: Sequence[Record]) -> list[Record]:
    """By model, width and panel."""
    panels = list(TERMS)
    return sorted(
        records,
        key=lambda r: (r.options["model"], r.options["width"], panels.index(r.options["terms"])),
    )


PLAIN = {"lw": 1.4, "ls": "-", "marker": ""}


def _draw_panel(axes: Axes, record: Record) -> None:
    """Red to blue as the weight falls, darker as well: the order survives without colour."""
    x, before = record.curve("x"), np.array(record.curve("before"))
    weights = record.options["weights"]
    colors = matplotlib.colormaps["plasma"](np.linspace(0.66, 0.0, len(weights)))
    axes.axvspan(DATUM - NEAR, DATUM + NEAR, color="0.93", lw=0)
    for k, (weight, color) in enumerate(zip(weights, colors, strict=True)):
        axes.plot(x, record.curve(f"after {k}"), color=color, **PLAIN, label=f"λ = {weight:g}")
    axes.plot(x, before, color="black", lw=1.2, ls="--", marker="", label="before")
    at = float(np.interp(DATUM, x, before))
    axes.plot([DATUM], [at + SURPRISE], "o", color="black", ms=5, zorder=5, label="datum")
    axes.legend(fontsize=6, loc="upper left", frameon=False)


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2g} to {max(values):.2g}"


register(ProximalStep())
