"""P18 on toy problems and MNIST: small runs, plans, and verdicts from made-up runs."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from experiments.data import Dataset, Split
from experiments.data.dataset import first
from experiments.data.sources import VARIABLE
from experiments.paper import p18_fig7, p22_fig5, p22_fig28, p22_fig29
from experiments.paper.p18_fig7d import small_cnn
from experiments.paper.p18_fig9 import POINTS
from experiments.recipes import Recipe
from experiments.records import Outcome, Record, Trial, read_records
from experiments.registry import Context, Experiment, Preset, experiments
from experiments.runner import record_folder, run_experiment
from experiments.tuning import FIRST_TUNING_SEED, Method, trial
from experiments.watch import LineWatch
from verification.experiments.fakes import record_of

TOYS = ("p18-fig1", "p18-fig9")
SEARCHED = ("p22-fig5", "p18-fig7d")
REPORTED = ("p22-fig28", "p22-fig29", "p18-fig7")
ON_IMAGES = (*SEARCHED, *REPORTED)
EXAMPLES, EPOCHS = 100, 2  # one mini-batch to an epoch


class _Blobs:
    """A context whose images are ten templates with noise, whatever the name."""

    device = "cpu"

    def load(self, name: str, *, seed: int = 0) -> Dataset:
        """100 images of 28 × 28, and 20 more."""
        source = np.random.default_rng(5)
        labels = np.arange(120) % 10
        noise = source.random((120, 1, 28, 28))
        inputs = (0.7 * source.random((10, 1, 28, 28))[labels] + 0.3 * noise).astype(np.float32)
        train, test = Split(inputs[:100], labels[:100]), Split(inputs[100:], labels[100:])
        return Dataset(name, train, test, 10, "")

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Nothing."""


def _planned(name: str) -> list[Trial]:
    """The smoke plan, each trial cut to one mini-batch an epoch; searches once they have runs."""
    experiment = experiments()[name]
    trials = experiment.plan("smoke", None, [])
    if name in SEARCHED:
        trials = experiment.plan("smoke", None, [_record(one, 1.0) for one in trials])
    cut = {"examples": EXAMPLES, "epochs": EPOCHS, "points": EPOCHS}
    return [replace(one, options=one.options | cut) for one in trials]


@functools.cache
def _records(name: str) -> list[Record]:
    """The records of the cut trials on the templates."""
    context: Any = _Blobs()
    return [
        replace(record_of(), trial=one, outcome=experiments()[name].run(one, context))
        for one in _planned(name)
    ]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    """The records of the toy problems at smoke scale."""
    out: Path = tmp_path_factory.mktemp("toys")
    for name in TOYS:
        run_experiment(experiments()[name], "smoke", out, LineWatch(lambda text: None))
    return {name: list(read_records(record_folder(out, "smoke", name)).values()) for name in TOYS}


def _record(one: Trial, loss: float, **metrics: float) -> Record:
    """A made-up run that ends at that loss."""
    curves = {"step": [0.0, 1.0], "loss": [2.3, loss], "learning_rate": [0.1, 0.2]}
    outcome = Outcome({"loss": loss, "test": 0.1, **metrics}, curves)
    return replace(record_of(), trial=one, outcome=outcome)


def _check_shown(experiment: Experiment, records: list[Record]) -> None:
    figure = Figure()
    experiment.draw(records, figure)
    for axes in figure.axes:
        assert axes.get_lines(), f"{experiment.name}: a panel is empty"
        assert axes.get_yscale() == "log"
    assert experiment.table(records) == experiment.table(records[::-1])
    assert experiment.verdict(records) == experiment.verdict(records[::-1])


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_problem_is_shown(toys: dict[str, list[Record]], name: str) -> None:
    assert [record.error for record in toys[name] if record.error] == []
    _check_shown(experiments()[name], toys[name])


