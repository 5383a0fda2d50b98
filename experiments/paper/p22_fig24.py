"""LeNet on CIFAR-10: the same or another mini-batch in Q's loss and discrepancy (P22 appendix D).

        loss term    discrepancy    which
eq. 12  B            B'             the paper's Q, what APO does
eq. 13  B''          B'             without λ the objective of Wu et al. (2018)
eq. 14  B            B              cheaper, and biased

SGDm-APO: RMSprop with 0.1 on log η every 10 steps from η = 0.1, λ_WSD = 0, as in P22 section 6.1
and appendix B.4. The question is whether eq. 13's learning rate decays at once and its training
loss stays behind, and whether eq. 14 differs from eq. 12. Nothing is chosen: every λ_FSD is shown.
The rate of a run is the geometric mean over the last third of its curve: one meta-step moves it
by a tenth or more. SGDm that keeps the initial rate stands beside them.

Differs from the paper: LeNet in place of ResNet-32, its convolutions batch normalized as that
network's are (without, eq. 12's rate leaves LeNet's initial plateau upwards at λ_FSD ≤ 0.1, and the
run dies); no weight decay; λ_FSD up to 1, since the paper does not say which of its grid the
figures have. `default` trains on the first 5,000 images, without crops and flips, for 400 steps;
`paper` on all 50,000 with both, for 400 epochs of 391 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

import numpy as np
from matplotlib.figure import Figure

from experiments import recipes
from experiments.comparison import costs
from experiments.data.dataset import first
from experiments.images import Augmented, standardized_images
from experiments.intervals import ratio_interval, summary
from experiments.models import lenet
from experiments.plots import draw_runs, legend_below
from experiments.problems import Problem, Supervised
from experiments.recipes import SGD, APOLearningRate, Recipe
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.training import train
from experiments.tuning import runs_of, trial

BATCH_SIZE = 128
POINTS = 8  # of a curve, beside its first
TEST_IMAGES = 1_000  # they choose nothing
INITIAL_RATE = 0.1
FSD_WEIGHTS = (1.0, 0.3, 0.1)  # the paper's grid is {0.3, 0.1, 0.03, ..., 1e-4}

# Equation -> which mini-batch the loss term and the discrepancy are on.
VARIANTS = {
    "eq. 12": {"meta_loss_batch": "same", "discrepancy_batch": "fresh"},
    "eq. 13": {"meta_loss_batch": "fresh", "discrepancy_batch": "fresh"},
    "eq. 14": {"meta_loss_batch": "same", "discrepancy_batch": "same"},
}
PAPER = {
    "eq. 12": "reasonable schedule, loss falls",
    "eq. 13": "rate decays rapidly, no long-term progress",
    "eq. 14": "figure only",
}
FIXED = SGD(INITIAL_RATE, momentum=0.9)


def apo(fsd_weight: float) -> APOLearningRate:
    """SGDm-APO with that λ_FSD."""
    return APOLearningRate(INITIAL_RATE, momentum=0.9, fsd_weight=fsd_weight)


@dataclass(frozen=True)
class Scale:
    """What a preset runs."""

    steps: int
    examples: int
    seeds: int
    fsd_weights: tuple[float, ...] = FSD_WEIGHTS
    augment: bool = False


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(steps=12, examples=192, seeds=1, fsd_weights=FSD_WEIGHTS[1:2]),
    "default": Scale(steps=400, examples=5_000, seeds=2),
    "paper": Scale(
        steps=400 * 391,
        examples=50_000,
        seeds=3,
        fsd_weights=(0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001),
        augment=True,
    ),
}


@final
class MiniBatches(Experiment):
    """Training loss and learning rate for every choice of mini-batches."""

    name = "p22-fig24"
    title = "LeNet on CIFAR-10: the same or another mini-batch in the meta-objective"
    source = "P22 Figures 24-26, appendix D, eq. 12-14"
    claims = ("p22-fig24-26", "p22-eq13", "p22-eq14")
    embedded = False
    datasets = ("cifar-10",)
    scales = MappingProxyType(
        {
            "smoke": "12 steps on 192 images, one λ_FSD, 1 seed",
            "default": "400 steps of 128 of the first 5,000 images, 3 λ_FSD, 2 seeds",
            "paper": "400 epochs of all 50,000, cropped and flipped, 8 λ_FSD, 3 seeds",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """Every variant with every λ_FSD, eq. 13 without λ too, and SGDm at the initial rate."""
        scale = SCALES[preset]
        task = {"steps": scale.steps, "examples": scale.examples, "augment": scale.augment}
        cells: list[tuple[str, Recipe]] = [("SGDm", FIXED), ("eq. 13", apo(0.0))]
        cells += [(name, apo(weight)) for weight in scale.fsd_weights for name in VARIANTS]
        return [
            trial(name, one, seed, {**task, **VARIANTS.get(name, {})})
            for seed in range(seeds or scale.seeds)
            for name, one in cells
        ]

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train on the first images; "test" is the error on the first 1,000 test images."""
        options = trial.options
        data = context.load("cifar-10")
        train_part, test_part = standardized_images(
            first(data.train, options["examples"]), first(data.test, TEST_IMAGES)
        )
        problem: Problem = Supervised(
            train_part,
            test_part,
            "cross_entropy",
            batch_size=BATCH_SIZE,
            seed=trial.seed,
            device=context.device,
        )
        if options["augment"]:
            problem = Augmented(problem, trial.seed)
        model = lenet(seed=trial.seed, batch_norm=True, device=context.device)
        return train(
            model,
            recipes.recipe(options).build(model, problem),
            problem,
            steps=options["steps"],
            record_every=-(-options["steps"] // POINTS),
            meta_loss_batch=options.get("meta_loss_batch", "same"),
            discrepancy_batch=options.get("discrepancy_batch", "fresh"),
            progress=context.progress,
        )

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Final training loss and late learning rate of every cell."""
        rows = [_row("SGDm, η = 0.1 kept", _runs("SGDm", FIXED, records), "–")]
        for weight in _weights(records):
            for name in VARIANTS:
                if runs := _runs(name, apo(weight), records):
                    rows.append(_row(f"{name}, λ_FSD = {weight:g}", runs, PAPER[name]))
        return [row for row in rows if row.n]

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Training loss and learning rate over steps, one row of panels for each λ_FSD."""
        weights = [weight for weight in _weights(records) if weight] or [0.0]
        figure.set_size_inches(10, 3.6 * len(weights))
        for row, weight in zip(
            figure.subplots(len(weights), 2, squeeze=False), weights, strict=True
        ):
            for axes, curve in zip(row, ("loss", "learning_rate"), strict=True):
                for name in VARIANTS:
                    draw_runs(axes, _runs(name, apo(weight), records), curve, name)
                draw_runs(axes, _runs("eq. 13", apo(0.0), records), curve, "eq. 13, λ = 0")
                draw_runs(axes, _runs("SGDm", FIXED, records), curve, "SGDm, η = 0.1")
                axes.set(title=f"λ_FSD = {weight:g}", xlabel="step", yscale="log")
                legend_below(axes)
            row[0].set(ylabel="training loss")
            row[1].set(ylabel="learning rate η")

    def verdict(self, records: Sequence[Record]) -> str:
        """Eq. 13 and eq. 14 over eq. 12, rate and loss, paired by seed, for every λ_FSD."""
        parts = []
        for name in ("eq. 13", "eq. 14"):
            for weight in _weights(records):
                ours = _runs(name, apo(weight), records)
                theirs = {run.seed: run for run in _runs("eq. 12", apo(weight), records)}
                pairs = [(run, theirs[run.seed]) for run in ours if run.seed in theirs]
                if pairs:
                    rate = ratio_interval(
                        *_columns([(late_rate(a), late_rate(b)) for a, b in pairs])
                    )
                    loss = ratio_interval(
                        *_columns([(a.metric("loss"), b.metric("loss")) for a, b in pairs])
                    )
                    parts.append(
                        f"{name}, λ_FSD = {weight:g}: {rate} times the learning rate and {loss} "
                        f"times the training loss of eq. 12 (n = {rate.n})"
                    )
        if runs := _runs("eq. 13", apo(0.0), records):
            rates = summary([late_rate(run) for run in runs])
            parts.append(f"eq. 13 without λ ends at a rate of {rates}, from {INITIAL_RATE:g}")
        return (
            "; ".join(parts or ["No pair of variants has run"])
            + ". Geometric means of paired ratios, 95% t intervals. P22 reports a rapid decay of "
            "eq. 13's rate that prevents long-term progress."
        )


def late_rate(run: Record) -> float:
    """The geometric mean of η over the last third of the curve; where it ended if it diverged."""
    rates = run.curve("learning_rate")
    last = rates[-max(1, len(rates) // 3) :]
    return float(np.exp(np.log(last).mean()))


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def _runs(name: str, one: Recipe, records: Sequence[Record]) -> list[Record]:
    """The runs of a recipe with that choice of mini-batches, by seed."""
    choice = VARIANTS.get(name, {})
    return [
        run
        for run in runs_of(one, records)
        if all(run.options.get(option) == value for option, value in choice.items())
    ]


def _weights(records: Sequence[Record]) -> list[float]:
    """Every λ_FSD that has run, from the greatest to 0."""
    found = {r.options["fsd_weight"] for r in records if "fsd_weight" in r.options}
    return sorted(found, reverse=True)


def _row(label: str, runs: Sequence[Record], paper: str) -> Row:
    loss = summary([run.metric("loss") for run in runs]) if runs else "–"
    rate = summary([late_rate(run) for run in runs]) if runs else "–"
    return Row(label, f"loss {loss}; late η {rate}", paper, len(runs), costs=costs(runs))


register(MiniBatches())
