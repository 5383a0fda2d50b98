"""Parallel trials: the records of one job, whatever ends a trial or the run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import final

import pytest

from experiments.records import Record, read_records
from experiments.runner import record_folder, run_experiment
from experiments.watch import LineWatch, Watch
from verification.experiments.fakes import INTERRUPTED, Descent, Killed, lasting, undertake

GRID = ["rate-0.1-seed-0", "rate-1.0-seed-0", "rate-10.0-seed-0"]
PATIENCE = 120.0  # seconds that a busy machine may take for what takes a tenth of one
PAUSE = 0.15  # seconds of a trial that is to be killed
FOREVER = 600.0  # seconds of a trial that nobody waits for


@final
class Events(Watch):
    """What happened, in its order."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.told: set[str] = set()

    def begin(self, experiment: str) -> None:
        """Nothing."""

    def plan(self, more: int) -> None:
        """Nothing."""

    def trial(self, name: str) -> None:
        """A trial starts."""
        self.seen.append("start")

    def progress(self, name: str, done: int, total: int, text: str) -> None:
        """A trial tells of itself."""
        self.told.add(name)

    def settled(self, record: Record, *, kept: bool) -> None:
        """A trial ended."""
        self.seen.append("end")

    def note(self, text: str) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


def _records(out: Path) -> dict[str, Record]:
    return read_records(record_folder(out, "default", "descent"))


def _whole(out: Path) -> dict[str, Record]:
    """The records of an undisturbed run, one trial after another."""
    run_experiment(Descent(), "default", out, LineWatch([].append))
    return _records(out)


def _until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def _undertaken(out: Path, jobs: int, experiment: Descent) -> BaseProcess:
    """A run in a process of its own, as a command is."""
    context = get_context("forkserver")
    context.set_forkserver_preload([Descent.__module__])
    process = context.Process(target=undertake, args=(out, jobs, experiment))
    process.start()
    return process


def _half_way(out: Path, trace: Path) -> BaseProcess:
    """A run of two jobs that has finished the first trial of the grid, and hangs in the others."""
    experiment = Descent(trace=trace, hangs={GRID[1]: FOREVER, GRID[2]: FOREVER})
    process = _undertaken(out, 2, experiment)
    _until(lambda: len(_began(trace)) == 3, "the third trial did not begin")
    return process


def _began(trace: Path) -> list[tuple[int, str]]:
    """Process and name of every trial that began."""
    lines = trace.read_text().splitlines() if trace.exists() else []
    return [(int(process), name) for process, name in (line.split() for line in lines)]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_jobs_leave_the_records_of_one(tmp_path: Path) -> None:
    # the first trial is the last to end, which the plan of the next round must not notice
    experiment = Descent(faults={GRID[1]: ArithmeticError("no digits left")}, hangs={GRID[0]: 1.0})
    tallies = [
        run_experiment(experiment, "default", tmp_path / str(jobs), Events(), jobs=jobs)
        for jobs in (1, 2)
    ]
    assert tallies[0] == tallies[1]
    assert tallies[1].failed == [GRID[1]]
    one, two = (_records(tmp_path / str(jobs)) for jobs in (1, 2))
    assert lasting(one) == lasting(two)
    assert {record.provenance.hardware.split(", ")[1] for record in two.values()} == {"1 thread"}


def test_two_jobs_are_two_trials_at_a_time(tmp_path: Path) -> None:
    events, trace = Events(), tmp_path / "trace"
    experiment = Descent(pause=0.2, trace=trace)
    run_experiment(experiment, "default", tmp_path, events, jobs=2)
    # three of the grid, then two of the best rate: a third waits for the end of one of two
    assert events.seen[:3] == ["start", "start", "end"]
    assert events.seen.count("start") == events.seen.count("end") == 5
    assert os.getpid() not in {process for process, _ in _began(trace)}
    assert events.told == {name for _, name in _began(trace)}


def test_an_experiment_that_measures_time_runs_one_trial_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Descent, "timed", True)
    events, trace = Events(), tmp_path / "trace"
    run_experiment(Descent(trace=trace), "default", tmp_path, events, jobs=2)
    assert events.seen == ["start", "end"] * 5
    assert {process for process, _ in _began(trace)} == {os.getpid()}


@pytest.mark.parametrize(
    ("fault", "how"), [(Killed(), "was ended by SIGKILL"), (SystemExit(3), "ended with 3")]
)
def test_a_trial_whose_process_ends_is_a_failed_one_and_the_others_run_on(
    fault: BaseException, how: str, tmp_path: Path
) -> None:
    tally = run_experiment(Descent(faults={GRID[0]: fault}), "default", tmp_path, Events(), jobs=2)
    assert tally.failed == [GRID[0]]
    assert len(tally.planned) == 5
    assert _records(tmp_path)[GRID[0]].error == f"LostError: the process of the trial {how}"
    again = run_experiment(Descent(), "default", tmp_path, Events(), jobs=2)
    assert again.failed == []
    assert len(again.kept) == 4


def test_ctrl_c_ends_the_trials_and_leaves_the_finished_records(tmp_path: Path) -> None:
    out, trace = tmp_path / "out", tmp_path / "trace"
    process = _half_way(out, trace)
    assert process.pid is not None
    for child, _ in _began(trace)[1:]:  # a terminal interrupts all, the trials too
        os.kill(child, signal.SIGINT)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    process.join(PATIENCE)
    assert process.exitcode == INTERRUPTED
    assert not any(_alive(child) for child, _ in _began(trace))
    assert list(_records(out)) == GRID[:1]


def test_a_killed_run_takes_its_trials_along_and_resumes_with_two_jobs(tmp_path: Path) -> None:
    out, trace = tmp_path / "part", tmp_path / "trace"
    process = _half_way(out, trace)
    process.kill()
    process.join()
    _until(lambda: not any(_alive(one) for one, _ in _began(trace)), "a trial outlived its run")
    tally = run_experiment(Descent(), "default", out, Events(), jobs=2)
    assert tally.kept == GRID[:1]
    assert lasting(_records(out)) == lasting(_whole(tmp_path / "whole"))


def test_a_run_killed_again_and_again_ends_with_the_same_records(tmp_path: Path) -> None:
    out, trace = tmp_path / "part", tmp_path / "trace"
    folder = record_folder(out, "default", "descent")
    moments = random.Random(0)
    kills, finished, lives = 0, {}, 9
    for life in range(1, lives + 1):
        process = _undertaken(out, 1, Descent(pause=PAUSE, trace=trace))
        if life < lives:
            before = len(_began(trace))
            _until(partial(_goes_on, process, trace, before), "no trial began")
            process.join(moments.uniform(0.0, 2 * PAUSE))  # in a trial, or between two
            kills += process.is_alive()
            process.kill()
        process.join()
        kept, finished = finished, {path.name: path.read_bytes() for path in folder.glob("[!.]*")}
        assert kept.items() <= finished.items(), "a finished trial was repeated"
    assert process.exitcode == 0
    assert kills >= 3, "the run must be killed for this test to see it"
    assert lasting(_records(out)) == lasting(_whole(tmp_path / "whole"))


def _goes_on(process: BaseProcess, trace: Path, before: int) -> bool:
    """Whether a trial has begun since, or there is none left."""
    return len(_began(trace)) > before or not process.is_alive()
