"""The settings on tasks that had no part in choosing them: every smoke trial, and the verdict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, final

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.data import Dataset, Split
from experiments.held_out import FIXED, OURS, RIVAL, HeldOut
from experiments.records import Outcome, Record, Trial
from experiments.small_tasks import HELD_OUT, TASKS
from experiments.tuning import runs_of
from verification.experiments.fakes import record_by

EXAMPLES = 200
SHAPES = {"protein": (9,), "cifar-10": (3, 32, 32)}


@final
class _Small:
    """A context whose data sets are small: labels, or a line, and noise."""

    device = "cpu"

    def load(self, name: str, *, seed: int = 0) -> Dataset:
        """In the form of that set."""
        source = np.random.default_rng(5)
        labels = source.integers(0, 10, 2 * EXAMPLES)
        noise = source.standard_normal((2 * EXAMPLES, *SHAPES[name]))
        classes = 10 if name == "cifar-10" else 0
        inputs = noise + labels.reshape(-1, *[1] * len(SHAPES[name])) / 10
        targets = labels if classes else labels[:, None] / 10
        halves = [slice(None, EXAMPLES), slice(EXAMPLES, None)]
        train, test = (Split(inputs[half].astype(np.float32), targets[half]) for half in halves)
        return Dataset(name, train, test, classes, "")

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Nothing."""


def _made_up(trial: Trial) -> Record:
    """A run that ends at 0.5 with an inner fixed rate, at 1 with another, and for APO at 3."""
    inner = {method.grid[2].slug() for method in FIXED.values()}
    fixed = trial.label in FIXED
    loss = 0.5 if any(f"{slug}-seed" in trial.name for slug in inner) else 1.0 if fixed else 3.0
    return record_by("held-out", trial, Outcome({"loss": loss, "test": 0.1}, {"step": [0.0]}))


def test_no_task_was_chosen_on() -> None:
    assert not HELD_OUT.keys() & TASKS.keys()


def test_every_recipe_is_planned_once_for_every_seed_and_task() -> None:
    records = [_made_up(trial) for trial in HeldOut().plan("default", None, [])]
    recipes = [one for method in (*FIXED.values(), *OURS.values(), RIVAL) for one in method.grid]
    assert len(records) == len(recipes) * len(HELD_OUT) * 3
    for one in recipes:
        assert len(runs_of(one, records)) == len(HELD_OUT) * 3


def test_the_verdict_is_beside_the_rules_best_fixed_rate_and_prodigy() -> None:
    records = [_made_up(trial) for trial in HeldOut().plan("default", None, [])]
    verdict = HeldOut().verdict(records)
    for task in HELD_OUT:
        for rule in FIXED:
            assert f"{task}: APO-{rule} 6 [6, 6] of the best fixed {rule}" in verdict
            assert f"{task}: APO-{rule} 1 [1, 1] of Prodigy" in verdict
    assert not any("edge" in row.note for row in HeldOut().table(records))


def test_every_smoke_trial_runs_and_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, task in HELD_OUT.items():
        small = replace(task, examples=EXAMPLES, test_examples=EXAMPLES, points=2)
        monkeypatch.setitem(HELD_OUT, name, small)
    experiment, context = HeldOut(), _Small()
    trials = experiment.plan("smoke", None, [])
    stub: Any = context
    records = [record_by("held-out", one, experiment.run(one, stub), "smoke") for one in trials]
    assert {record.label for record in records if record.status != "finished"} <= set(FIXED)
    assert len(experiment.table(records)) == len(HELD_OUT) * (len(FIXED) + len(OURS) + 1)
    figure = Figure()
    experiment.draw(records, figure)
    assert len(figure.axes) == 2 * len(HELD_OUT)
    assert all(axes.get_lines() for axes in figure.axes)
