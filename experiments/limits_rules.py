"""Settings of APO for rules with a momentum or a scale of their own, on the tasks of `limits`.

SGDm, RMSprop and Adam, each as the papers run them, in a trust region, and with steps that are σ
times what was looked at. For SGDm (μ = 0.9) P18 tunes η "as if there's no momentum" and applies
momentum on top, so that a gradient moves θ in the end by 1/(1 − μ) = 10 times what was looked at; σ
= 0.1 undoes that, and 0.18 is the over-relaxation of 1.8 which `limits` found for SGD. "buffer"
looks ahead along the momentum buffer instead. Adam looks ahead along its average of gradients; σ
below 1 is tried there for the same reason. Every variant starts from 1e-3, or "from above", with K
= 10 and λ_FSD = 1e-3, beside the best of six fixed rates, which is chosen on the same seeds'
training loss.

Why from above: a greedy rate follows the sharpness, and the sharpness the rate (`sharpness`), so
that where η settles can depend on where it came from.

The papers have no such table: they search λ for every task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

from matplotlib.figure import Figure

from experiments.intervals import summary
from experiments.recipes import SGD, Adam, Recipe, RMSprop
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.self_tuned import MOMENTUM, Rule, SelfTuned
from experiments.small_tasks import TASKS, draw_losses, final_ratio, of_task, plan_tasks, train_task
from experiments.tuning import Method, at_edge, chosen, runs_of

PAPERS = "as in the papers"
TRUST = "κ = 1.1"
SEEDS = 3


def _variants(rule: Rule, *scales: float) -> dict[str, Recipe]:
    relaxed = {f"σ = {scale:g}, {TRUST}": SelfTuned(rule, update_scale=scale) for scale in scales}
    return {PAPERS: SelfTuned(rule, trust_factor=None), TRUST: SelfTuned(rule), **relaxed}


VARIANTS: Mapping[Rule, Mapping[str, Recipe]] = {
    "SGDm": {
        **_variants("SGDm", 0.1, 0.18, 0.3),
        "σ = 0.18": SelfTuned("SGDm", update_scale=0.18, trust_factor=None),
        f"buffer, {TRUST}": SelfTuned("SGDm", lookahead_momentum=True),
        f"σ = 0.18, {TRUST}, from 10": SelfTuned("SGDm", lr=10.0, update_scale=0.18),
    },
    "RMSprop": {
        **_variants("RMSprop", 1.8),
        f"{TRUST}, from 0.1": SelfTuned("RMSprop", lr=0.1),
        f"σ = 1.8, {TRUST}, from 0.1": SelfTuned("RMSprop", lr=0.1, update_scale=1.8),
    },
    "Adam": {
        **_variants("Adam", 0.1, 0.3, 1.8),
        f"{TRUST}, from 0.1": SelfTuned("Adam", lr=0.1),
        f"σ = 1.8, {TRUST}, from 0.1": SelfTuned("Adam", lr=0.1, update_scale=1.8),
    },
}
FIXED: Mapping[Rule, Method] = {
    "SGDm": Method(
        "SGDm",
        tuple(SGD(lr, momentum=MOMENTUM) for lr in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)),
    ),
    "RMSprop": Method("RMSprop", tuple(map(RMSprop, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)))),
    "Adam": Method("Adam", tuple(map(Adam, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)))),
}


@dataclass(frozen=True)
class Scale:
    """What a preset runs: a share of the epochs, every how many-th fixed rate."""

    epochs: float
    seeds: int
    stride: int = 1


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(epochs=0.1, seeds=1, stride=3),
    "default": Scale(epochs=1.0, seeds=SEEDS),
    "paper": Scale(epochs=5.0, seeds=10),
}


@final
class RuleLimits(Experiment):
    """Final training loss of every variant over that of the rule's best fixed rate."""

    name = "limits-rules"
    title = "SGDm, RMSprop and Adam: settings of APO without a search"
    source = "ours; P18 section 5 (momentum), P22 section 6.3"
    embedded = False
    datasets = tuple(TASKS)
    scales = MappingProxyType(
        {
            "smoke": "a tenth of the epochs, 1 seed, 2 fixed rates",
            "default": "60 epochs of digits, 30 of Parkinsons, 20 of 5,000 images, 3 seeds",
            "paper": "five times the epochs, 10 seeds (the papers have no such table)",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """Every variant and fixed rate with every seed on every task."""
        scale = SCALES[preset]
        methods = [
            Method(name, (one,)) for variants in VARIANTS.values() for name, one in variants.items()
        ]
        methods += [Method(one.label, one.grid[:: scale.stride]) for one in FIXED.values()]
        return plan_tasks(TASKS, methods, scale.epochs, seeds or scale.seeds)

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train; "loss" is the training loss."""
        return train_task(trial, context)

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Each variant's final training loss on each task, and its ratio to the best fixed rate."""
        rows = []
        for rule, task, ours in _cells(records):
            best = chosen(FIXED[rule], ours, tuning=False)
            for name, one in {f"best fixed {best.text()}": best, **VARIANTS[rule]}.items():
                runs = runs_of(one, ours)
                if not runs:
                    continue
                ratio = final_ratio(one, best, ours)
                rows.append(
                    Row(
                        label=f"{rule}, {task}: {name}",
                        ours=summary([run.metric("loss") for run in runs]),
                        paper="–",
                        n=len(runs),
                        note=f"{ratio} of the best fixed" if ratio else at_edge(FIXED[rule], best),
                    )
                )
        return rows

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Every variant's losses beside the best fixed rate's: a row a rule, a column a task."""
        figure.set_size_inches(14, 10)
        heights = [len(variants) for variants in VARIANTS.values()]
        panels = figure.subplots(
            len(VARIANTS), len(TASKS), gridspec_kw={"height_ratios": heights}, squeeze=False
        )
        places = {
            (rule, task): panels[row][column]
            for row, rule in enumerate(VARIANTS)
            for column, task in enumerate(TASKS)
        }
        for rule, task, ours in _cells(records):
            axes, best = places[rule, task], chosen(FIXED[rule], ours, tuning=False)
            draw_losses(axes, VARIANTS[rule], best, ours, named=task == next(iter(TASKS)))
            axes.set(title=f"{rule}, {task}\nlines: {best.text()}")
        for axes in panels[-1]:
            axes.set(xlabel="training loss")

    def verdict(self, records: Sequence[Record]) -> str:
        """For each rule, every variant's ratio to the best fixed rate: the worst of the tasks."""
        ratios: dict[tuple[Rule, str], list[float]] = {}
        for rule, _, ours in _cells(records):
            best = chosen(FIXED[rule], ours, tuning=False)
            for name, one in VARIANTS[rule].items():
                if ratio := final_ratio(one, best, ours):
                    ratios.setdefault((rule, name), []).append(ratio.mean)
        parts = [
            f"{rule}, {name}: {min(means):.3g} to {max(means):.3g}"
            for (rule, name), means in ratios.items()
        ]
        return (
            "Training loss over that of the best fixed rate (geometric mean over seeds), from the "
            f"best to the worst of the tasks: {'; '.join(parts) or 'no run yet'}."
        )


def _cells(records: Sequence[Record]) -> list[tuple[Rule, str, list[Record]]]:
    """(rule, task, the task's records) where a fixed rate of the rule has run."""
    return [
        (rule, task, ours)
        for rule, method in FIXED.items()
        for task in TASKS
        if any(runs_of(one, ours := of_task(task, records)) for one in method.grid)
    ]


register(RuleLimits())