@pytest.mark.parametrize("name", ON_IMAGES)
def test_every_trial_runs_and_is_shown(name: str) -> None:
    records = _records(name)
    for record in records:
        assert record.status == "finished", record.trial.name
        assert record.curve("step") == [0.0, 1.0, 2.0]
        if "APO" not in record.label:
            assert record.metric("loss") < record.curve("loss")[0], record.trial.name
    _check_shown(experiments()[name], records)


@pytest.mark.parametrize("preset", ["smoke", "default", "paper"])
@pytest.mark.parametrize("name", [*TOYS, *ON_IMAGES])
def test_the_plan_is_a_function_of_the_records(name: str, preset: Preset) -> None:
    experiment = experiments()[name]
    trials = experiment.plan(preset, None, [])
    assert len({one.name for one in trials}) == len(trials)
    records = [_record(one, 1.0 + index) for index, one in enumerate(trials)]
    again = experiment.plan(preset, None, records)
    assert {one.name for one in trials} <= {one.name for one in again}
    assert again == experiment.plan(preset, None, records[::-1])


@pytest.mark.parametrize(("name", "recipes"), list(zip(SEARCHED, (4, 6), strict=True)))
def test_each_method_is_given_equally_many_trials(name: str, recipes: int) -> None:
    experiment = experiments()[name]
    tuning = experiment.plan("default", None, [])
    trials = experiment.plan("default", None, [_record(one, 1.0) for one in tuning])
    counts: dict[str, int] = {}
    for one in trials:
        counts[one.label] = counts.get(one.label, 0) + 1
    assert set(counts.values()) == {recipes + 3}
    assert len(trials) <= 45


def test_the_paper_preset_has_the_grids_of_section_5() -> None:
    # P18 section 5.2: three rates for each optimizer; three λ for SGD and SGDm, six for RMSprop
    trials = experiments()["p22-fig5"].plan("paper", None, [])
    found: dict[str, set[float]] = {}
    for one in trials:
        value = one.options["fsd_weight"] if "APO" in one.label else one.options["lr"]
        found.setdefault(one.label, set()).add(value)
    assert found == {
        "SGD": {0.1, 0.01, 0.001},
        "SGDm": {0.1, 0.01, 0.001},
        "RMSprop": {0.01, 0.001, 0.0001},
        "SGD-APO": {0.1, 0.01, 0.001},
        "SGDm-APO": {0.1, 0.01, 0.001},
        "RMSprop-APO": {0.1, 0.01, 1e-3, 1e-4, 1e-5, 0.0},
    }
    assert {(one.options["examples"], one.options["epochs"]) for one in trials} == {(60_000, 100)}


def _runs(method: Method, one: Recipe, losses: Sequence[float], task: dict[str, Any]) -> list:
    """Made-up runs with the seeds 0, 1, ... and one tuning seed at the first loss."""
    seeds = [FIRST_TUNING_SEED, *range(len(losses))]
    return [
        _record(trial(method.label, one, seed, task), loss)
        for seed, loss in zip(seeds, (losses[0], *losses), strict=True)
    ]


def test_the_verdict_compares_with_the_best_rate_and_with_the_best_that_P18_tried() -> None:
    (base, apo), *_ = p22_fig5.PAIRS
    task = p22_fig5.SCALES["default"].task
    better, printed, worse = (
        next(one for one in base.grid if one.options()["lr"] == lr) for lr in (0.3, 0.1, 0.001)
    )
    records = [
        *_runs(base, printed, (0.08, 0.08), task),
        *_runs(base, worse, (0.5, 0.5), task),
        *_runs(base, better, (0.01, 0.01), task),
        *_runs(apo, apo.grid[0], (0.04, 0.02), task),
    ]
    verdict = p22_fig5.MNISTFigure().verdict(records)
    # the geometric mean of 4 and 2
    assert f"ends at {math.sqrt(8):.3g} [" in verdict
    assert "at 0.04 where P18's best rate (η = 0.1) ends at 0.08" in verdict


