"""Why a learned learning rate stays small: the sharpness where it trains, on digits.

On a quadratic the greedy rate along g is gᵀg / gᵀHg, at least 1/λmax, and gradient descent stays
stable below 2/λmax. So the rate that one step prefers follows the sharpness of where training is;
and a larger rate, held, moves training to where the sharpness is smaller (Cohen et al., 2021, the
edge of stability). Here both are measured: λmax of the Hessian of the whole training loss, the
curvature gᵀHg / gᵀg along its gradient, and the rate of the step times λmax.

symbol   here          meaning
η        `step_ratio`  ‖Δθ‖/‖g‖ of the last step: the rate with all that scales it
λmax     `sharpness`   the Hessian's greatest eigenvalue
         `along`       gᵀHg / gᵀg, with g of the whole training set

MLP 64-256-256-10 on 80% of the digits, SGD without momentum: fixed rates, APO as in P22 (λ_FSD =
1e-3, K = 10), and with its steps over-relaxed by σ = 1.8 within a trust region of κ = 1.1, as in
`limits`. The papers have no such figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, final

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.nn.utils import parameters_to_vector

from experiments.digits import STEPS_PER_EPOCH, WIDTHS, digits_problem
from experiments.intervals import Interval, ratio_interval, summary
from experiments.models import mlp
from experiments.plots import draw_runs, legend_below
from experiments.problems import Judged, Supervised
from experiments.recipes import SGD
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.self_tuned import SelfTuned
from experiments.training import train_epochs
from experiments.tuning import Method, plan_grids, runs_of

LANCZOS: dict[str, Any] = {
    "k": 1,
    "which": "LA",
    "ncv": 8,
    "tol": 1e-2,  # relative, of λmax: far below what differs between the runs
    "return_eigenvectors": False,
}

APO = SelfTuned("SGD", trust_factor=None)
RELAXED = SelfTuned("SGD", update_scale=1.8)
METHODS = {
    "fixed η = 0.1": SGD(0.1),
    "fixed η = 0.3": SGD(0.3),
    "fixed η = 1": SGD(1.0),
    "APO": APO,
    "APO, σ = 1.8, κ = 1.1": RELAXED,
}


@dataclass(frozen=True)
class Scale:
    """What a preset runs."""

    epochs: int
    points: int
    seeds: int


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(epochs=1, points=2, seeds=1),
    "default": Scale(epochs=60, points=24, seeds=5),
    "paper": Scale(epochs=300, points=60, seeds=10),
}


def judged_by_sharpness(problem: Supervised) -> Judged:
    """A classification, judged by "sharpness" = λmax and "along" = gᵀHg / gᵀg of its training loss.

    Args:
        problem: of loss "cross_entropy".
    """

    def judge(model: nn.Module) -> dict[str, float]:
        params = [p for p in model.parameters() if p.requires_grad]
        loss = problem.loss(model, problem.train)
        gradient = parameters_to_vector(torch.autograd.grad(loss, params, create_graph=True))

        def product(v: np.ndarray) -> np.ndarray:
            along = torch.from_numpy(v).to(gradient)
            columns = torch.autograd.grad(gradient, params, along, retain_graph=True)
            return parameters_to_vector(columns).double().cpu().numpy()

        g = gradient.detach().double().cpu().numpy()
        shape = (g.size, g.size)
        hessian = LinearOperator(shape, matvec=product, dtype=np.float64)  # type: ignore[call-arg]
        start = np.random.default_rng(0).standard_normal(g.size)
        greatest: Any = eigsh(hessian, v0=start, **LANCZOS)
        return {"sharpness": float(greatest[0]), "along": float(g @ product(g) / (g @ g))}

    return Judged(problem, judge, ("sharpness", "along"))


@final
class Sharpness(Experiment):
    """λmax, the curvature along the gradient and η λmax over steps, for fixed and learned rates."""

    name = "sharpness"
    title = "Digits: the sharpness where a fixed and a learned learning rate train"
    source = "ours; why APO's rate stays below the best fixed one (see `limits`)"
    datasets = ("digits",)
    scales = MappingProxyType(
        {
            "smoke": "1 epoch, 2 points, 1 seed",
            "default": "60 epochs, 24 points, 5 seeds",
            "paper": "300 epochs, 60 points, 10 seeds (the papers have no such figure)",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """Every method with every seed: nothing is chosen."""
        scale = SCALES[preset]
        methods = [Method(name, (one,)) for name, one in METHODS.items()]
        task = {"epochs": scale.epochs, "points": scale.points}
        return plan_grids(methods, task, range(seeds or scale.seeds))

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train on 80% of the digits; the Hessian is that of the mean loss of all of them."""
        problem = digits_problem(context, trial.seed)
        model = mlp(WIDTHS, seed=trial.seed, device=context.device)
        return train_epochs(
            trial,
            context,
            model,
            judged_by_sharpness(problem),
            steps_per_epoch=problem.steps_per_epoch,
            points=trial.options["points"],
        )

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Over the second half of the run: λmax, η and η λmax; the final training loss."""
        return [
            Row(
                label=name,
                ours=f"η λmax {summary([late(run, 'product') for run in runs])}",
                paper="–",
                n=len(runs),
                note=f"λmax {summary([late(run, 'sharpness') for run in runs])}, η "
                f"{summary([late(run, 'step_ratio') for run in runs])}, loss "
                f"{summary([run.metric('loss') for run in runs])}",
            )
            for name, one in METHODS.items()
            if (runs := runs_of(one, records))
        ]

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Training loss, λmax and η λmax over epochs."""
        figure.set_size_inches(14, 5)
        loss, sharpness, product = figure.subplots(1, 3)
        for name, one in METHODS.items():
            runs = [_with_product(run) for run in runs_of(one, records)]
            for axes, curve in ((loss, "loss"), (sharpness, "sharpness"), (product, "product")):
                draw_runs(axes, runs, curve, name, steps_per_unit=STEPS_PER_EPOCH)
        product.axhline(2.0, color="0.5", lw=1, ls=":")
        for axes, label in (
            (loss, "training loss"),
            (sharpness, "λmax of the Hessian"),
            (product, "η λmax (dotted: 2, the limit of stability)"),
        ):
            axes.set(xlabel="epoch", ylabel=label, yscale="log")
            legend_below(axes)

    def verdict(self, records: Sequence[Record]) -> str:
        """λmax of every method over that of APO, and η λmax of each, over the second half."""
        apo = {run.seed: run for run in runs_of(APO, records)}
        parts = []
        for name, one in METHODS.items():
            runs = [run for run in runs_of(one, records) if run.seed in apo]
            if not runs:
                continue
            text = f"{name}: η λmax = {summary([late(run, 'product') for run in runs])}"
            if one != APO:
                text += f", λmax {_ratio(runs, [apo[run.seed] for run in runs])} times APO's"
            parts.append(text)
        return "; ".join(parts or ["No run yet"]) + " (second half, geometric means, 95% t)."


def late(run: Record, curve: str) -> float:
    """The geometric mean of a positive curve over the second half; infinite if it diverged.

    "product" is η λmax. A point where the value is not positive is left out: λmax of a Hessian that
    is negative definite, or a step of length 0.
    """
    if run.status != "finished":
        return math.inf
    values = np.array(_with_product(run).curve(curve)[1:])
    values = values[len(values) // 2 :]
    positive = values[values > 0]
    return float(np.exp(np.log(positive).mean())) if positive.size else math.nan


def _with_product(run: Record) -> Record:
    curves = run.outcome.curves
    product = [
        rate * greatest
        for rate, greatest in zip(curves["step_ratio"], curves["sharpness"], strict=True)
    ]
    return replace(run, outcome=replace(run.outcome, curves={**curves, "product": product}))


def _ratio(ours: Sequence[Record], theirs: Sequence[Record]) -> Interval:
    return ratio_interval(
        [late(run, "sharpness") for run in ours], [late(run, "sharpness") for run in theirs]
    )


register(Sharpness())
