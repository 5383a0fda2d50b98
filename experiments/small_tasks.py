"""Four small tasks to choose settings on, and two that had no part in the choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from torch import Tensor

from experiments.comparison import loss_interval
from experiments.data import Dataset, Split
from experiments.data.dataset import first
from experiments.images import standardized_images
from experiments.intervals import Interval
from experiments.models import lenet, mlp
from experiments.problems import LossName, Supervised
from experiments.recipes import Recipe
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context
from experiments.training import train_epochs
from experiments.tuning import Method, plan_grids, runs_of


@dataclass(frozen=True)
class Task:
    """A data set, the network, and how long it is trained.

    Attributes:
        hidden: layers of an MLP; None for LeNet, on standardized images.
        examples: how many of the training set; None for all.
        test_examples: how many of the test set; None for all.
        points: of a curve; each evaluates on all of these examples.
    """

    hidden: tuple[int, ...] | None
    epochs: int
    batch_size: int
    loss_name: LossName = "cross_entropy"
    examples: int | None = None
    test_examples: int | None = None
    points: int = 40
    seeds: int = 3


TASKS = {
    "digits": Task((256, 256), epochs=60, batch_size=128, seeds=5),  # it is quick, and differs most
    "parkinsons": Task((100, 100), epochs=30, batch_size=128, loss_name="squared_error"),
    "mnist": Task((100, 100), epochs=20, batch_size=100, examples=5_000),
    "fashion-mnist": Task((100, 100), epochs=20, batch_size=100, examples=5_000),
}
HELD_OUT = {
    "protein": Task((100, 100), 20, batch_size=128, loss_name="squared_error", examples=5_000),
    "cifar-10": Task(
        None, epochs=20, batch_size=100, examples=5_000, test_examples=1_000, points=10
    ),
}


def plan_tasks(
    tasks: Mapping[str, Task], methods: Sequence[Method], epochs: float, seeds: int | None
) -> list[Trial]:
    """Every recipe on every task with every seed.

    Args:
        tasks: by data set.
        methods: whose grids run.
        epochs: the share of each task's epochs, at least one.
        seeds: how many; None for each task's own number.
    """
    return [
        trial
        for name, task in tasks.items()
        for trial in plan_grids(
            methods,
            {"dataset": name, "epochs": max(1, round(epochs * task.epochs))},
            range(seeds or task.seeds),
        )
    ]


def train_task(trial: Trial, context: Context) -> Outcome:
    """The trial's recipe on the task of its "dataset" for its "epochs"; "loss" is on all examples.

    The seed is that of the initial weights and of the order of the examples.
    """
    task = (TASKS | HELD_OUT)[trial.options["dataset"]]
    data = context.load(trial.options["dataset"])
    problem = _problem(task, data, trial.seed, context.device)
    outputs = data.classes or data.train.targets.shape[1]
    if task.hidden is None:
        model = lenet(seed=trial.seed, classes=outputs, device=context.device)
    else:
        widths = (math.prod(data.train.inputs.shape[1:]), *task.hidden, outputs)
        model = mlp(widths, seed=trial.seed, device=context.device)
    epoch = problem.steps_per_epoch
    return train_epochs(trial, context, model, problem, steps_per_epoch=epoch, points=task.points)


def of_task(task: str, records: Sequence[Record]) -> list[Record]:
    """Those of the records that ran on the task."""
    return [record for record in records if record.options["dataset"] == task]


def final_ratio(one: Recipe, other: Recipe, records: Sequence[Record]) -> Interval | None:
    """Final training loss of `one` over `other`'s, paired by seed; None for itself or no pair."""
    return None if one == other else loss_interval(one, other, records)


def draw_losses(
    axes: Axes,
    variants: Mapping[str, Recipe],
    best: Recipe,
    records: Sequence[Record],
    *,
    named: bool,
) -> None:
    """A line of points for each variant that ran, its final losses; those of `best` as rules.

    Args:
        axes: where.
        variants: by name, from above.
        best: what they are beside.
        records: of one task.
        named: whether the names stand at the axis.
    """
    names = [name for name, one in variants.items() if runs_of(one, records)]
    for height, name in enumerate(reversed(names)):
        losses = _finite_losses(variants[name], records)
        axes.plot(losses, [height] * len(losses), "o", color="C0", alpha=0.6)
    for loss in _finite_losses(best, records):
        axes.axvline(loss, color="C1", lw=1)
    axes.set(xscale="log")
    axes.xaxis.set_minor_formatter(NullFormatter())  # they overlap within one decade
    axes.set_yticks(range(len(names)), names[::-1] if named else [""] * len(names))


def _finite_losses(one: Recipe, records: Sequence[Record]) -> list[float]:
    return list(filter(math.isfinite, (run.metric("loss") for run in runs_of(one, records))))


def _problem(task: Task, data: Dataset, seed: int, device: str) -> Supervised:
    train, test = (
        first(part, count) if count else part
        for part, count in ((data.train, task.examples), (data.test, task.test_examples))
    )
    if task.hidden is None:
        both = standardized_images(train, test)
    else:
        both = [_tensors(one, task.loss_name) for one in (train, test)]
    sizes = {"batch_size": task.batch_size, "curvature_size": task.batch_size}
    return Supervised(both[0], both[1], task.loss_name, seed=seed, device=device, **sizes)


def _tensors(part: Split, loss_name: LossName) -> tuple[Tensor, Tensor]:
    kind = torch.int64 if loss_name == "cross_entropy" else torch.float32
    inputs = torch.tensor(part.inputs, dtype=torch.float32).flatten(1)
    return inputs, torch.tensor(part.targets, dtype=kind)
