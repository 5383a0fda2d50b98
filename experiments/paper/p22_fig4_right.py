"""Deep autoencoder on MNIST: 784-1000-500-250-30-250-500-1000-784, sigmoids, binary pixels.

J(θ) is the binary cross-entropy of the logits, summed over pixels and averaged over images, plus
1e-5/2 ‖θ‖² (P22 appendix B.3). Batches of 512. The discrepancy is the KL divergence of the pixels'
Bernoulli distributions. The recipe with the lowest final training loss is run again with other
seeds, as in the paper. The grids of appendix B.3 stand below as they are printed; the preset
`paper` searches them for 1,000 epochs of 60,000 images.

Differs from the paper: weights start uniform in ±1/√in, the paper does not say how. `default`
takes the first 5,000 images and 15 epochs, 150 steps, which is the beginning of the figure and no
more: it shows who leaves the plateau at the mean image (J ≈ 206), and not who ends lowest. In it
the meta-rates are larger, as there are 15 meta-steps where the paper has 11,800; the warm-up is
shorter; and P starts at a small multiple of I, where SGD itself does not diverge. KFAC samples its
output gradients and, like Shampoo's roots, is renewed every 15 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments.comparison import comparison_row, comparison_sentence, draw_comparison
from experiments.data import Split
from experiments.data.dataset import first
from experiments.models import mlp
from experiments.problems import Problem, Regularized, Supervised
from experiments.recipes import SGD, Adam, APOPrecond, Shampoo
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register
from experiments.sampled_kfac import KFACSampled
from experiments.training import train_trial
from experiments.tuning import Method, plan_search

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
BATCH_SIZE = 512
WEIGHT_DECAY = 1e-5
TEST_IMAGES = 1_000  # they choose nothing
POINTS = 10  # of a curve, beside its first


def _methods(
    *,
    sgdm: Sequence[float],
    adam: Sequence[float],
    shampoo: Sequence[float],
    kfac: Sequence[tuple[float, float]],
    apo: Sequence[APOPrecond],
    interval: int,
) -> tuple[Method, ...]:
    """The five methods; `kfac` holds rates and dampings, `interval` is that of all factors."""
    return (
        Method("SGDm", tuple(SGD(lr, momentum=0.9) for lr in sgdm)),
        Method("Adam", tuple(Adam(lr) for lr in adam)),
        Method("Shampoo", tuple(Shampoo(lr, interval=interval) for lr in shampoo)),
        Method("KFAC", tuple(KFACSampled(*one, interval=interval) for one in kfac)),
        Method("APO-Precond", tuple(apo)),
    )


def _apo(
    initial_lr: float, meta_lr: float, fsd: float, wsd: float, warmup_steps: int
) -> APOPrecond:
    """SGDm at a tenth of the initial P moves θ in the warm-up: the same effective step."""
    return APOPrecond(
        initial_lr,
        meta_lr=meta_lr,
        fsd_weight=fsd,
        wsd_weight=wsd,
        warmup_steps=warmup_steps,
        warmup_lr=initial_lr / 10,
    )


@dataclass(frozen=True)
class Scale:
    """What a preset runs."""

    methods: tuple[Method, ...]
    examples: int
    epochs: int
    seeds: int
    widths: tuple[int, ...] = WIDTHS


SHORT = _methods(
    sgdm=(0.01, 0.003, 0.001, 0.0003),
    adam=(3e-3, 1e-3, 3e-4, 1e-4),
    shampoo=(0.1, 0.03, 0.01, 0.003),
    kfac=((0.1, 0.1), (0.1, 0.01), (0.03, 0.1), (0.03, 0.01)),
    apo=[_apo(initial, 3e-3, 0.3, wsd, 20) for initial in (0.03, 0.01) for wsd in (3.0, 0.3)],
    interval=15,
)
SCALES: dict[Preset, Scale] = {
    "smoke": Scale(
        tuple(Method(one.label, one.grid[1:2]) for one in SHORT),
        examples=128,
        epochs=20,
        seeds=1,
        widths=(784, 100, 50, 25, 3, 25, 50, 100, 784),
    ),
    "default": Scale(SHORT, examples=5_000, epochs=15, seeds=2),
    # P22 appendix B.3, section 6.1; it lists Adam's 3e-4 twice.
    "paper": Scale(
        _methods(
            sgdm=(1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001),
            adam=(3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5),
            shampoo=(10.0, 5.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001),
            kfac=[
                (lr, damping)
                for lr in (0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001, 0.00003, 0.00001)
                for damping in (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
            ],
            apo=[
                _apo(1.0, meta_lr, fsd, wsd, 3_000)
                for meta_lr in (1e-4, 3e-5)
                for fsd in (0.3, 0.1)
                for wsd in (3.0, 1.0, 0.3, 0.1)
            ],
            interval=20,
        ),
        examples=60_000,
        epochs=1_000,
        seeds=3,
    ),
}


def _union() -> list[Method]:
    """Every method with every recipe of any preset: the records say which of them ran."""
    everything = [scale.methods for scale in SCALES.values()]
    return [
        Method(same[0].label, tuple(dict.fromkeys(one for method in same for one in method.grid)))
        for same in zip(*everything, strict=True)
    ]


METHODS = _union()


@final
class DeepAutoencoder(Experiment):
    """Training loss of five optimizers on the autoencoder."""

    name = "p22-fig4-right"
    title = "MNIST: the deep autoencoder"
    source = "P22 Figure 4 (right), section 6.2.2, appendix B.3"
    claims = ("p22-fig4-right",)
    embedded = False
    datasets = ("mnist",)
    scales = MappingProxyType(
        {
            "smoke": "20 steps on 128 images, hidden layers a tenth as wide, one recipe each",
            "default": "15 epochs of 5,000 images (150 steps), 4 recipes each, 2 seeds",
            "paper": "1,000 epochs of 60,000 images, the grids of appendix B.3, 3 seeds",
        }
    )

    edges = MappingProxyType(
        {("paper", method.label): "the grid is the paper's, as it is printed" for method in METHODS}
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """The grids with one tuning seed, then the chosen recipes."""
        scale = SCALES[preset]
        return plan_search(
            scale.methods,
            {
                "examples": scale.examples,
                "epochs": scale.epochs,
                "widths": list(scale.widths),
            },
            tuning_seeds=1,
            seeds=seeds or scale.seeds,
            records=records,
        )

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Train on the first images; "test" is the cross-entropy of the first 1,000 test images."""
        data = context.load("mnist")
        supervised = Supervised(
            _pixels(first(data.train, trial.options["examples"])),
            _pixels(first(data.test, TEST_IMAGES)),
            "bernoulli",
            batch_size=BATCH_SIZE,
            seed=trial.seed,
            device=context.device,
        )
        problem: Problem = Regularized(supervised, WEIGHT_DECAY)
        model = mlp(
            trial.options["widths"], seed=trial.seed, activation=nn.Sigmoid, device=context.device
        )
        steps = trial.options["epochs"] * supervised.steps_per_epoch
        return train_trial(
            trial,
            context,
            model,
            problem,
            steps=steps,
            record_every=-(-steps // POINTS),
        )

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Final training loss of each method's chosen recipe."""
        return [comparison_row(method, records, "figure only") for method in METHODS]

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Training loss over steps."""
        axes = figure.subplots()
        draw_comparison(axes, METHODS, records)
        axes.set(xlabel="step", ylabel="training loss (nats an image)")

    def verdict(self, records: Sequence[Record]) -> str:
        """APO-Precond beside each of the others."""
        *others, apo = METHODS
        return (
            f"{comparison_sentence(apo, others, records)}. P22 reports it faster than first-order "
            "methods, competitive with second-order ones, and behind KFAC."
        )


def _pixels(part: Split) -> tuple[Tensor, Tensor]:
    """(inputs, targets), both the pixels in [0, 1], (N, 784)."""
    pixels = torch.tensor(part.inputs, dtype=torch.float32).flatten(1)
    return pixels, pixels


register(DeepAutoencoder())
