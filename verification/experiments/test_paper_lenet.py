"""The experiments on LeNet and the autoencoder, and the gap: plans, runs, verdicts; no data."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.autograd.functional import jvp
from torch.func import functional_call
from torch.nn.functional import log_softmax

from experiments.data import Dataset, Split
from experiments.gap import (
    FSD_WEIGHT,
    INITIAL_RATE,
    WSD_WEIGHT,
    GapExperiment,
    QuadraticAPO,
    judged_by_gap,
    late_share,
)
from experiments.models import mlp
from experiments.paper.p22_fig4_right import DeepAutoencoder
from experiments.paper.p22_fig24 import VARIANTS, MiniBatches, apo
from experiments.paper.p22_fig27 import LeNetPreconditioners, decayed
from experiments.problems import Supervised
from experiments.recipes import SGD, APOPrecond
from experiments.records import Outcome, Record, Trial
from experiments.registry import Context, Experiment, Preset
from verification.experiments.fakes import record_by
from verification.tolerances import FUNCTION, ROUNDING, assert_close

EXPERIMENTS: tuple[Experiment, ...] = (
    MiniBatches(),
    LeNetPreconditioners(),
    DeepAutoencoder(),
    GapExperiment(),
)
NAMES = [experiment.name for experiment in EXPERIMENTS]
SEED = 3
TRAINED, HELD_OUT = 500, 60


class _Images:
    """A context whose data sets are small: noise around one random image a class."""

    device = "cpu"

    def load(self, name: str, *, seed: int = 0) -> Dataset:
        """500 examples to train on and 60 held out, in the form of that set."""
        shape = {"cifar-10": (3, 32, 32), "mnist": (1, 28, 28), "digits": (64,)}[name]
        source = np.random.default_rng(SEED)
        centres = source.random((10, *shape))
        labels = source.integers(0, 10, TRAINED + HELD_OUT)
        noise = source.random((TRAINED + HELD_OUT, *shape))
        inputs = (0.7 * centres[labels] + 0.3 * noise).astype(np.float32)
        parts = (slice(None, TRAINED), slice(TRAINED, None))
        train, test = (Split(inputs[part], labels[part]) for part in parts)
        return Dataset(name, train, test, 10, "")

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Nothing."""


def _record(
    experiment: Experiment, trial: Trial, outcome: Outcome, preset: Preset = "smoke"
) -> Record:
    return record_by(experiment.name, trial, outcome, preset)


def _all_records(experiment: Experiment) -> list[Record]:
    """The records of every round of the plan at smoke scale, on the small data."""
    context, done = _Images(), {}
    while due := [
        trial
        for trial in experiment.plan("smoke", None, list(done.values()))
        if trial.name not in done
    ]:
        for trial in due:
            outcome = experiment.run(trial, context)  # type: ignore[arg-type]
            done[trial.name] = _record(experiment, trial, outcome)
    return list(done.values())


@pytest.fixture(scope="module")
def smoke() -> dict[str, list[Record]]:
    """The records of every experiment at smoke scale."""
    with (
        mock.patch("experiments.paper.p22_fig24.TEST_IMAGES", HELD_OUT),
        mock.patch("experiments.paper.p22_fig4_right.TEST_IMAGES", HELD_OUT),
    ):
        return {experiment.name: _all_records(experiment) for experiment in EXPERIMENTS}


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=NAMES)
def test_every_panel_has_lines_and_named_axes(
    smoke: dict[str, list[Record]], experiment: Experiment
) -> None:
    figure = Figure()
    experiment.draw(smoke[experiment.name], figure)
    for axes in figure.axes:
        assert axes.get_lines()
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert axes.get_yscale() == "log"


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=NAMES)
def test_table_and_verdict_do_not_depend_on_the_order_of_records(
    smoke: dict[str, list[Record]], experiment: Experiment
) -> None:
    records = smoke[experiment.name]
    assert experiment.table(records) == experiment.table(records[::-1])
    assert experiment.verdict(records) == experiment.verdict(records[::-1])


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=NAMES)
def test_a_plan_begins_with_the_trials_of_the_round_before(
    smoke: dict[str, list[Record]], experiment: Experiment
) -> None:
    early = experiment.plan("smoke", None, [])
    late = experiment.plan("smoke", None, smoke[experiment.name])
    assert late[: len(early)] == early
    assert {one.name for one in late} == {record.trial.name for record in smoke[experiment.name]}


