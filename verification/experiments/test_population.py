"""Population based training against a population by hand, and what its comparison with APO says.

The tests of the population itself need Ray, which the extra `sweep` brings.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import Tensor

from experiments.data import Dataset, Split
from experiments.models import mlp
from experiments.paper import p18_fig15
from experiments.paper.p18_fig15 import APO, FIXED, POPULATION, RATES, first_rates, side_by_side
from experiments.problems import Supervised
from experiments.recipes import RMSprop
from experiments.records import Outcome, Record
from experiments.registry import Context, experiments
from experiments.seeds import generator
from experiments.tuning import trial
from verification.experiments.fakes import record_of

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed: the extra `sweep` has it"
)

WIDTHS = (5, 7, 3)
EXAMPLES, BATCH = 50, 16  # four mini-batches an epoch, the last of 2
EPOCHS, SEED = 5, 3
STARTS = (1e-4, 1e30, 1e-2, 0.1)  # the second diverges in the first epoch, and is taken over
EXPERIMENT = experiments()["p18-fig15"]


def _data() -> tuple[Tensor, Tensor]:
    source = generator(7, "task")
    inputs = torch.randn(EXAMPLES, WIDTHS[0], generator=source)
    return inputs, torch.randint(0, WIDTHS[-1], (EXAMPLES,), generator=source)


def _problem() -> Supervised:
    return Supervised(_data(), _data(), "cross_entropy", batch_size=BATCH, seed=SEED)


@pytest.fixture(scope="module")
def trained() -> SimpleNamespace:
    """A population of four that Ray has trained, what it told, and the files that it left."""
    from experiments.population import Population, train_population

    told: list[tuple[int, int, str]] = []
    problem = partial(Supervised, _data(), _data(), "cross_entropy", batch_size=BATCH, seed=SEED)
    threads = torch.get_num_threads()  # a sum's order may depend on it
    population = Population(
        partial(mlp, WIDTHS), problem, RMSprop(1.0), STARTS, EPOCHS, SEED, threads
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(tempfile, "tempdir", folder),
        mock.patch.dict("os.environ", HOME=folder),
    ):
        outcome = train_population(population, lambda *progress: told.append(progress))
        left = [path.name for path in Path(folder).iterdir()]
    return SimpleNamespace(outcome=outcome, told=told, left=left)


def _by_hand() -> tuple[list[tuple[float, float, float]], int]:
    """(loss, error, rate) of the best of four before and after every epoch; all steps taken."""
    inputs, labels = _data()
    factors, order = random.Random(SEED), generator(SEED, "loss")
    networks = [mlp(WIDTHS, seed=SEED + 10_000 * index) for index in range(len(STARTS))]
    optimizers = [
        torch.optim.RMSprop(network.parameters(), lr=lr)
        for network, lr in zip(networks, STARTS, strict=True)
    ]
    taken = 0

    def judged(network: torch.nn.Module, rate: float) -> tuple[float, float, float]:
        with torch.no_grad():
            outputs = network(inputs)
        loss = F.cross_entropy(outputs, labels).item()
        wrong = (outputs.argmax(1) != labels).sum().item() / EXAMPLES
        return (loss, wrong, rate) if math.isfinite(loss) else (math.inf, math.inf, rate)

    points = [min(map(judged, networks, STARTS))]
    for _ in range(EPOCHS):
        batches = torch.randperm(EXAMPLES, generator=order).split(BATCH)
        after = []
        for network, optimizer in zip(networks, optimizers, strict=True):
            for chosen in batches:
                optimizer.zero_grad()
                loss = F.cross_entropy(network(inputs[chosen]), labels[chosen])
                if not torch.isfinite(loss):
                    break
                loss.backward()
                optimizer.step()
                taken += 1
            after.append(judged(network, optimizer.param_groups[0]["lr"]))
        points.append(min(after))
        best, worst = after.index(min(after)), after.index(max(after))
        networks[worst].load_state_dict(networks[best].state_dict())
        optimizers[worst].load_state_dict(copy.deepcopy(optimizers[best].state_dict()))
        optimizers[worst].param_groups[0]["lr"] *= factors.choice((0.8, 1.2))
    return points, taken


@needs_ray
def test_the_population_is_the_one_by_hand_bit_for_bit(trained: SimpleNamespace) -> None:
    curves = trained.outcome.curves
    points, _ = _by_hand()
    assert curves["loss"] == [loss for loss, _, _ in points]
    assert curves["learning_rate"] == [rate for _, _, rate in points]
    assert {*curves["learning_rate"]} - {*STARTS}, "no perturbed rate was ever the best"
    # the share of wrong ones is a mean of float64 ones and zeros in another order: n roundings
    errors = [error for _, error, _ in points]
    assert curves["test"] == pytest.approx(errors, rel=EXAMPLES * np.finfo(float).eps, abs=0)


@needs_ray
def test_costs_are_those_of_all_members(trained: SimpleNamespace) -> None:
    metrics, curves = trained.outcome.metrics, trained.outcome.curves
    _, taken = _by_hand()
    steps = -(-EXAMPLES // BATCH)
    assert curves["step"] == [float(steps * epoch) for epoch in range(EPOCHS + 1)]
    assert metrics["passes"] == curves["passes"][-1] == 3 * taken
    assert taken < len(STARTS) * EPOCHS * steps, "no member diverged"
    assert metrics["training_seconds"] == curves["seconds"][-1] > 0.0
    assert all(np.diff(curves["seconds"]) > 0.0)
    assert metrics["coordination_seconds"] > 0.0
    # parameters, gradients and second moments of each member, and no more than as much again for
    # activations, of 16 examples in layers of 15 units beside 66 parameters
    parameters = sum(p.numel() for p in mlp(WIDTHS, seed=0).parameters())
    least = len(STARTS) * 3 * 4 * parameters
    assert least <= metrics["peak_bytes"] <= 4 * least


@needs_ray
def test_progress_is_told_after_every_epoch_of_a_member(trained: SimpleNamespace) -> None:
    total = len(STARTS) * EPOCHS
    assert [(done, of) for done, of, _ in trained.told] == [
        (done + 1, total) for done in range(total)
    ]
    assert all(text.startswith("loss ") for _, _, text in trained.told)


@needs_ray
def test_ray_leaves_no_files_in_the_temporary_and_the_home_folder(trained: SimpleNamespace) -> None:
    assert trained.left == []


@needs_ray
def test_a_members_exception_is_raised() -> None:
    from experiments import population

    found = SimpleNamespace(errors=[ArithmeticError("a member failed")])
    with (
        mock.patch.object(population, "_session", return_value=nullcontext(Path())),
        mock.patch.object(population, "_fit", return_value=found),
        pytest.raises(ArithmeticError, match="a member failed"),
    ):
        population.train_population(_population((0.1, 0.2)), lambda *_: None)


def _population(rates: Sequence[float]) -> Any:
    from experiments.population import Population

    return Population(partial(mlp, WIDTHS), _problem, RMSprop(1.0), rates, EPOCHS, SEED)


@needs_ray
def test_a_population_is_more_than_one() -> None:
    from experiments.population import train_population

    with pytest.raises(ValueError, match=r"`rates` must hold those of at least two members, got"):
        train_population(_population([0.1]), lambda *_: None)


@needs_ray
def test_every_member_sees_the_mini_batches_of_one_run() -> None:
    from experiments.population import Repeated

    once, again = _problem(), Repeated(_problem())
    expected = [[once.batch("loss") for _ in range(once.steps_per_epoch)] for _ in range(4)]
    for epoch in (0, 0, 1, 1, 1, 3):  # a process that is started late begins where the others are
        assert again.begin(epoch) == once.steps_per_epoch
        for batch in expected[epoch]:
            assert all(map(torch.equal, batch, again.batch("loss")))
    with pytest.raises(ValueError, match="`epoch` must be at least 3, the last that was begun"):
        again.begin(2)


@needs_ray
def test_the_members_are_those_of_the_other_runs() -> None:
    from experiments import population

    images = np.random.default_rng(5).random((120, 1, 28, 28)).astype(np.float32)
    labels = np.arange(120) % 10
    train, test = Split(images[:100], labels[:100]), Split(images[100:], labels[100:])
    context = SimpleNamespace(
        device="cpu", load=lambda name: Dataset(name, train, test, 10, ""), progress=None
    )
    one = EXPERIMENT.plan("default", None, [])[0]
    one = replace(one, seed=2, options=one.options | {"examples": 100, "epochs": 4})
    with mock.patch.object(population, "train_population") as called:
        EXPERIMENT.run(one, context)  # type: ignore[arg-type]
    (built, _), _ = called.call_args
    first, twin = built.network(seed=2), mlp((784, 1000, 1000, 10), seed=2)
    assert all(map(torch.equal, first.parameters(), twin.parameters()))
    assert built.problem().batch("loss")[0].shape == (100, 784)
    assert (built.epochs, built.seed, built.rates) == (4, 2, first_rates(2, 4))


def test_without_ray_the_extra_is_named() -> None:
    one = EXPERIMENT.plan("smoke", None, [])[0]
    without = {name: module for name, module in sys.modules.items() if "population" not in name}
    with (
        mock.patch.dict(sys.modules, {**without, "ray": None}, clear=True),  # type: ignore[dict-item]
        pytest.raises(ModuleNotFoundError, match=r"`ray` must be installed .* extra `sweep`"),
    ):
        EXPERIMENT.run(one, Context())


def test_the_first_rates_are_log_uniform_in_P18s_range() -> None:
    drawn = np.array([first_rates(seed, 4) for seed in range(500)])
    assert len(np.unique(drawn)) == drawn.size
    low, high = np.log(RATES)
    shares = np.sort((np.log(drawn.ravel()) - low) / (high - low))
    assert 0.0 <= shares[0]
    assert shares[-1] <= 1.0
    # Dvoretzky, Kiefer, Wolfowitz: beyond √(log(2/δ) / 2n) with probability δ = 1e-9
    distance = np.abs(shares - np.arange(1, shares.size + 1) / shares.size).max()
    assert distance <= math.sqrt(math.log(2e9) / (2 * shares.size)) + 1 / shares.size


def test_every_method_has_every_seed_and_the_grid_the_populations_passes() -> None:
    trials = EXPERIMENT.plan("default", None, [])
    counts = {label: sum(one.label == label for one in trials) for label in p18_fig15.TEXTS}
    assert counts == {APO.label: 3, POPULATION: 3, FIXED.label: 4 * 3}
    assert {one.options["members"] for one in trials if one.label == POPULATION} == {4}
    assert len({one.name for one in trials}) == len(trials)


def _run(label: str, seed: int, losses: Sequence[float], rate: float = 1e-3) -> Record:
    """A made-up run: a second and three passes a step, with a test error of a tenth of the loss."""
    steps = [float(step) for step in range(len(losses))]
    if label == FIXED.label:
        one = trial(label, RMSprop(rate), seed, {})
    else:
        one = replace(EXPERIMENT.plan("smoke", None, [])[0], seed=seed, label=label)
    curves = {
        "step": steps,
        "seconds": steps,
        "passes": [3 * step for step in steps],
        "loss": list(losses),
        "test": [loss / 10 for loss in losses],
        "learning_rate": [rate] * len(losses),
    }
    metrics = {"training_seconds": steps[-1], "meta_seconds": 0.0, "evaluation_seconds": 0.0}
    metrics |= {"passes": 3 * steps[-1], "peak_bytes": 2.0**20}
    metrics |= {name: curves[name][-1] for name in ("loss", "test")}
    return replace(record_of(), trial=one, outcome=Outcome(metrics, curves))


losses = st.lists(st.floats(1e-3, 10.0) | st.just(math.inf) | st.just(math.nan), min_size=2)


@given(runs=st.lists(losses, min_size=2, max_size=4))
def test_side_by_side_is_the_best_of_all_for_the_time_of_all(runs: list[list[float]]) -> None:
    made = [_run(FIXED.label, 0, run, rate) for run, rate in zip(runs, (1, 2, 3, 4), strict=False)]
    merged = side_by_side(made)
    for at in range(max(map(len, runs))):
        # one that diverged has no further points, and a NaN is no loss
        there = [
            (run[at], rate) for run, rate in zip(runs, (1, 2, 3, 4), strict=False) if at < len(run)
        ]
        finite = [(loss, rate) for loss, rate in there if math.isfinite(loss)]
        assert merged.curve("loss")[at] == min((loss for loss, _ in finite), default=math.inf)
        if finite:
            assert (merged.curve("loss")[at], merged.curve("learning_rate")[at]) in finite
        seconds = sum(min(at, len(run) - 1) for run in runs)
        assert merged.curve("seconds")[at] == seconds
        assert merged.curve("passes")[at] == 3 * seconds
    assert merged.metric("passes") == merged.curve("passes")[-1]
    assert merged.metric("loss") == merged.curve("loss")[-1]


def _made() -> list[Record]:
    """APO at 0.01 and 0.02, the population at 0.04 and 0.02, the best fixed rate at 0.08."""
    fixed = [
        _run(FIXED.label, seed, (2.0, 0.5, end), rate)
        for seed in range(2)
        for rate, end in ((1e-4, 0.3), (1e-3, 0.08))
    ]
    return [
        *fixed,
        _run(APO.label, 0, (2.0, 0.04, 0.01)),
        _run(APO.label, 1, (2.0, 0.5, 0.02)),
        _run(POPULATION, 0, (2.0, 1.0, 0.9, 0.5, 0.04)),
        _run(POPULATION, 1, (2.0, 1.0, 0.9, 0.5, 0.02)),
    ]


def test_the_verdict_has_the_ratios_of_loss_and_of_time_to_the_higher_of_both_losses() -> None:
    apo, grid = EXPERIMENT.verdict(_made()).split("; ")[:2]
    # (0.01/0.04 · 0.02/0.02)^½; 0.04 after 1 of 4 seconds, 0.02 after 2 of 4
    assert f"ends at {math.sqrt(1 / 4):.3g} [" in apo
    assert f"in {math.sqrt(1 / 4 * 2 / 4):.3g} [" in apo
    # 0.08 after 4 seconds where both of the two rates have taken 2
    assert f"ends at {math.sqrt(1 / 2 * 1 / 4):.3g} [" in grid
    assert "in 1 [1, 1] times the seconds and 1 [1, 1] times the passes (n = 2)" in grid


def test_table_figure_and_verdict_do_not_depend_on_the_order_of_records() -> None:
    records = _made()
    assert EXPERIMENT.table(records) == EXPERIMENT.table(records[::-1])
    assert EXPERIMENT.verdict(records) == EXPERIMENT.verdict(records[::-1])
    figure = Figure()
    EXPERIMENT.draw(records, figure)
    for axes in figure.axes:
        assert len(axes.get_lines()) == 2 * 3
        assert axes.get_xlabel() in ("seconds", "passes")
        assert axes.get_yscale() == "log"


def test_a_failed_population_is_told_and_not_left_out() -> None:
    records = [
        replace(one, error="no Ray", outcome=Outcome({})) if one.label == POPULATION else one
        for one in _made()
    ]
    rows = {row.label: row for row in EXPERIMENT.table(records)}
    assert rows[POPULATION].ours == "loss ∞ (2 of 2 diverged)"
    assert "no seed has a finished run of both" in EXPERIMENT.verdict(records)
    EXPERIMENT.draw(records, Figure())
    assert "not yet comparable" in EXPERIMENT.verdict([])


def test_a_grid_with_a_failed_rate_has_failed() -> None:
    first, *rest = _made()
    assert (first.label, first.seed) == (FIXED.label, 0)
    records = [replace(first, error="lost", outcome=Outcome({})), *rest]
    rows = {row.label: row for row in EXPERIMENT.table(records)}
    assert rows[FIXED.label].ours.startswith("loss ∞ (1 of 2 diverged; the others 0.08)")
