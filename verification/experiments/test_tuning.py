"""Choosing and comparing: grids, seeds apart, infinities kept, intervals as SciPy has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy import stats

from experiments.comparison import (
    comparison_row,
    comparison_sentence,
    draw_time_to_target,
    time_to_target,
)
from experiments.intervals import difference_interval, ratio_interval, summary
from experiments.plots import draw_runs
from experiments.recipes import (
    KFAC,
    SGD,
    Adam,
    APOLearningRate,
    APOPrecond,
    Recipe,
    Shampoo,
    recipe,
)
from experiments.records import Outcome, Record
from experiments.tuning import (
    FIRST_TUNING_SEED,
    Method,
    at_edge,
    chosen,
    plan_search,
    runs_of,
    trial,
    tried,
)
from verification.experiments.fakes import record_of
from verification.tolerances import FUNCTION, assert_close

RATES = (0.01, 0.1, 1.0)
METHOD = Method("SGD", tuple(SGD(rate) for rate in RATES))
OTHER = Method("Adam", (Adam(0.01),))
TUNING = FIRST_TUNING_SEED
TASK = {"epochs": 3}
ONE_OF_EACH: tuple[Recipe, ...] = (
    SGD(0.1, momentum=0.9),
    Adam(3e-4),
    KFAC(0.01, 1e-3),
    Shampoo(1.0, interval=2),
    APOLearningRate(1e-5, fsd_weight=0.01),
    APOPrecond(1.0, meta_lr=1e-4, wsd_weight=3.0, warmup_steps=10, structure="Dense"),
)


def _record(one: Recipe, seed: int, loss: float, test: float = 0.5, label: str = "SGD") -> Record:
    outcome = Outcome({"loss": loss, "test": test}, {"step": [0.0, 1.0], "loss": [2.0, loss]})
    return replace(record_of(), trial=trial(label, one, seed, TASK), outcome=outcome)


def _grid(losses: Sequence[float], tests: Sequence[float] = (0.5, 0.5, 0.5)) -> list[Record]:
    return [
        _record(one, TUNING, loss, test)
        for one, loss, test in zip(METHOD.grid, losses, tests, strict=True)
    ]


@pytest.mark.parametrize("one", ONE_OF_EACH, ids=lambda one: type(one).__name__)
def test_a_recipe_comes_back_from_its_options(one: Recipe) -> None:
    assert recipe(one.options()) == one
    assert recipe(trial("label", one, 0, {"dataset": "digits"}).options) == one


def test_trial_names_tell_recipes_seeds_and_data_sets_apart() -> None:
    names = [
        trial("label", one, seed, {"dataset": dataset}).name
        for one in (*ONE_OF_EACH, SGD(0.1), SGD(0.2))
        for seed in (0, 1)
        for dataset in ("parkinsons", "protein")
    ]
    assert len(set(names)) == len(names)
    assert names[0] == "parkinsons-SGD-lr=0.1-momentum=0.9-seed0"


def test_the_grid_comes_first_and_the_chosen_after_it() -> None:
    plan = {"methods": [METHOD], "task": TASK, "tuning_seeds": 1, "seeds": 2}
    records = _grid([0.3, 0.1, 0.2])
    for known in ([], records[:2]):
        assert [one.seed for one in plan_search(**plan, records=known)] == [TUNING] * 3
    both = plan_search(**plan, records=records)
    assert [one.options["lr"] for one in both] == [*RATES, 0.1, 0.1]
    assert [one.seed for one in both] == [TUNING] * 3 + [0, 1]


def test_the_test_set_chooses_nothing() -> None:
    for tests in ([0.0, 0.9, 0.1], [0.9, 0.0, 0.9]):
        assert chosen(METHOD, _grid([0.3, 0.1, 0.2], tests)) == SGD(0.1)


def test_the_reporting_seeds_choose_nothing() -> None:
    records = [*_grid([0.3, 0.1, 0.2]), _record(SGD(0.01), 0, 1e-9)]
    assert chosen(METHOD, records) == SGD(0.1)
    assert chosen(METHOD, records, tuning=False) == SGD(0.01)


def test_one_diverged_run_counts_as_infinite() -> None:
    records = _grid([0.3, 0.1, 0.2]) + [
        _record(one, TUNING + 1, loss)
        for one, loss in zip(METHOD.grid, (0.3, math.inf, 0.2), strict=True)
    ]
    assert chosen(METHOD, records) == SGD(1.0)


def test_runs_of_finds_every_seed_of_one_recipe_alone() -> None:
    records = [_record(SGD(0.1), seed, 0.1) for seed in (3, 0, TUNING)]
    records += [_record(SGD(0.1, momentum=0.9), 1, 0.1), _record(APOLearningRate(0.1), 2, 0.1)]
    assert [run.seed for run in runs_of(SGD(0.1), records)] == [0, 3]
    assert [run.seed for run in runs_of(SGD(0.1), records, tuning=True)] == [TUNING]


def test_a_record_from_before_a_hyperparameter_is_one_of_its_default() -> None:
    run = _record(SGD(0.1), 0, 0.1)
    options = {name: value for name, value in run.options.items() if name != "momentum"}
    before = replace(run, trial=replace(run.trial, options=options))
    assert runs_of(SGD(0.1), [before]) == [before]
    assert not runs_of(SGD(0.1, momentum=0.9), [before])
    assert not runs_of(SGD(0.2), [before])


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(0.01, "lr at the grid's edge"), (0.1, ""), (1.0, "lr at the grid's edge")],
)
def test_a_choice_at_the_edge_of_the_grid_is_told(rate: float, expected: str) -> None:
    assert at_edge(METHOD, SGD(rate)) == expected


def test_the_edge_is_that_of_what_was_tried() -> None:
    part = tried(METHOD, _grid([0.3, 0.1, 0.2])[:2])
    assert part.grid == METHOD.grid[:2]
    assert at_edge(part, SGD(0.1)) == ""  # two values have no interior


finite = st.floats(-10, 10)


@given(st.lists(st.tuples(finite, finite), min_size=3, max_size=8))
def test_the_interval_is_students(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = (list(column) for column in zip(*pairs, strict=True))
    differences = np.subtract(ours, theirs)
    interval = difference_interval(ours, theirs)
    assert interval.n == len(pairs)
    deviation = float(differences.std(ddof=1))
    if deviation < 1e-6:
        return
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    # a variance: differences cancel against their mean, which a small deviation amplifies
    condition = (1.0 + float(np.abs(pairs).max()) / deviation) ** 2
    assert_close(
        [interval.low, interval.mean, interval.high],
        [expected.low, differences.mean(), expected.high],
        FUNCTION,
        condition=condition,
        scale=float(np.abs(pairs).max()),
    )


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6), st.floats(0.1, 10.0))
def test_a_constant_ratio_is_found_exactly(theirs: list[float], factor: float) -> None:
    interval = ratio_interval([factor * loss for loss in theirs], theirs)
    # logarithms up to log 1e4 = 9.2 are subtracted and exponentiated: their error is relative to 1;
    # the half width is t(1) = 12.7 times a standard error of that size
    for value in (interval.low, interval.mean, interval.high):
        assert_close(value, factor, FUNCTION, size=len(theirs), condition=9.2 * 12.7)


def test_one_pair_has_no_interval() -> None:
    interval = difference_interval([1.0], [0.25])
    assert (interval.mean, interval.low, interval.high) == (0.75, -math.inf, math.inf)
    ratio = ratio_interval([1.0], [0.25])
    assert (ratio.low, ratio.high) == (0.0, math.inf)


def test_a_diverged_run_leaves_no_interval() -> None:
    interval = ratio_interval([math.inf, 1.0], [1.0, 1.0])
    assert (interval.mean, interval.low, interval.high) == (math.inf, 0.0, math.inf)
    assert str(interval) == "inf [0, inf]"


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0])])
def test_unpaired_runs_are_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match=r"`ours` and `theirs` must be paired and not empty"):
        difference_interval(ours, theirs)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5], "0.5"),
        ([1.0, 2.0, 3.0], "2 ± 1 (1 … 3)"),
        ([1.0, math.inf], "∞ (1 of 2 diverged; the others 1)"),
        ([math.inf, math.inf], "∞ (2 of 2 diverged)"),
    ],
)
def test_a_summary_drops_nothing(values: list[float], expected: str) -> None:
    assert summary(values) == expected


def test_a_row_reports_the_chosen_recipe_over_the_reporting_seeds() -> None:
    records = [*_grid([0.3, 0.1, 0.2]), _record(SGD(0.1), 0, 1.0), _record(SGD(0.1), 1, 3.0)]
    row = comparison_row(METHOD, records, "figure only")
    assert (row.label, row.n, row.paper) == ("SGD", 2, "figure only")
    assert row.ours == "2 ± 1.4 (1 … 3)"
    assert row.note == "best of 3: η = 0.1"


def _timed(seed: int, losses: Sequence[float], seconds: Sequence[float]) -> Record:
    """A run of the middle rate that took so long to each loss."""
    curves = {"step": [0.0, 1.0, 2.0], "loss": list(losses), "seconds": list(seconds)}
    metrics = {"loss": losses[-1], "training_seconds": seconds[-1], "meta_seconds": 1.0}
    record = _record(SGD(0.1), seed, losses[-1])
    return replace(record, outcome=Outcome({**metrics, "passes": 6.0}, curves))


def test_a_row_tells_the_median_cost_of_the_runs_that_measured_it() -> None:
    runs = [_timed(seed, (4.0, 2.0, 1.0), (0.0, 1.0, 2.0 + seed)) for seed in range(2)]
    records = [*_grid([0.3, 0.1, 0.2]), *runs, _record(SGD(0.1), 2, 3.0)]
    # 3 s and 4 s, meta-steps included; the third run is of a record that measured nothing
    assert comparison_row(METHOD, records, "–").costs == {"seconds": "3.5", "passes": "6"}


@given(
    losses=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8),
    target=st.floats(1e-3, 1e3),
)
def test_the_time_to_a_target_is_that_of_the_first_loss_at_or_below_it(
    losses: list[float], target: float
) -> None:
    seconds = [float(i) for i in range(len(losses))]
    run = replace(_record(SGD(0.1), 0, 1.0), outcome=Outcome({}, {"s": seconds, "loss": losses}))
    below = [i for i, loss in enumerate(losses) if loss <= target]
    assert time_to_target(run, target, "s") == (below[0] if below else math.inf)


def test_times_to_targets_are_drawn_until_the_median_run_gets_no_further() -> None:
    runs = [
        _timed(0, (8.0, 3.9, 1.0), (0.0, 1.0, 2.0)),
        _timed(1, (8.0, 3.9, 1.9), (0.0, 3.0, 4.0)),
        _timed(2, (8.0, 8.0, 8.0), (0.0, 5.0, 6.0)),
    ]
    axes = Figure().subplots()
    # four levels: 8, 4, 2, 1; the median run reaches 4 after 3 s, 2 after 4 s, 1 never
    draw_time_to_target(axes, [METHOD], [*_grid([0.3, 0.1, 0.2]), *runs], targets=4)
    (line,) = axes.get_lines()
    np.testing.assert_array_equal(
        np.asarray(line.get_ydata(), float)[[0, 2, 3]], [0.0, 4.0, np.nan]
    )
    assert axes.get_xlim()[0] > axes.get_xlim()[1]


def test_a_self_tuning_method_says_so() -> None:
    records = [*_grid([0.3, 0.1, 0.2]), _record(SGD(0.1), 0, 1.0)]
    row = comparison_row(replace(METHOD, track="self-tuning"), records, "–")
    assert row.note == "self-tuning, best of 3: η = 0.1"
    assert tried(replace(METHOD, track="self-tuning"), records).track == "self-tuning"


def test_a_comparison_is_paired_by_seed() -> None:
    adam = OTHER.grid[0]
    records = [
        *_grid([0.3, 0.1, 0.2]),
        *(_record(SGD(0.1), seed, 2.0 * 10.0**seed) for seed in range(3)),
        *(_record(adam, seed, 10.0**seed, label="Adam") for seed in (2, 0, 1)),
        _record(adam, TUNING, 0.1, label="Adam"),
    ]
    # unpaired, losses over two decades would leave an interval of decades
    assert "2 [2, 2] times that of Adam" in comparison_sentence(METHOD, [OTHER], records)


def test_a_line_is_the_median_and_names_diverged_runs() -> None:
    axes = Figure().subplots()
    runs = [_record(SGD(0.1), seed, loss) for seed, loss in enumerate((1.0, 3.0, math.inf))]
    runs[2] = replace(runs[2], outcome=Outcome({"loss": math.inf}, {"step": [0.0], "loss": [2.0]}))
    draw_runs(axes, runs, "loss", "SGD")
    (line,) = axes.get_lines()
    assert line.get_label() == "SGD (1 of 3 diverged)"
    assert np.asarray(line.get_ydata()).tolist() == [2.0, 3.0]