@pytest.mark.parametrize("experiment", EXPERIMENTS[:3], ids=NAMES[:3])
def test_each_figure_has_a_row_for_every_method_that_ran(
    smoke: dict[str, list[Record]], experiment: Experiment
) -> None:
    labels = " ".join(row.label for row in experiment.table(smoke[experiment.name]))
    assert all(record.trial.label in labels for record in smoke[experiment.name])


@pytest.mark.parametrize("experiment", EXPERIMENTS[:3], ids=NAMES[:3])
def test_the_first_trials_run_on_the_real_data(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = {"cifar-10": "cifar-10-batches-bin", "mnist": "mnist"}[experiment.datasets[0]]
    named = os.environ.get("APO_DATA_DIR")
    if not named or not (Path(named) / folder).is_dir():
        pytest.skip(f"needs the real data: set APO_DATA_DIR to a folder that holds {folder}")
    outcome = experiment.run(experiment.plan("smoke", None, [])[0], Context())
    assert np.isfinite(outcome.metrics["loss"])


def test_the_three_choices_of_mini_batches_move_the_rate_differently(
    smoke: dict[str, list[Record]],
) -> None:
    ends = {
        run.trial.label: run.curve("learning_rate")[-1]
        for run in smoke["p22-fig24"]
        if run.options.get("fsd_weight")
    }
    assert set(ends) == set(VARIANTS)
    assert len(set(ends.values())) == 3


def test_every_variant_is_tried_alike_with_every_weight_and_seed() -> None:
    plan = MiniBatches().plan("default", None, [])
    cells = {
        name: sorted((one.seed, one.options["fsd_weight"]) for one in plan if one.label == name)
        for name in VARIANTS
    }
    without = sorted({(seed, 0.0) for seed, _ in cells["eq. 12"]})
    assert cells["eq. 12"] == cells["eq. 14"]
    assert cells["eq. 13"] == sorted(cells["eq. 12"] + without)


def _mini_batch_run(name: str, seed: int, rate: float, loss: float) -> Record:
    options = {**apo(0.1).options(), **VARIANTS[name]}
    curves = {"step": [0.0, 1.0], "loss": [2.3, loss], "learning_rate": [0.1, rate]}
    trial = Trial(f"{name[-2:]}-{seed}", options, seed, name)
    return _record(MiniBatches(), trial, Outcome({"loss": loss}, curves))


def test_the_verdict_pairs_the_variants_by_seed() -> None:
    records = [
        _mini_batch_run(name, seed, rate * 10.0**seed, loss * 10.0**-seed)
        for seed in range(3)
        for name, rate, loss in (("eq. 12", 0.4, 1.0), ("eq. 13", 0.1, 2.0))
    ]
    verdict = MiniBatches().verdict(records)
    # unpaired, the rates' two decades would leave an interval of decades
    assert "eq. 13, λ_FSD = 0.1: 0.25 [0.25, 0.25] times the learning rate" in verdict
    assert "2 [2, 2] times the training loss of eq. 12 (n = 3)" in verdict
    assert "eq. 14" not in verdict


def _lenet_record(trial: Trial, validation: float, loss: float) -> Record:
    outcome = Outcome({"loss": loss, "validation": validation}, {"step": [0.0], "loss": [loss]})
    return _record(LeNetPreconditioners(), trial, outcome, "default")


def test_the_recipe_with_the_least_validation_error_is_trained_again_on_both_parts() -> None:
    experiment = LeNetPreconditioners()
    plan = experiment.plan("default", None, [])
    # the best on the validation part is the worst on the training part
    records = [
        _lenet_record(one, validation=0.5 + 0.01 * (n % 8), loss=9.0 - n % 8)
        for n, one in enumerate(plan)
    ]
    final = experiment.plan("default", None, records)[len(plan) :]
    firsts = {plan[n].label: plan[n] for n in range(0, len(plan), 8)}
    assert len(firsts) == 4
    assert len(plan) + len(final) <= 40
    for one in final:
        chosen = firsts[one.label].options
        assert one.options == {**chosen, "examples": 15_000, "held_out": 0}


def test_the_test_set_is_looked_at_by_the_final_runs_alone(smoke: dict[str, list[Record]]) -> None:
    for run in smoke["p22-fig27"]:
        final = run.options["held_out"] == 0
        assert ("test" in run.outcome.metrics) == final
        assert ("validation" in run.outcome.metrics) == (not final)


def test_the_ablation_is_the_papers() -> None:
    plan = LeNetPreconditioners().plan("paper", None, [])
    counts: dict[str, int] = {}
    for one in plan:
        counts[one.label] = counts.get(one.label, 0) + 1
    # P22 appendix B.4: 8 rates, 6 of them, 8 × 6; λ_FSD × λ_WSD × α
    assert counts == {"SGDm": 8, "Adam": 6, "KFAC": 48, "APO-Precond": 2 * 4 * 2}
    weights = {(one.options["fsd_weight"], one.options["wsd_weight"]) for one in plan[-16:]}
    assert weights == {(fsd, wsd) for fsd in (0.3, 0.1) for wsd in (3.0, 1.0, 0.3, 0.1)}


def test_a_diverged_cell_is_counted_and_not_averaged() -> None:
    experiment = LeNetPreconditioners()
    trials = [one for one in experiment.plan("default", None, []) if one.label == "APO-Precond"]
    errors = [0.4, float("inf"), *[0.5] * 6]
    records = [
        _lenet_record(one, validation=error, loss=1.0)
        for one, error in zip(trials, errors, strict=True)
    ]
    verdict = experiment.verdict(records)
    assert "Over 8 cells of λ_FSD and λ_WSD, 1 diverge" in verdict
    assert "lies between 50.0 and 60.0 %" in verdict


@pytest.mark.parametrize("kind", ["torch", "APO"])
def test_the_rate_falls_by_five_at_the_papers_milestones(kind: str) -> None:
    model = mlp((3, 2), seed=0)
    problem = Supervised(_points(), _points(), "cross_entropy", batch_size=4, seed=0)
    one = SGD(0.5) if kind == "torch" else APOPrecond(0.1, meta_lr=1e-3, warmup_steps=2)
    optimizer = decayed(one.build(model, problem), steps=10)
    initial = optimizer.param_groups[0]["lr"]
    used = []
    for _ in range(10):
        used.append(optimizer.param_groups[0]["lr"] / initial)
        optimizer.zero_grad()
        problem.loss(model, problem.batch("loss")).backward()
        optimizer.step()
    # 60, 120 and 160 of 200 epochs are 3, 6 and 8 of 10 steps
    assert_close(used, [1.0] * 3 + [0.2] * 3 + [0.2**2] * 2 + [0.2**3] * 2, ROUNDING, iterations=3)


def _points() -> tuple[Tensor, Tensor]:
    source = np.random.default_rng(SEED)
    return torch.tensor(source.normal(size=(12, 3))).float(), torch.arange(12) % 2


def test_the_autoencoders_discrepancy_is_that_of_its_pixels() -> None:
    model, pixels = mlp((6, 3, 6), seed=0, activation=nn.Sigmoid), torch.rand(8, 6)
    problem = Supervised((pixels, pixels), (pixels, pixels), "bernoulli", batch_size=4, seed=0)
    optimizer = APOPrecond(0.1, 1e-3, fsd_weight=0.3, wsd_weight=2.0).build(model, problem)
    objective = optimizer.objective  # type: ignore[attr-defined]
    assert (objective.fsd_weight, objective.wsd_weight) == (0.3, 2.0)
    before, after = (np.random.default_rng(s).normal(size=(5, 6)) for s in (0, 1))
    p, q = 1 / (1 + np.exp(-after)), 1 / (1 + np.exp(-before))
    expected = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(axis=1).mean()
    found = objective.discrepancy(torch.tensor(after), torch.tensor(before))
    # the terms of a KL cancel: their magnitude is Σ |log p/q| at most, here below 50 times the KL
    size = np.abs(np.log(p / q)).sum() + np.abs(np.log((1 - p) / (1 - q))).sum()
    assert_close(found.item(), expected, FUNCTION, size=60, scale=size)


def test_the_share_is_that_of_the_parabola_in_the_learning_rate() -> None:
    # Q̂(η) = −aη + bη²/2 for SGD: its minimum is −a²/2b, and the share is (1 − ηb/a)²
    model = mlp((3, 4, 2), seed=1, dtype=torch.float64)
    inputs, labels = _points()
    data = (inputs.double(), labels)
    problem = Supervised(data, data, "cross_entropy", batch_size=4, seed=0)
    optimizer = QuadraticAPO("SGD", 1).build(model, problem)
    pairs = [(problem.batch("loss"), problem.batch("discrepancy")) for _ in range(3)]
    values = judged_by_gap(problem, optimizer, pairs, solver_steps=100).evaluate(model)

    params = dict(model.named_parameters())
    a = b = 0.0
    for batch, (other, _) in pairs:
        grads = torch.autograd.grad(problem.loss(model, batch), list(params.values()))
        z, moved = jvp(
            lambda *p, x=other: functional_call(model, dict(zip(params, p, strict=True)), (x,)),
            tuple(p.detach() for p in params.values()),
            grads,
        )
        assert isinstance(z, Tensor)
        assert isinstance(moved, Tensor)
        p = log_softmax(z, dim=1).exp()
        variance = (p * moved.square()).sum(1) - (p * moved).sum(1).square()
        norm = sum(g.square().sum().item() for g in grads)
        a += norm / len(pairs)
        b += (FSD_WEIGHT * variance.mean().item() + WSD_WEIGHT * norm) / len(pairs)
    expected = (1 - INITIAL_RATE * b / a) ** 2
    # about 30 parameters and 12 outputs are summed; the solver stops where a round of L-BFGS finds
    # nothing lower that rounding shows, √n eps of the terms of Q̂: that is its error in min Q̂
    condition = 1 + (INITIAL_RATE * a + INITIAL_RATE**2 * b) / (a**2 / (2 * b))
    assert values["converged"] == 1.0
    assert_close(values["best"], a**2 / (2 * b), FUNCTION, size=42, condition=condition)
    assert_close(values["share"], expected, FUNCTION, size=42, condition=condition, scale=1.0)


def test_the_late_share_is_the_median_of_the_second_half() -> None:
    experiment = GapExperiment()
    trial = experiment.plan("smoke", None, [])[0]
    curves = {"step": [0.0] * 4, "share": [9.0, 8.0, 3.0, 1.0]}
    run = _record(experiment, trial, Outcome({"loss": 1.0}, curves))
    assert late_share(run) == 2.0
    diverged = replace(run, outcome=Outcome({"loss": float("inf")}, curves))
    assert late_share(diverged) == float("inf")


def test_the_verdict_on_the_gap_pairs_k_by_seed() -> None:
    experiment = GapExperiment()
    records = []
    for trial in experiment.plan("default", None, []):
        share = 0.1 * trial.options["interval"] ** 0.5 * 2.0**trial.seed
        outcome = Outcome({"loss": 1.0}, {"step": [0.0], "share": [share]})
        records.append(_record(experiment, trial, outcome))
    verdict = experiment.verdict(records)
    assert "learning rate: the gap at K = 100 is 10 [10, 10] times that at K = 1" in verdict
    assert "diagonal: the gap at K = 10 is 3.16 [3.16, 3.16] times that at K = 1" in verdict
