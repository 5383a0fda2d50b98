"""The experiments at smoke scale: every trial runs, and table, figure and verdict come of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from experiments.data import Dataset, Split
from experiments.models import mlp
from experiments.paper.p22_fig3 import UCIRegression
from experiments.paper.p22_fig4_left import CONDITION, LinearRegression, ill_conditioned
from experiments.paper.p22_fig7 import COARSE, fine_grid
from experiments.recipes import SGD
from experiments.records import Record, read_records
from experiments.registry import Experiment, experiments
from experiments.runner import record_folder, run_experiment
from experiments.watch import LineWatch
from verification.tolerances import ROUNDING, assert_close

TRAININGS = ("digits", "p22-fig7", "p22-fig4-left")
THEORY = ("p18-tab2", "p18-thm1", "p22-fig1")
EMBEDDED = (*TRAININGS, *THEORY)
SEED = 4


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    """The records of the embedded experiments at smoke scale."""
    out: Path = tmp_path_factory.mktemp("smoke")
    for name in EMBEDDED:
        run_experiment(experiments()[name], "smoke", out, LineWatch(lambda text: None))
    return {
        name: list(read_records(record_folder(out, "smoke", name)).values()) for name in EMBEDDED
    }


def _shown(experiment: Experiment, records: list[Record]) -> Figure:
    """The figure, once the experiment has drawn it."""
    figure = Figure()
    experiment.draw(records, figure)
    return figure


@pytest.mark.parametrize("name", EMBEDDED)
def test_no_trial_fails(smoke: dict[str, list[Record]], name: str) -> None:
    assert [record.error for record in smoke[name] if record.error] == []


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_panel_has_lines_and_the_figure_named_axes(
    smoke: dict[str, list[Record]], name: str
) -> None:
    panels = _shown(experiments()[name], smoke[name]).axes
    assert all(axes.get_lines() for axes in panels)
    assert any(axes.get_xlabel() for axes in panels)  # shared axes are named once
    assert any(axes.get_ylabel() for axes in panels)
    if name in TRAININGS:
        assert all(axes.get_yscale() == "log" for axes in panels)


@pytest.mark.parametrize("name", EMBEDDED)
def test_rows_do_not_depend_on_the_order_of_records(
    smoke: dict[str, list[Record]], name: str
) -> None:
    experiment, records = experiments()[name], smoke[name]
    assert experiment.table(records) == experiment.table(records[::-1])
    assert experiment.verdict(records) == experiment.verdict(records[::-1])


def test_digits_are_learned(smoke: dict[str, list[Record]]) -> None:
    # 12 epochs at the rate 0.1: far below the loss of guessing, log 10 = 2.3
    (run,) = [r for r in smoke["digits"] if r.trial.name == "SGD-lr=0.1-seed0"]
    assert run.metric("loss") < 0.7
    assert run.metric("test") < 0.2


def test_apo_brings_a_small_learning_rate_up(smoke: dict[str, list[Record]]) -> None:
    runs = [r for r in smoke["digits"] if r.options["optimizer"] == "APOLearningRate"]
    assert runs
    for run in runs:
        assert run.curve("learning_rate")[-1] > run.options["lr"]


def test_rosenbrock_diverges_above_the_inverse_curvature(smoke: dict[str, list[Record]]) -> None:
    # at (1, −1.5) the Hessian's largest eigenvalue is about 1,900: a rate of 0.003 > 2/1,900 leaves
    rates = {
        r.options["lr"]: r.status for r in smoke["p22-fig7"] if r.options["optimizer"] == "SGD"
    }
    assert {rate for rate, status in rates.items() if status == "diverged"} == {
        rate for rate in rates if rate >= 0.003
    }


def test_the_fine_grid_lies_between_the_coarse_neighbours() -> None:
    rates = [one.lr for one in COARSE.grid if isinstance(one, SGD)]
    fine = fine_grid(rates[3], 15)
    assert len(fine) == 15
    assert rates[2] < min(fine) < rates[3] < max(fine) < rates[4]


def test_the_matrix_has_the_condition_number() -> None:
    A = ill_conditioned(10, 6, CONDITION, SEED)
    values = torch.linalg.svdvals(A).numpy()
    expected = CONDITION ** -np.linspace(0.0, 1.0, 6)
    # singular values are known to eps times the largest, which is 1: the error is normwise
    assert_close(values, expected, ROUNDING, size=10, iterations=3)


def test_the_loss_is_the_exact_expectation() -> None:
    A = ill_conditioned(10, 6, 1e3, SEED)
    model = mlp((6, 6, 10), seed=1, activation=None, bias=False, dtype=torch.float64)
    W1, W2 = (p.detach().numpy() for p in model.parameters())
    expected = float(np.linalg.norm(A.numpy() - W2 @ W1, "fro") ** 2)
    problem = LinearRegression(A, 100_000, seed=0)
    assert_close(problem.evaluate(model)["loss"], expected, ROUNDING, size=60, iterations=2)
    # the mini-batch loss is ½‖·‖²: its relative deviation is at most √(2/n) for Gaussian inputs,
    # and six of them are exceeded with probability 1e-9
    sampled = 2 * problem.loss(model, problem.batch("loss")).item()
    assert abs(sampled / expected - 1) < 6 * np.sqrt(2 / 100_000)


class _SmallUCI:
    """A context whose data sets are small: a linear function with noise."""

    device = "cpu"

    def load(self, name: str, *, seed: int = 0) -> Dataset:
        """300 examples with 4 inputs, whatever the name."""
        source = np.random.default_rng(SEED)
        inputs = source.normal(size=(300, 4))
        targets = inputs @ source.normal(size=(4, 1)) + 0.1 * source.normal(size=(300, 1))
        part, rest = Split(inputs[:250], targets[:250]), Split(inputs[250:], targets[250:])
        return Dataset(name, part, rest, 0, "")

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Nothing."""


def test_uci_trials_run_on_data_of_that_form() -> None:
    experiment = UCIRegression()
    trials = experiment.plan("smoke", None, [])
    labels = {one.label for one in trials}
    assert labels == {"SGDm", "Adam", "Shampoo", "KFAC", "APO-Precond"}
    context = _SmallUCI()
    for one in trials:
        if one.options["dataset"] == "parkinsons":
            outcome = experiment.run(one, context)  # type: ignore[arg-type]
            assert outcome.metrics["loss"] < outcome.curves["loss"][0], one.name


def test_the_uci_grids_are_the_papers() -> None:
    # P22 appendix B.2: 9 rates of SGDm, 5 of Adam, 9 of Shampoo, 6 × 6 of KFAC; λ_WSD × α × P₀
    plan = UCIRegression().plan("paper", None, [])
    counts: dict[str, int] = {}
    for one in plan:
        if one.options["dataset"] == "protein":
            counts[one.label] = counts.get(one.label, 0) + 1
    assert counts == {"SGDm": 9, "Adam": 5, "Shampoo": 9, "KFAC": 36, "APO-Precond": 4 * 2 * 3}
    assert {one.options["epochs"] for one in plan} == {500}


def test_the_printed_condition_of_theorem_1_fails_between_two_turns_of_a_helix(
    smoke: dict[str, list[Record]],
) -> None:
    (helix,) = [r for r in smoke["p18-thm1"] if r.options["family"] == "helix"]
    assert helix.metric("failed") == helix.metric("cells") > 0
    assert all(ratio < 0.5 for ratio in helix.curve("ratio"))
