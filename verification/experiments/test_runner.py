"""The runner: rounds, resumption, failures; and the watches that show it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from experiments.data import DataError
from experiments.records import RecordError, read_records, write_record
from experiments.registry import Experiment, register
from experiments.runner import record_folder, run_experiment
from experiments.watch import BarWatch, LineWatch
from verification.experiments.fakes import Descent, lasting, record_of

GRID = ["rate-0.1-seed-0", "rate-1.0-seed-0", "rate-10.0-seed-0"]
BEST = ["rate-1.0-seed-1", "rate-1.0-seed-2"]  # a rate of 1 reaches the minimum in one step


def _run(experiment: Experiment, out: Path, lines: list[str] | None = None, **options):
    watch = LineWatch([].append if lines is None else lines.append)
    return run_experiment(experiment, options.pop("preset", "default"), out, watch, **options)


def test_the_best_of_the_grid_gets_the_other_seeds(tmp_path: Path) -> None:
    experiment = Descent()
    tally = _run(experiment, tmp_path)
    assert experiment.ran == tally.planned == [*GRID, *BEST]
    assert tally.kept == tally.failed == []
    assert tally.diverged == ["rate-10.0-seed-0"]
    folder = record_folder(tmp_path, "default", "descent")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{name}.json" for name in tally.planned
    )


def test_a_second_run_keeps_every_record(tmp_path: Path) -> None:
    _run(Descent(), tmp_path)
    before = read_records(record_folder(tmp_path, "default", "descent"))
    again = Descent()
    tally = _run(again, tmp_path)
    assert again.ran == []
    assert tally.kept == tally.planned
    assert repr(read_records(record_folder(tmp_path, "default", "descent"))) == repr(before)


def test_more_seeds_run_only_those(tmp_path: Path) -> None:
    _run(Descent(), tmp_path)
    again = Descent()
    _run(again, tmp_path, seeds=5)
    assert again.ran == ["rate-1.0-seed-3", "rate-1.0-seed-4"]


def test_a_changed_option_runs_again_and_says_so(tmp_path: Path) -> None:
    _run(Descent(), tmp_path)
    lines: list[str] = []
    again = Descent(power=301.0)
    tally = _run(again, tmp_path, lines)
    assert again.ran == tally.planned
    assert f"{GRID[0]} was recorded with power 300.0, now 301.0; it runs again." in lines


def test_presets_do_not_overwrite_each_other(tmp_path: Path) -> None:
    _run(Descent(), tmp_path, preset="smoke")
    again = Descent()
    _run(again, tmp_path, preset="default")
    assert again.ran == [*GRID, *BEST]
    smoke = read_records(record_folder(tmp_path, "smoke", "descent"))
    assert {record.options["steps"] for record in smoke.values()} == {10}


def test_a_failed_trial_is_recorded_and_the_others_run_on(tmp_path: Path) -> None:
    experiment = Descent(faults={GRID[1]: ArithmeticError("no digits left")})
    tally = _run(experiment, tmp_path)
    assert tally.failed == [GRID[1]]
    # It counts as infinite: the next best rate gets the seeds.
    assert experiment.ran == [*GRID, "rate-0.1-seed-1", "rate-0.1-seed-2"]
    failed = read_records(record_folder(tmp_path, "default", "descent"))[GRID[1]]
    assert failed.error == "ArithmeticError: no digits left"
    assert failed.outcome.metrics == {}


def test_a_failed_trial_is_tried_again(tmp_path: Path) -> None:
    _run(Descent(faults={GRID[1]: ArithmeticError("no digits left")}), tmp_path)
    lines: list[str] = []
    again = Descent()
    tally = _run(again, tmp_path, lines)
    assert again.ran == [GRID[1], *BEST]
    assert tally.failed == []
    assert any("failed before (ArithmeticError: no digits left)" in line for line in lines)
    assert any("2 records" in line and "belong to no trial of this run" in line for line in lines)


def test_an_interruption_leaves_the_finished_records(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _run(Descent(faults={GRID[2]: KeyboardInterrupt()}), tmp_path)
    assert sorted(read_records(record_folder(tmp_path, "default", "descent"))) == GRID[:2]


@given(settled=st.sets(st.sampled_from([*GRID, *BEST])))
def test_resuming_from_any_part_ends_with_the_same_records(
    settled: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole, part = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("part")
    _run(Descent(), whole)
    records = read_records(record_folder(whole, "default", "descent"))
    for name in settled:
        write_record(record_folder(part, "default", "descent") / f"{name}.json", records[name])
    again = Descent()
    _run(again, part)
    assert sorted(again.ran) == sorted({*GRID, *BEST} - settled)
    assert lasting(read_records(record_folder(part, "default", "descent"))) == lasting(records)


def test_a_damaged_record_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    folder = record_folder(tmp_path, "default", "descent")
    folder.mkdir(parents=True)
    (folder / f"{GRID[0]}.json").write_text("{")
    experiment = Descent()
    with pytest.raises(RecordError, match="must be a record of schema 1"):
        _run(experiment, tmp_path)
    assert experiment.ran == []


def test_data_that_cannot_be_had_stops_the_run_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APO_DATA_DIR", str(tmp_path / "nowhere"))
    experiment = Descent(datasets=("parkinsons",))
    with pytest.raises(DataError, match="`APO_DATA_DIR` must name a folder"):
        _run(experiment, tmp_path / "out")
    assert experiment.ran == []
    assert not (tmp_path / "out").exists()


def test_a_plan_with_two_trials_of_one_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = record_of().trial
    monkeypatch.setattr(Descent, "plan", lambda *arguments: [trial, trial])
    with pytest.raises(
        ValueError, match="must be unique among the trials of descent, got 't' twice"
    ):
        _run(Descent(), tmp_path)


def test_registering_a_name_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.registry._registered", {})
    register(Descent())
    with pytest.raises(ValueError, match="got 'descent' again"):
        register(Descent())


def test_registering_without_a_scale_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.registry._registered", {})
    monkeypatch.setattr(Descent, "scales", {"smoke": "one step"})
    with pytest.raises(TypeError, match="got nothing for default, paper"):
        register(Descent())


def test_plain_lines_come_at_most_every_few_seconds() -> None:
    now = 0.0
    lines: list[str] = []
    watch = LineWatch(lines.append, every=5.0, clock=lambda: now)
    watch.begin("descent")
    watch.plan(2)
    watch.trial("first")
    for second in range(1, 13):
        now = float(second)
        watch.progress("first", second, 20, "loss 1")
    assert lines == [
        "descent: 2 trials to settle, 2 in all so far",
        # 5 s for a quarter of a trial: the 1.75 trials left take 35 s.
        "descent [0/2, 35.0 s left] first: 5 of 20 loss 1",
        "descent [0/2, 30.0 s left] first: 10 of 20 loss 1",
    ]
    now = 20.0
    watch.settled(record_of("first", loss=1.0), kept=False)
    assert lines[-1] == "descent [1/2, 20.0 s left] first finished in 1.0 s"


def test_time_left_does_not_count_kept_trials() -> None:
    now = 0.0
    lines: list[str] = []
    watch = LineWatch(lines.append, clock=lambda: now)
    watch.begin("descent")
    watch.plan(100)
    for i in range(98):
        watch.settled(record_of(f"kept-{i}", loss=1.0), kept=True)
    now = 60.0
    watch.settled(record_of("ran", error="ValueError: no"), kept=False)
    watch.end()
    assert lines[1:] == [
        "descent [99/100, 1 min 00 s left] ran failed in 1.0 s: ValueError: no",
        "descent: 98 of 100 trials recorded before",
    ]


def test_the_bar_names_the_experiment_and_what_failed(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140, color_system=None)
    experiment = Descent(faults={GRID[0]: ValueError("no [bold] luck")})
    run_experiment(experiment, "default", tmp_path, BarWatch(console))
    shown = screen.getvalue()
    assert "descent" in shown
    assert "5/5" in shown
    assert f"{GRID[0]} failed in 0.0 s: ValueError: no [bold] luck" in shown
    assert f"{GRID[2]} diverged" in shown
