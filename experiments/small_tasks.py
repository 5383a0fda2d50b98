"""Four small tasks to compare settings on: digits, Parkinsons, 5,000 of MNIST and Fashion-MNIST."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.data import Dataset, Split
from experiments.data.dataset import first
from experiments.intervals import Interval, ratio_interval
from experiments.models import mlp
from experiments.problems import LossName, Supervised
from experiments.recipes import Recipe
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context
from experiments.training import train_trial
from experiments.tuning import runs_of

POINTS = 40  # of a curve


@dataclass(frozen=True)
class Task:
    """A data set, the hidden layers of its MLP, and how long they are trained."""

    hidden: tuple[int, ...]
    epochs: int
    batch_size: int
    loss_name: LossName = "cross_entropy"
    examples: int | None = None  # the first of the training set
    seeds: int = 3


TASKS = {
    "digits": Task((256, 256), epochs=60, batch_size=128, seeds=5),  # it is quick, and differs most
    "parkinsons": Task((100, 100), epochs=30, batch_size=128, loss_name="squared_error"),
    "mnist": Task((100, 100), epochs=20, batch_size=100, examples=5_000),
    "fashion-mnist": Task((100, 100), epochs=20, batch_size=100, examples=5_000),
}


def train_task(trial: Trial, context: Context) -> Outcome:
    """The trial's recipe on the task of its "dataset" for its "epochs"; "loss" is on all examples.

    The seed is that of the initial weights and of the order of the examples.
    """
    task = TASKS[trial.options["dataset"]]
    data = context.load(trial.options["dataset"])
    problem = _problem(task, data, trial.seed, context.device)
    outputs = data.classes or data.train.targets.shape[1]
    widths = (math.prod(data.train.inputs.shape[1:]), *task.hidden, outputs)
    model = mlp(widths, seed=trial.seed, device=context.device)
    steps = trial.options["epochs"] * problem.steps_per_epoch
    return train_trial(
        trial,
        context,
        model,
        problem,
        steps=steps,
        record_every=max(1, steps // POINTS),
    )


def of_task(task: str, records: Sequence[Record]) -> list[Record]:
    """Those of the records that ran on the task."""
    return [record for record in records if record.options["dataset"] == task]


def final_ratio(one: Recipe, other: Recipe, records: Sequence[Record]) -> Interval | None:
    """Final training loss of `one` over `other`'s, paired by seed; None for itself or no pair."""
    theirs = {run.seed: run.metric("loss") for run in runs_of(other, records)}
    runs = [run for run in runs_of(one, records) if run.seed in theirs]
    if one == other or not runs:
        return None
    return ratio_interval([r.metric("loss") for r in runs], [theirs[r.seed] for r in runs])


def _problem(task: Task, data: Dataset, seed: int, device: str) -> Supervised:
    part = first(data.train, task.examples) if task.examples else data.train
    both = [_tensors(one, task.loss_name) for one in (part, data.test)]
    sizes = {"batch_size": task.batch_size, "curvature_size": task.batch_size}
    return Supervised(both[0], both[1], task.loss_name, seed=seed, device=device, **sizes)


def _tensors(part: Split, loss_name: LossName) -> tuple[Tensor, Tensor]:
    kind = torch.int64 if loss_name == "cross_entropy" else torch.float32
    inputs = torch.tensor(part.inputs, dtype=torch.float32).flatten(1)
    return inputs, torch.tensor(part.targets, dtype=kind)
