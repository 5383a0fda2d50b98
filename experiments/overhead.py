"""What a training step costs: APO's rules beside torch's optimizers, their limits and peers.

The cost at K is that of a step and 1/K of a meta-step, each timed in turn with a step of the
reference in one process; ratios are taken within a round, and shown as their median and quartiles
over rounds. So one run serves every K. OMP_NUM_THREADS=1 and an idle machine give steady numbers:
torch SGD beside itself shows how steady they are.

"By products" is the ratio of the multiplications in matrix products and convolutions alone: a
forward and a backward pass a step; for a meta-step the loss at θ' with its backward pass, the
outputs at θ, and the outputs at θ' with their backward pass; and what the rule itself multiplies.
It is a limit for learning rates, whose products are all passes. A preconditioner's are larger and
squarer than those of a mini-batch, cost less a multiplication, and may stay below it.

Memory is the peak of all tensors beside θ and the data, from the optimizer's construction on, in
copies of θ: gradients, states and φ, activations, temporaries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import final

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from experiments.contenders import ENTRIES, Contender, Task, installed, shares
from experiments.metering import PeakBytes, Work, interleaved
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset, Row, register

NETWORKS = {"mlp": "MLP", "lenet": "LeNet"}
CLASSES = 10
PAPER = {10: "1.3 (APO, K = 10)", 100: "1.03 (APO, K = 100)"}
FILLS = {"torch": "#ffffff", "APO": "#56B4E9", "peer": "#bbbbbb"}
HATCHES = {"torch": "", "APO": "", "peer": "///"}


@dataclass(frozen=True)
class Scale:
    """What a preset times."""

    rounds: int
    seconds: float  # of one contender, at most; but three rounds at least
    hidden: int = 1000
    inputs: int = 784
    batch: int = 128


SCALES: dict[Preset, Scale] = {
    "smoke": Scale(rounds=2, seconds=0.0, hidden=24, inputs=32, batch=8),
    "default": Scale(rounds=40, seconds=6.0),
    "paper": Scale(rounds=200, seconds=60.0),
}


@final
class Overhead(Experiment):
    """The cost of a step, in that of torch's SGD or AdamW."""

    name = "overhead"
    title = "What a training step costs, beside torch's optimizers"
    source = "P22 section 4.5 and Figure 28 (c); the networks are ours"
    claims = ("p22-cost",)
    timed = True
    scales = MappingProxyType(
        {
            "smoke": "an MLP 32-24-24-10 and a LeNet, batch 8, 2 rounds: no measurement",
            "default": "an MLP 784-1000-1000-10 and a LeNet on 3×32×32, batch 128, 6 s each",
            "paper": "the same, 60 s each (the paper does not say on what it measured)",
        }
    )

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """Every contender that is installed on every network; `seeds` repeats them."""
        scale = SCALES[preset]
        return [
            Trial(
                name=f"{network}-{name}-seed{seed}",
                options={"network": network, "contender": name, "scale": preset},
                seed=seed,
                label=f"{NETWORKS[network]}: {entry.label}",
            )
            for network in NETWORKS
            for seed in range(seeds or 1)
            for name, entry in ENTRIES.items()
            if installed(name) and (entry.wide or network != "mlp" or scale.hidden < 100)
        ]

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Time the contender's pieces in turn with its reference's step."""
        entry, scale = ENTRIES[trial.options["contender"]], SCALES[trial.options["scale"]]

        def fresh() -> Task:
            return _task(trial.options["network"], scale, trial.seed, context.device)

        reference = ENTRIES[entry.reference].build(fresh())
        contender = entry.build(fresh())
        pieces: dict[str, Work] = {"reference": reference.pieces["step"], **contender.pieces}
        times = interleaved(pieces, scale.rounds, scale.seconds, context.device)
        rounds = [float(number) for number in range(1, len(times["reference"]) + 1)]
        metrics = {"copies": _copies(fresh(), entry.build)}
        metrics |= {
            f"products of {piece}": count / reference.products["step"]
            for piece, count in contender.products.items()
        }
        return Outcome(metrics, {"round": rounds, **times})

    def table(self, records: Sequence[Record]) -> list[Row]:
        """Median, quartiles, products and memory of every contender at every K."""
        return [
            Row(
                label=f"{NETWORKS[bar.network]}: {bar.label}",
                ours=f"{bar.median:.2f} [{bar.low:.2f}, {bar.high:.2f}] × {bar.reference}",
                paper=PAPER.get(bar.interval, "–") if bar.name == "apo-sgd" else "–",
                n=bar.rounds,
                note=(f"by products {bar.by_products:.2f}; " if bar.by_products else "")
                + f"memory {bar.copies:.1f} copies of θ",
            )
            for network in NETWORKS
            for bar in _bars(network, records)
        ]

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """A bar for every contender, its quartiles, and its cost by products."""
        figure.set_size_inches(12, 6.5)
        for axes, network in zip(figure.subplots(1, 2), NETWORKS, strict=True):
            _draw(axes, NETWORKS[network], _bars(network, records))

    def verdict(self, records: Sequence[Record]) -> str:
        """The learning rate's cost beside its products and the paper's, and the dearest."""
        parts = []
        for network, title in NETWORKS.items():
            bars = _bars(network, records)
            rates = [bar for bar in bars if bar.name == "apo-sgd"]
            if rates:
                shown = ", ".join(
                    f"{bar.median:.2f} at K = {bar.interval} (by products {bar.by_products:.2f})"
                    for bar in rates
                )
                dearest = max(bars, key=lambda bar: bar.median)
                parts.append(
                    f"{title}: a learned rate costs {shown} of torch SGD's step; the dearest is "
                    f"{dearest.label} with {dearest.median:.1f}"
                )
        return ". ".join(parts) + ". P22 says 1.3 to 1.03 for K = 10 to 100."


@final
@dataclass(frozen=True)
class Bar:
    """A contender at one K: its ratios over the rounds of all its records.

    Attributes:
        by_products: 0 where it is not known.
    """

    network: str
    name: str
    label: str
    reference: str
    interval: int
    median: float
    low: float
    high: float
    rounds: int
    by_products: float
    copies: float


def _bars(network: str, records: Sequence[Record]) -> list[Bar]:
    """In the order of `ENTRIES`; what failed or did not run is left out."""
    bars = []
    for name, entry in ENTRIES.items():
        runs = [
            run
            for run in records
            if (run.options["network"], run.options["contender"]) == (network, name)
            and run.status == "finished"
        ]
        for interval in (entry.intervals or (1,)) if runs else ():
            ratios = np.concatenate([_ratios(run, interval) for run in runs])
            low, median, high = (float(np.quantile(ratios, q)) for q in (0.25, 0.5, 0.75))
            bars.append(
                Bar(
                    network,
                    name,
                    entry.label + (f", K = {interval}" if entry.intervals else ""),
                    ENTRIES[entry.reference].label,
                    interval,
                    median,
                    low,
                    high,
                    len(ratios),
                    _by_products(runs[0], interval),
                    max(run.metric("copies") for run in runs),
                )
            )
    return bars


def _ratios(run: Record, interval: int) -> np.ndarray:
    """A step's cost over the reference's, (rounds,)."""
    pieces = [name for name in run.outcome.curves if name not in ("round", "reference")]
    cost = sum(
        share * np.array(run.curve(piece)) for piece, share in shares(pieces, interval).items()
    )
    return np.asarray(cost / np.array(run.curve("reference")))


def _by_products(run: Record, interval: int) -> float:
    """A step's products over the reference's; 0 where they are not known."""
    known = {
        name.removeprefix("products of "): value
        for name, value in run.outcome.metrics.items()
        if name.startswith("products of ")
    }
    return sum(share * known[p] for p, share in shares(known, interval).items()) if known else 0.0


def _draw(axes: Axes, title: str, bars: Sequence[Bar]) -> None:
    """Horizontal bars from 1, no overhead, on a logarithmic axis; the first on top."""
    for row, bar in enumerate(bars):
        kind = ENTRIES[bar.name].kind
        axes.barh(
            row,
            bar.median - 1.0,
            left=1.0,
            height=0.7,
            color=FILLS[kind],
            hatch=HATCHES[kind],
            edgecolor="black",
            linewidth=0.8,
            xerr=[[bar.median - bar.low], [bar.high - bar.median]],
            error_kw={"linewidth": 1.0, "capsize": 2},
        )
        against = "" if bar.reference == ENTRIES["sgd"].label else f" × {bar.reference}"
        axes.annotate(
            f"{bar.median:.2f}{against}, {bar.copies:.1f} θ",
            (max(bar.high, bar.by_products), row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    counted = [(bar.by_products, row) for row, bar in enumerate(bars) if bar.by_products]
    if counted:
        axes.plot(
            *zip(*counted, strict=True),
            linestyle="none",
            marker="D",
            markersize=5,
            markerfacecolor="white",
            markeredgecolor="black",
            label="by products",
        )
        axes.legend(loc="lower right", fontsize=7)
    top = max((max(bar.high, bar.by_products) for bar in bars), default=1.0)
    axes.axvline(1.0, color="black", linewidth=1.0)
    axes.set_xscale("log")
    axes.set_xlim(min([0.9, *(bar.low for bar in bars)]), 2.5 * top)
    ticks = [tick for tick in (1, 1.5, 2, 3, 5, 10, 20, 50, 100) if tick < 2 * top]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(
        title=title,
        xlabel="cost of a step, in steps of torch SGD unless named;\npeak memory in copies of θ",
    )


def _task(network: str, scale: Scale, seed: int, device: str) -> Task:
    """The network with weights and mini-batches drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lenet = network == "lenet"
        model = _lenet() if lenet else _mlp(scale.inputs, scale.hidden, scale.hidden, CLASSES)
        shape = (scale.batch, 3, 32, 32) if lenet else (scale.batch, scale.inputs)
        x, other = torch.randn(2, *shape)
        y = torch.randint(CLASSES, (scale.batch,))
    return Task(model.to(device), x.to(device), y.to(device), other.to(device))


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _lenet() -> nn.Sequential:
    """LeNet-5 with ReLU and max-pooling, for 3×32×32."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), *_mlp(400, 120, 84, CLASSES)),
    )


def _copies(task: Task, build: Callable[[Task], Contender]) -> float:
    """The peak of all pieces, run twice, in copies of θ."""
    with PeakBytes() as memory:
        contender = build(task)
        for work in [*contender.pieces.values()] * 2:
            work()
    return memory.peak / sum(p.nbytes for p in task.model.parameters())


register(Overhead())
