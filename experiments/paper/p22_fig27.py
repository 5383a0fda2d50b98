"""LeNet on CIFAR-10: APO-Precond over λ_WSD and λ_FSD, beside SGDm, Adam and KFAC.

Figure 27's ablation is over the grid of P22 appendix B.4 for networks without batch normalization,
λ_FSD in {0.3, 0.1} and λ_WSD in {3, 1, 0.3, 0.1}: every cell with one seed on the tuning part,
judged on 5,000 images held out of the training set. Table 2's LeNet row: each method's recipe with
the lowest validation error is trained again on both parts with other seeds, and the test set is
looked at then, once. Batches of 128, rates (of APO the scale of its steps) divided by 5 at 30%, 60%
and 80% of the steps, eight recipes for each method.

Differs from the paper: LeNet in both, where Figure 27 has AlexNet; 5e-4 of weight decay for all,
where it is searched too. In `default` 10,000 images (15,000 for the final runs), 15 epochs and no
crops or flips, so that accuracies are not comparable with the paper's; Adam's meta-rate is larger,
since there are 120 meta-steps where the paper has 7,000, the warm-up is shorter in proportion, and
P starts at 0.1 I, the effective step of SGDm at 0.01. KFAC samples its output gradients, and
rebuilds its factors every 20 steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

import torch
from matplotlib.figure import Figure

from experiments import recipes
from experiments.comparison import costs
from experiments.data.dataset import first
from experiments.images import Augmented, standardized_images
from experiments.intervals import difference_interval, summary
from experiments.models import lenet
from experiments.plots import draw_runs, legend_below
from experiments.problems import Problem, Regularized, Supervised
from experiments.recipes import SGD, Adam, APOPrecond, Recipe
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.sampled_kfac import KFACSampled
from experiments.training import train
from experiments.tuning import (
    FIRST_TUNING_SEED,
    Method,
    at_edge,
    mean_loss,
    plan_grids,
    runs_of,
    tried,
    union,
)

BATCH_SIZE = 128
HELD_OUT = 5_000
POINTS = 5  # of a curve, beside its first
WEIGHT_DECAY = 5e-4
FSD_WEIGHTS = (0.3, 0.1)
WSD_WEIGHTS = (3.0, 1.0, 0.3, 0.1)
PAPER = {"SGDm": 75.73, "Adam": 73.41, "KFAC": 76.63, "APO-Precond": 77.42}  # P22 Table 2, %


def _apo(meta_lrs: Sequence[float], initial: Sequence[float], warmup_steps: int) -> Method:
    """APO-Precond over P22's weights; SGDm with 0.01 moves θ in the warm-up."""
    return Method(
        "APO-Precond",
        tuple(
            APOPrecond(
                initial_lr,
                meta_lr=meta_lr,
                fsd_weight=fsd,
                wsd_weight=wsd,
                warmup_steps=warmup_steps,
                warmup_lr=0.01,
            )
            for meta_lr in meta_lrs
            for initial_lr in initial
            for fsd in FSD_WEIGHTS
            for wsd in WSD_WEIGHTS
        ),
    )


def _kfac(rates: Sequence[float], dampings: Sequence[float], interval: int) -> Method:
    grid = [KFACSampled(lr, damping, interval=interval) for lr in rates for damping in dampings]
    return Method("KFAC", tuple(grid))


def _rates(sgdm: Sequence[float], adam: Sequence[float]) -> list[Method]:
    return [
        Method("SGDm", tuple(SGD(lr, momentum=0.9) for lr in sgdm)),
        Method("Adam", tuple(Adam(lr) for lr in adam)),
    ]


@dataclass(frozen=True)
class Scale:
    """What a preset runs; `examples` and `held_out` are the tuning part and the validation part."""

    methods: tuple[Method, ...]
    examples: int
    held_out: int
    epochs: int
    seeds: int
    augment: bool = False


