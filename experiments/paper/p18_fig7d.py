"""Fashion-MNIST, a small convolutional network: K-FAC, K-FAC-APO, RMSprop, RMSprop-APO.

The network is P18's: two convolutions with 16 and 32 filters of size 5, and a fully-connected
layer. P18 says no more; here each convolution is followed by ReLU and a 2 × 2 maximum, without
padding: (1, 28, 28) → (16, 12, 12) → (32, 4, 4) → 10.

K-FAC and K-FAC-APO are one update rule, `apo.rules.KFAC`, and differ only in what is learned. Its
factors are those of the Fisher, renewed from 100 fresh examples every 10 steps; the eigenbases
every 100. K-FAC-APO learns η and the damping from (1e-3, 1e-3), where P18's K-FAC on CIFAR-10
starts, without and with a trust factor of 1.1: the first meta-steps of RMSprop with 0.1 multiply η
and divide the damping by up to e, and without it the runs that were tried left.

Differs from the paper: `default` sees 5,000 examples for 10 epochs; no rate or λ is printed for
this figure, so the grids are ours, 6 recipes for each method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

import torch
from matplotlib.figure import Figure
from torch import nn

from experiments.apo_recipes import APOKFAC, APORMSprop, FixedKFAC
from experiments.comparison import comparison_row, comparison_sentence, draw_comparison
from experiments.paper.adaptation import draw_adaptation
from experiments.paper.mnist_mlp import image_problem, run_epochs, steps_per_epoch, task
from experiments.plots import legend_below
from experiments.recipes import RMSprop
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.seeds import generator
from experiments.tuning import Method, chosen, plan_search, runs_of

RMSPROP = Method("RMSprop", tuple(RMSprop(lr) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)))
RMSPROP_APO = Method(
    "RMSprop-APO",
    tuple(APORMSprop(3e-4, weight) for weight in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)),
    "self-tuning",
)
# Above a ratio η/damping of about 1 the first steps left.
KFAC_SETTINGS = (
    (1e-3, 1e-3),
    (1e-3, 3e-3),
    (3e-3, 3e-3),
    (3e-3, 1e-2),
    (1e-2, 1e-2),
    (1e-2, 3e-2),
)
KFAC = Method("K-FAC", tuple(FixedKFAC(lr, damping) for lr, damping in KFAC_SETTINGS))
KFAC_APO = Method(
    "K-FAC-APO",
    tuple(
        APOKFAC(1e-3, weight, trust_factor=factor)
        for factor in (1.1, None)
        for weight in (1.0, 0.1, 1e-2)
    ),
    "self-tuning",
)
METHODS = (RMSPROP, RMSPROP_APO, KFAC, KFAC_APO)


@dataclass(frozen=True)
class Scale:
    """What a preset runs."""

    task: dict[str, Any]
    seeds: int
    stride: int = 1  # every how many-th recipe of each grid


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(task(examples=300, epochs=4, points=4), seeds=1, stride=6),
    "default": Scale(task(examples=5_000, epochs=10, points=10), seeds=3),
    "paper": Scale(task(examples=60_000, epochs=100, points=50), seeds=3),
}


def small_cnn(*, seed: int, device: str = "cpu") -> nn.Sequential:
    """Two convolutions of size 5 with ReLU and 2 × 2 maxima, a linear layer: 18,378 parameters.

    Weights and biases are drawn from U(−1/√in, 1/√in), as torch draws them, in = channels · 25 for
    a convolution, but from `seed` alone and on the CPU.
    """
    source = generator(seed, "initialization")
    # skip_init leaves torch's global random state alone
    first = nn.utils.skip_init(nn.Conv2d, 1, 16, 5)
    second = nn.utils.skip_init(nn.Conv2d, 16, 32, 5)
    last = nn.utils.skip_init(nn.Linear, 32 * 4 * 4, 10)
    with torch.no_grad():
        for layer, inputs in ((first, 25), (second, 16 * 25), (last, 32 * 4 * 4)):
            bound = 1 / math.sqrt(inputs)
            for parameter in layer.parameters():
                parameter.uniform_(-bound, bound, generator=source)
    return nn.Sequential(
        first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), last
    ).to(device)


@final
class FashionKFAC(Experiment):
    """Training loss of K-FAC and RMSprop, each with and without APO."""

    name = "p18-fig7d"
    title = "Fashion-MNIST: K-FAC and RMSprop with and without APO"
    source = "P18 Figure 7 (d), appendix C"
    claims = ("p18-fig7",)
    embedded = False
    datasets = ("fashion-mnist",)
    scales = MappingProxyType(
        {
            "smoke": "300 examples, 4 epochs, a recipe for each method, 1 seed",
            "default": "5,000 examples, 10 epochs, 6 recipes for each method, 3 seeds",
            "paper": "60,000 examples, 100 epochs, 6 recipes for each method, 3 seeds",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """The grids with a tuning seed, then the chosen recipes."""
        scale = SCALES[preset]
        return plan_search(
            [Method(one.label, one.grid[:: scale.stride], one.track) for one in METHODS],
            scale.task,
            tuning_seeds=1,
            seeds=seeds or scale.seeds,
            records=records,
        )

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train the network on Fashion-MNIST: "loss" is the training loss, "test" the error."""
        data = context.load("fashion-mnist")
        problem = image_problem(data, trial, flat=False, device=context.device)
        model = small_cnn(seed=trial.seed, device=context.device)
        return run_epochs(model, problem, trial, context)

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Final training loss of each method's chosen recipe."""
        return [comparison_row(method, records, "figure only") for method in METHODS]

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Training loss over epochs; the learning rates; K-FAC-APO's damping."""
        figure.set_size_inches(12, 5.5)
        loss, rate, damping = figure.subplots(1, 3)
        unit = steps_per_epoch(records[0].options) if records else 1
        draw_comparison(loss, METHODS, records, steps_per_unit=unit)
        for method in METHODS:
            runs = runs_of(chosen(method, records), records)
            draw_adaptation(rate, runs, "learning_rate", method.label, steps_per_unit=unit)
        runs = runs_of(chosen(KFAC_APO, records), records)
        draw_adaptation(damping, runs, "damping", KFAC_APO.label, steps_per_unit=unit)
        for axes in (loss, rate, damping):
            axes.set(xlabel="epoch")
        legend_below(rate)
        legend_below(damping)

    def verdict(self, records: Sequence[Record]) -> str:
        """K-FAC-APO beside the others, and K-FAC beside RMSprop-APO."""
        return (
            f"{comparison_sentence(KFAC_APO, (KFAC, RMSPROP_APO, RMSPROP), records)}; "
            f"{comparison_sentence(KFAC, (RMSPROP_APO,), records)}. P18 reports K-FAC below "
            "RMSprop-APO, and K-FAC-APO substantially below K-FAC."
        )


register(FashionKFAC())
