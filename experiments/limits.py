"""What a learned learning rate loses to the best fixed one, and what closes the gap.

SGD on four small tasks: digits (MLP 64-256-256-10, 60 epochs), Parkinsons (MLP with 100-100, 30
epochs) and the first 5,000 of MNIST and of Fashion-MNIST (MLP 784-100-100-10, 20 epochs). "As in
P22" is a learning rate by one-step lookahead: K = 10, λ_FSD = 1e-3, RMSprop with 0.1, from η = 0.1.
Every variant changes what its name says. The suspects are too few meta-steps, the noise of one
mini-batch, the greed of one step, λ and its schedule, and the meta-optimizer; the last variants
change the step itself.

A variant pays on a task if the 95% interval of its final training loss over that of "as in P22",
paired by seed, lies below 1. The best fixed rate is the best of its grid by the same seeds' mean
training loss, which favours it. No test set has a say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, final

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import apo_core as apo
from experiments.intervals import summary
from experiments.plots import draw_runs, legend_below
from experiments.problems import Problem
from experiments.recipes import SGD, Recipe, proximal_objective
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.small_tasks import TASKS, draw_losses, final_ratio, of_task, plan_tasks, train_task
from experiments.tuning import Method, at_edge, chosen, runs_of

RMSPROP_RATE = 0.1


@final
@dataclass(frozen=True)
class APOVariant(Recipe):
    """SGD whose learning rate APO tunes, with everything that is varied here.

    Attributes:
        lr: the initial η.
        fsd_weight: λ_FSD at first.
        fsd_decay: λ_FSD is multiplied by it at every step.
        interval: K.
        meta: the meta-optimizer.
        meta_lr: its learning rate; for "Rprop" its first step in log η.
        batches: how many mini-batches the meta-gradient is averaged over, each with its own g.
        trust_factor: κ of `apo.ProximalObjective`.
        update_scale: σ, multiplies the step that is taken.
    """

    lr: float = 0.1
    fsd_weight: float = 1e-3
    fsd_decay: float = 1.0
    interval: int = 10
    meta: Literal["RMSprop", "Adam", "Rprop"] = "RMSprop"
    meta_lr: float = RMSPROP_RATE
    batches: int = 1
    trust_factor: float | None = None
    update_scale: float = 1.0

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """APO over `rules.SGD`."""
        rule = apo.rules.SGD(model, lr=self.lr)
        kinds = {"RMSprop": torch.optim.RMSprop, "Adam": torch.optim.Adam}
        optimizer = apo.APO(
            model,
            rule,
            proximal_objective(problem, self.fsd_weight, trust_factor=self.trust_factor),
            torch.optim.Rprop(rule.parameters(), lr=self.meta_lr, step_sizes=(1e-3, 1.0))
            if self.meta == "Rprop"
            else kinds[self.meta](rule.parameters(), lr=self.meta_lr),
            interval=self.interval if self.batches == 1 else NEVER,
            update_scale=self.update_scale,
        )
        if self.batches > 1:
            optimizer.register_step_pre_hook(self._averaged(optimizer, model, problem))
        if self.fsd_decay != 1.0:
            optimizer.register_step_post_hook(self._decayed(optimizer))
        return optimizer

    def _averaged(self, optimizer: apo.APO, model: nn.Module, problem: Problem) -> Any:
        """A meta-step by the mean meta-gradient of fresh mini-batches, every `interval` steps.

        `train` takes one more, an ordinary one, before the first step.
        """

        def meta_step(*args: Any) -> None:
            if optimizer.steps % self.interval:
                return
            params = list(model.parameters())
            kept = [p.grad for p in params]
            optimizer.meta_optimizer.zero_grad()
            for _ in range(self.batches):
                batch, other = problem.batch("curvature"), problem.batch("discrepancy")
                with torch.enable_grad():
                    value = problem.loss(model, batch)
                for p, g in zip(params, torch.autograd.grad(value, params), strict=True):
                    p.grad = g
                optimizer.meta_backward(
                    loss=lambda batch=batch: problem.loss(model, batch),
                    outputs=lambda other=other: problem.outputs(model, other),
                    weight=1 / self.batches,
                )
            optimizer.meta_optimizer.step()
            for p, g in zip(params, kept, strict=True):
                p.grad = g

        return meta_step

    def _decayed(self, optimizer: apo.APO) -> Any:
        def decay(*_: Any) -> None:
            optimizer.objective.fsd_weight *= self.fsd_decay

        return decay

    def text(self) -> str:
        """The initial η."""
        return f"η₀ = {self.lr:.4g}"


NEVER = 10**9  # steps


@final
@dataclass(frozen=True)
class Lookback(Recipe):
    """SGD whose log η descends J after the last `horizon` steps instead of one step ahead.

    θ_t = θ_s − η Σ g over the steps since s, and to first order, with the g held fixed,
    dJ(θ_t)/dlog η = ∇J(θ_t)ᵀ(θ_t − θ_s): a lookahead of `horizon` steps for one gradient of J, on
    `batches` fresh mini-batches.
    """

    lr: float = 0.1
    horizon: int = 20
    batches: int = 4

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """torch.optim.SGD; RMSprop with 0.1 moves log η after every `horizon` steps."""
        base = torch.optim.SGD(model.parameters(), lr=self.lr)
        params = [p for p in model.parameters() if p.requires_grad]
        log_lr = params[0].new_tensor(math.log(self.lr))
        meta = torch.optim.RMSprop([log_lr], lr=RMSPROP_RATE)
        start: list[Tensor] = [p.detach().clone() for p in params]
        steps = 0

        def look_back(*_: Any) -> None:
            nonlocal steps
            steps += 1
            if steps % self.horizon:
                return
            with torch.enable_grad():
                value = torch.stack(
                    [problem.loss(model, problem.batch("discrepancy")) for _ in range(self.batches)]
                ).mean()
            slopes = torch.autograd.grad(value, params)
            moves = [p.detach() - s for p, s in zip(params, start, strict=True)]
            slope = torch.stack([(g * m).sum() for g, m in zip(slopes, moves, strict=True)]).sum()
            if bool(slope.isfinite()):
                log_lr.grad = slope
                meta.step()
                base.param_groups[0]["lr"] = float(log_lr.exp())
            start[:] = [p.detach().clone() for p in params]

        base.register_step_post_hook(look_back)
        return base

    def text(self) -> str:
        """The initial η."""
        return f"η₀ = {self.lr:.4g}"


BASE = "as in P22"
REMEDY = "σ = 1.8, κ = 1.1"
VARIANTS: Mapping[str, Recipe] = {
    BASE: APOVariant(),
    "K = 1": APOVariant(interval=1),
    "4 mini-batches": APOVariant(batches=4),
    "20 steps": Lookback(),
    "λ = 0": APOVariant(fsd_weight=0.0),
    "λ = 0.1": APOVariant(fsd_weight=0.1),
    "λ falls from 0.1": APOVariant(fsd_weight=0.1, fsd_decay=0.99),
    "Adam": APOVariant(meta="Adam"),
    "Rprop": APOVariant(meta="Rprop"),
    "α = 0.02": APOVariant(meta_lr=0.02),
    "κ = 1.1": APOVariant(trust_factor=1.1),
    "σ = 1.8": APOVariant(update_scale=1.8),
    "σ = 1.4, κ = 1.1": APOVariant(update_scale=1.4, trust_factor=1.1),
    REMEDY: APOVariant(update_scale=1.8, trust_factor=1.1),
    "σ = 1.95, κ = 1.1": APOVariant(update_scale=1.95, trust_factor=1.1),
    "σ = 1.8, κ = 1.1, λ = 0": APOVariant(update_scale=1.8, trust_factor=1.1, fsd_weight=0.0),
    "σ = 1.8, κ = 1.1, from 1e-3": APOVariant(update_scale=1.8, trust_factor=1.1, lr=1e-3),
    "σ = 1.8, κ = 1.1, from 10": APOVariant(update_scale=1.8, trust_factor=1.1, lr=10.0),
}
FIXED = Method("best fixed η", tuple(SGD(lr) for lr in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)))


@dataclass(frozen=True)
class Scale:
    """What a preset runs: a share of the epochs, every how many-th variant, seeds of its own."""

    epochs: float
    stride: int = 1
    seeds: int | None = None


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(epochs=0.1, stride=6, seeds=1),
    "default": Scale(epochs=1.0),
    "paper": Scale(epochs=5.0, seeds=10),
}


@final
class Limits(Experiment):
    """Final training loss of every variant over that of the base, on every task."""

    name = "limits"
    title = "What limits a learned learning rate"
    source = "ours; the question is that of P22 section 6.3 and appendix D"
    embedded = False
    datasets = tuple(TASKS)
    scales = MappingProxyType(
        {
            "smoke": "a tenth of the epochs, 1 seed, every 6th variant",
            "default": "60 epochs of digits (5 seeds), 30 of Parkinsons, 20 of 5,000 images (3)",
            "paper": "five times the epochs, 10 seeds (the papers have no such table)",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """Every variant and every fixed rate on every task, with every seed."""
        scale = SCALES[preset]
        methods = [Method(name, (one,)) for name, one in list(VARIANTS.items())[:: scale.stride]]
        return plan_tasks(TASKS, [*methods, FIXED], scale.epochs, seeds or scale.seeds)

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train; "loss" is the training loss."""
        return train_task(trial, context)

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Each variant's final training loss on each task, beside its ratio to the base."""
        rows = []
        for task in TASKS:
            ours = of_task(task, records)
            best = chosen(FIXED, ours, tuning=False)
            entries = [(FIXED.label, best), *VARIANTS.items()]
            for name, one in entries:
                runs = runs_of(one, ours)
                if not runs:
                    continue
                ratio = final_ratio(one, VARIANTS[BASE], ours)
                edge = at_edge(FIXED, best) if one is best else ""
                notes = [f"{ratio} of {BASE}" if ratio else "", edge]
                rows.append(
                    Row(
                        label=f"{task}, {name}" + (f" ({best.text()})" if one is best else ""),
                        ours=summary([run.metric("loss") for run in runs]),
                        paper="–",
                        n=len(runs),
                        note="; ".join(filter(None, notes)),
                    )
                )
        return rows

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Above: every variant's loss beside the best fixed rate's. Below: curves of a few."""
        figure.set_size_inches(14, 10)
        grid = figure.subplots(2, len(TASKS), gridspec_kw={"height_ratios": [1.3, 1]})
        for column, task in enumerate(TASKS):
            ours = of_task(task, records)
            above, below = grid[0][column], grid[1][column]
            best = chosen(FIXED, ours, tuning=False)
            draw_losses(above, VARIANTS, best, ours, named=column == 0)
            above.set(title=f"{task}; lines: {best.text()}", xlabel="training loss")
            for name in (BASE, "20 steps", REMEDY):
                draw_runs(below, runs_of(VARIANTS[name], ours), "loss", name)
            draw_runs(below, runs_of(best, ours), "loss", f"fixed {best.text()}")
            below.set(yscale="log", xlabel="step", ylabel="training loss" if column == 0 else "")
            legend_below(below)

    def verdict(self, records: Sequence[Record]) -> str:
        """What pays where, and what is left of the gap to the best fixed rate."""
        by_task = {task: of_task(task, records) for task in TASKS}
        pays: dict[int, list[str]] = {}
        for name, one in VARIANTS.items():
            ratios = [final_ratio(one, VARIANTS[BASE], ours) for ours in by_task.values()]
            count = sum(ratio is not None and ratio.high < 1 for ratio in ratios)
            if name != BASE and any(ratios):
                pays.setdefault(count, []).append(name)
        sentence = "; ".join(
            f"on {count} of {len(TASKS)} tasks: {', '.join(names)}"
            for count, names in sorted(pays.items(), reverse=True)
            if count
        )
        gaps = []
        for task, ours in by_task.items():
            best = chosen(FIXED, ours, tuning=False)
            before, after = (final_ratio(VARIANTS[name], best, ours) for name in (BASE, REMEDY))
            gaps.append(f"{task}: {before} before, {after} with {REMEDY}")
        return (
            f"Variants that pay {sentence or 'nowhere'}. Training loss over that of the best fixed "
            f"rate (geometric mean of paired ratios, 95% t interval): {'; '.join(gaps)}."
        )


register(Limits())