SHORT = (
    *_rates(
        sgdm=(0.1, 0.05, 0.03, 0.02, 0.01, 0.005, 0.003, 0.001),
        adam=(1e-2, 5e-3, 3e-3, 2e-3, 1e-3, 5e-4, 3e-4, 1e-4),
    ),
    _kfac((0.03, 0.01, 0.003, 0.001), (1e-2, 1e-3), interval=20),
    _apo((3e-3,), (0.1,), warmup_steps=60),
)
SCALES: dict[Preset, Scale] = {
    "smoke": Scale(
        tuple(Method(one.label, one.grid[::4]) for one in SHORT),
        examples=128,
        held_out=64,
        epochs=3,
        seeds=1,
    ),
    "default": Scale(SHORT, examples=10_000, held_out=HELD_OUT, epochs=15, seeds=2),
    # The grids of P22 appendix B.4, section 6.1; it lists Adam's 3e-4 twice.
    "paper": Scale(
        (
            *_rates(
                sgdm=(0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001),
                adam=(3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4),
            ),
            _kfac(
                (0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001, 0.00003, 0.00001),
                (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4),
                interval=10,
            ),
            _apo((1e-4, 3e-5), (1.0,), warmup_steps=3_000),
        ),
        examples=45_000,
        held_out=HELD_OUT,
        epochs=200,
        seeds=3,
        augment=True,
    ),
}


METHODS = union(scale.methods for scale in SCALES.values())
APO = METHODS[-1]