def test_the_spread_over_initial_rates_leaves_dead_runs_out_and_counts_them() -> None:
    method, task = p22_fig28.METHODS[0], p22_fig28.SCALES["default"].task
    losses = {0.1: (0.02, 0.04), 1e-3: (0.06, 0.06), 1e-5: (0.03, math.inf), 1e-7: (0.01, 2.3)}
    records = [
        _record(trial(method.label, one, seed, task), loss)
        for one in method.grid
        for seed, loss in enumerate(losses.get(one.options()["lr"], ()))  # type: ignore[arg-type]
    ]
    verdict = p22_fig28.InitialRates().verdict(records)
    assert "2 of 8 runs from 4 initial rates are dead" in verdict
    assert "over the 2 without a dead run" in verdict
    assert f"between 0.03 and 0.06, max/min = {2:.3g}" in verdict


def test_the_overhead_is_that_of_steps_and_meta_steps() -> None:
    task = p22_fig29.SCALES["default"].task
    seconds = {p22_fig29.BASE: (10.0, 0.0), p22_fig29.APO[10]: (10.0, 2.0)}
    records = [
        _record(
            trial("SGDm", one, seed, task),
            0.1,
            training_seconds=training,
            meta_seconds=meta,
            evaluation_seconds=5.0,
        )
        for one, (training, meta) in seconds.items()
        for seed in range(2)
    ]
    assert p22_fig29.overhead(p22_fig29.APO[10], records) == "1.2 [1.2, 1.2]"
    (row,) = [row for row in p22_fig29.Intervals().table(records) if "K = 10" in row.label]
    assert row.paper == "1.3"


def test_rho_and_epsilon_are_told_where_they_are_learned() -> None:
    records = _records("p18-fig7")
    rows = p18_fig7.SeveralHyperparameters().table(records)
    for key, name in p18_fig7.NAMES.items():
        notes = [row.note for row in rows if row.label.startswith(f"RMSprop-APO, {name}")]
        assert len(notes) == len(p18_fig7.TRUST_FACTORS)
        for note in notes:
            assert ("ρ ends" in note, "ε ends" in note) == ("rho" in key, "eps" in key)


def test_rosenbrock_starts_where_the_papers_do(toys: dict[str, list[Record]]) -> None:
    for record in toys["p18-fig9"]:
        x, y = POINTS.get(record.options["start"], (1.0, -1.5))
        # at most ten operations on numbers of at most the result's size
        expected = (1 - x) ** 2 + 100 * (y - x**2) ** 2
        assert record.curve("loss")[0] == pytest.approx(expected, rel=10 * np.finfo(float).eps)


def test_the_convolutional_network_is_drawn_from_its_seed() -> None:
    one, same, other = (small_cnn(seed=seed) for seed in (3, 3, 4))
    count = (16 * 25 + 16) + (32 * 16 * 25 + 32) + (10 * 32 * 16 + 10)
    assert sum(p.numel() for p in one.parameters()) == count == 18_378
    assert one(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert all(map(torch.equal, one.parameters(), same.parameters()))
    assert not any(map(torch.equal, one.parameters(), other.parameters()))


@given(examples=st.integers(1, 20), wanted=st.integers(-3, 25))
def test_the_first_examples_are_the_first(examples: int, wanted: int) -> None:
    part = Split(np.arange(2.0 * examples).reshape(-1, 2), np.arange(examples))
    if 1 <= wanted <= examples:
        assert first(part, wanted).inputs.tolist() == [
            [2.0 * i, 2.0 * i + 1] for i in range(wanted)
        ]
        assert first(part, wanted).targets.tolist() == list(range(wanted))
    else:
        with pytest.raises(ValueError, match=rf"`examples` must lie in \[1, {examples}\], got"):
            first(part, wanted)


@pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names no folder with MNIST")
def test_sgd_learns_mnist() -> None:
    # 24 steps at the rate 0.1 on 600 images: far below the loss of guessing, log 10 = 2.3
    experiment = experiments()["p22-fig5"]
    (one,) = [t for t in experiment.plan("smoke", None, []) if t.label == "SGD"]
    outcome = experiment.run(one, Context())
    assert outcome.metrics["loss"] < 1.0
    assert outcome.metrics["test"] < 0.4