def decayed(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.Optimizer:
    """The same optimizer, its rate divided by 5 after 30%, 60% and 80% of the steps.

    Of an APO it is the scale of the steps taken. Source: P22 section 6.2.3: 60, 120, 160 of 200
    epochs.
    """
    milestones = [round(share * steps) for share in (0.3, 0.6, 0.8)]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    return optimizer


def best_of(method: Method, records: Sequence[Record]) -> Recipe:
    """The recipe with the lowest mean validation error over the tuning seeds."""

    def error(one: Recipe) -> float:
        return mean_loss(runs_of(one, records, tuning=True), "validation")

    return min(method.grid, key=error)


@final
class LeNetPreconditioners(Experiment):
    """Validation error over λ; test accuracy of each method's chosen recipe."""

    name = "p22-fig27"
    title = "LeNet on CIFAR-10: APO-Precond over λ_FSD and λ_WSD, beside SGDm, Adam, KFAC"
    source = "P22 Figure 27, appendix I.1; Table 2 (LeNet), section 6.2.3, appendix B.4"
    claims = ("p22-fig27", "p22-tab2")
    embedded = False
    datasets = ("cifar-10",)
    scales = MappingProxyType(
        {
            "smoke": "3 epochs of 128 images, two recipes for each method, 1 seed",
            "default": "15 epochs of 10,000 images (15,000 at last), 8 recipes each, 2 seeds",
            "paper": "200 epochs of 45,000 (50,000), cropped and flipped, B.4's grids, 3 seeds",
        }
    )

    edges: Mapping[tuple[Preset, str], str] = MappingProxyType(
        {
            **{("paper", method.label): "the grid is the paper's as printed" for method in METHODS},
            ("default", APO.label): "the grid of λ_WSD is the paper's as printed",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """The grids with one tuning seed; then each method's best, on both parts."""
        scale = SCALES[preset]
        task: dict[str, Any] = {
            "examples": scale.examples,
            "held_out": scale.held_out,
            "epochs": scale.epochs,
            "augment": scale.augment,
        }
        trials = plan_grids(scale.methods, task, [FIRST_TUNING_SEED])
        done = {record.trial.name for record in records}
        if all(one.name in done for one in trials):
            best = [Method(one.label, (best_of(one, records),)) for one in scale.methods]
            final = {
                **task,
                "examples": scale.examples + scale.held_out,
                "held_out": 0,
            }
            trials += plan_grids(best, final, range(seeds or scale.seeds))
        return trials

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train on the first images; judge on those held out ("validation") or on the test set."""
        options = trial.options
        data = context.load("cifar-10")
        held_out = options["held_out"]
        train_part, judged = standardized_images(
            first(data.train, options["examples"]),
            first(data.train, held_out, start=options["examples"]) if held_out else data.test,
        )
        problem: Problem = Supervised(
            train_part,
            judged,
            "cross_entropy",
            batch_size=BATCH_SIZE,
            seed=trial.seed,
            device=context.device,
        )
        steps = options["epochs"] * problem.steps_per_epoch
        if options["augment"]:
            problem = Augmented(problem, trial.seed)
        problem = Regularized(problem, WEIGHT_DECAY)
        model = lenet(seed=trial.seed, device=context.device)
        outcome = train(
            model,
            decayed(recipes.recipe(options).build(model, problem), steps),
            problem,
            steps=steps,
            record_every=-(-steps // POINTS),
            progress=context.progress,
        )
        return _named(outcome, "validation" if held_out else "test")

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Test accuracy of each method's choice; validation accuracy of every cell over λ."""
        rows = []
        for method in METHODS:
            best = best_of(method, records)
            runs, grid = runs_of(best, records), tried(method, records)
            notes = [f"best of {len(grid.grid)} by validation: {best.text()}", at_edge(grid, best)]
            rows.append(
                Row(
                    label=method.label,
                    ours=f"test accuracy {_accuracy(runs, 'test')}" if runs else "–",
                    paper=f"{PAPER[method.label]:.2f} %",
                    n=len(runs),
                    note="; ".join(note for note in notes if note),
                    costs=costs(runs),
                )
            )
        for one in APO.grid:
            if runs := runs_of(one, records, tuning=True):
                ours = f"validation accuracy {_accuracy(runs, 'validation')}"
                rows.append(Row(f"APO-Precond, {one.text()}", ours, "figure only", len(runs)))
        return rows

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Training loss over steps: all λ; each method's choice, with its test error."""
        figure.set_size_inches(10, 10)
        panels = figure.subplots(2, 2)
        for one in tried(APO, records).grid:
            runs = runs_of(one, records, tuning=True)
            for axes, curve in zip(panels[0], ("loss", "validation"), strict=True):
                draw_runs(axes, runs, curve, one.text())
        for method in METHODS:
            best = best_of(method, records)
            for axes, curve in zip(panels[1], ("loss", "test"), strict=True):
                draw_runs(axes, runs_of(best, records), curve, f"{method.label}: {best.text()}")
        for row, judged in zip(panels, ("validation error", "test error"), strict=True):
            for axes, label in zip(row, ("training loss", judged), strict=True):
                axes.set(xlabel="step", ylabel=label, yscale="log")
                legend_below(axes)
        figure.subplots_adjust(hspace=0.6)

    def verdict(self, records: Sequence[Record]) -> str:
        """The spread of validation accuracy over λ; APO-Precond's test accuracy beside others'."""
        cells = [runs for one in APO.grid if (runs := runs_of(one, records, tuning=True))]
        finished = [100 * (1 - mean_loss(runs, "validation")) for runs in cells if _finished(runs)]
        parts = [
            f"Over {len(cells)} cells of λ_FSD and λ_WSD, {len(cells) - len(finished)} diverge"
            + (
                f", and the validation accuracy of the others lies between {min(finished):.1f} and "
                f"{max(finished):.1f} %"
                if finished
                else ""
            )
        ]
        ours = {run.seed: run for run in runs_of(best_of(APO, records), records)}
        for method in METHODS[:-1]:
            theirs = [run for run in runs_of(best_of(method, records), records) if run.seed in ours]
            if theirs:
                points = difference_interval(
                    [-100 * ours[run.seed].metric("test") for run in theirs],
                    [-100 * run.metric("test") for run in theirs],
                )
                parts.append(
                    f"APO-Precond is {points} points of test accuracy from {method.label} "
                    f"(P22: {PAPER['APO-Precond'] - PAPER[method.label]:+.2f})"
                )
        return "; ".join(parts) + ". Paired by seed, 95% t intervals."


def _named(outcome: Outcome, judged: str) -> Outcome:
    """The outcome with the error on the judged part under its own name, not always "test"."""
    metrics = {judged if name == "test" else name: v for name, v in outcome.metrics.items()}
    curves = {judged if name == "test" else name: v for name, v in outcome.curves.items()}
    return Outcome(metrics, curves)


def _finished(runs: Sequence[Record]) -> bool:
    return all(run.status == "finished" for run in runs)


def _accuracy(runs: Sequence[Record], judged: str) -> str:
    """In percent; what diverged has none."""
    if not _finished(runs):
        return f"none: {sum(run.status != 'finished' for run in runs)} of {len(runs)} diverged"
    return f"{summary([100 * (1 - run.metric(judged)) for run in runs], '.2f')} %"


register(LeNetPreconditioners())
