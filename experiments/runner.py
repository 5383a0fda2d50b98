"""Runs an experiment's trials in rounds, keeps a record of each, and picks up where it was stopped.

The plan sees only the records of trials that it planned itself with equal options, never whatever
else lies in the folder. So a run that was interrupted, or killed, plans the same trials when it is
started again, and ends with the same records as one that was not.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import final

from experiments.data import ensure
from experiments.parallel import LostError, Report, in_processes
from experiments.provenance import Provenance, provenance
from experiments.records import Outcome, Record, Trial, read_records, write_record
from experiments.registry import Context, Experiment, Preset
from experiments.watch import Watch


@dataclass
class Tally:
    """What became of the trials of one experiment.

    Attributes:
        planned: Names of all trials of the plan, in its order.
        kept: Names of those whose record was there before, and was kept.
        diverged: Names of those with a non-finite metric.
        failed: Names of those that an exception ended.
    """

    planned: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    diverged: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def record_folder(out: Path, preset: str, experiment: str) -> Path:
    """Where that experiment's records lie; presets are apart, so that none overwrites another."""
    return out / preset / experiment


def run_experiment(
    experiment: Experiment,
    preset: Preset,
    out: Path,
    watch: Watch,
    *,
    seeds: int | None = None,
    device: str = "cpu",
    jobs: int = 1,
) -> Tally:
    """Run every trial of the plan that has no record with equal options yet.

    A trial that an exception ends is recorded as failed and the others run on; the next run tries
    it again. Interruption by Ctrl-C is passed on, with the records so far in place.

    Args:
        experiment: What plans the trials and runs them.
        preset: The scale.
        out: Where records go, see `record_folder`.
        watch: What a person sees.
        seeds: How many, where not the preset's.
        device: A torch device string.
        jobs: How many trials run at a time. With more than one, each has a process and one thread
            of its own; an experiment whose trials measure time runs one at a time in any case.

    Raises:
        DataError: A data set that the experiment names cannot be had; nothing has run.
        RecordError: A file among the records is not one.
        ValueError: The plan names two trials alike.
    """
    folder = record_folder(out, preset, experiment.name)
    earlier = read_records(folder)
    for name in experiment.datasets:
        ensure(name)
    alone = jobs == 1 or experiment.timed
    task = Task(experiment, preset, device, provenance(device, threads=None if alone else 1))
    settled: dict[str, Record] = {}
    tally = Tally()
    watch.begin(experiment.name)
    try:
        while due := [
            trial
            for trial in _planned(experiment, preset, seeds, settled)
            if trial.name not in settled
        ]:
            watch.plan(len(due))
            round_: dict[str, Record] = {}
            for trial in due:
                record = _reusable(earlier.get(trial.name), trial, watch)
                if record is not None:
                    round_[trial.name] = record
                    watch.settled(record, kept=True)
            tally.kept += list(round_)
            fresh = [trial for trial in due if trial.name not in round_]
            with closing(_attempts(task, fresh, 1 if alone else jobs, watch)) as attempts:
                for record in attempts:
                    write_record(folder / f"{record.trial.name}.json", record)
                    round_[record.trial.name] = record
                    watch.settled(record, kept=False)
            # in the order of the plan, whichever ended first
            settled |= {trial.name: round_[trial.name] for trial in due}
    finally:
        watch.end()
    tally.planned = list(settled)
    tally.diverged = [name for name, one in settled.items() if one.status == "diverged"]
    tally.failed = [name for name, one in settled.items() if one.status == "failed"]
    strangers = sorted(earlier.keys() - settled.keys())
    if strangers:
        watch.note(
            f"{experiment.name}: {len(strangers)} records in {folder} belong to no trial of this "
            f"run ({', '.join(strangers[:3])}{', …' if len(strangers) > 3 else ''}); the report "
            "shows them too."
        )
    return tally


def _planned(
    experiment: Experiment, preset: Preset, seeds: int | None, settled: dict[str, Record]
) -> list[Trial]:
    trials = experiment.plan(preset, seeds, list(settled.values()))
    names = [trial.name for trial in trials]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"`name` must be unique among the trials of {experiment.name}, got {twice[0]!r} twice."
        )
    return trials


def _reusable(record: Record | None, trial: Trial, watch: Watch) -> Record | None:
    """The earlier record, if it is of the same work and did not fail; says why where it is not."""
    if record is None:
        return None
    if record.status == "failed":
        watch.note(f"{trial.name} failed before ({record.error}); it runs again.")
        return None
    if not record.trial.same_work(trial):
        watch.note(
            f"{trial.name} was recorded with {_difference(record.trial, trial)}; it runs again."
        )
        return None
    return record


def _difference(old: Trial, new: Trial) -> str:
    """The options of `old` that `new` has otherwise, in words."""
    before, now = {"seed": old.seed, **old.options}, {"seed": new.seed, **new.options}
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in changed)


@final
@dataclass(frozen=True)
class Task:
    """What all trials of a run share; it goes to other processes, and so is picklable."""

    experiment: Experiment
    preset: Preset
    device: str
    source: Provenance

    def attempt(self, trial: Trial, report: Report) -> Record:
        """Run the trial; what it raises becomes the record's error."""
        context = Context(device=self.device, report=report)
        started, clock = _now(), time.perf_counter()
        outcome, error = Outcome({}), ""
        try:
            outcome = self.experiment.run(trial, context)
        except Exception as raised:  # whatever a trial raises is its result, and the others run on
            error = "".join(traceback.format_exception_only(raised)).strip()
        return self.record(trial, outcome, error, started, time.perf_counter() - clock)

    def record(
        self, trial: Trial, outcome: Outcome, error: str, started: str, seconds: float
    ) -> Record:
        """The record of a trial of this run."""
        name = self.experiment.name
        return Record(name, self.preset, trial, outcome, self.source, started, seconds, error)


def _attempts(
    task: Task, trials: Sequence[Trial], jobs: int, watch: Watch
) -> Generator[Record, None, None]:
    """The record of every trial as it ends: here one after another, or `jobs` at a time."""
    if jobs == 1:
        for trial in trials:
            watch.trial(trial.name)
            yield task.attempt(trial, partial(watch.progress, trial.name))
        return
    began: dict[str, tuple[str, float]] = {}

    def started(trial: Trial) -> None:
        began[trial.name] = _now(), time.perf_counter()
        watch.trial(trial.name)

    # torch imports its compiler, for seconds, with the first optimizer that a process makes
    compiler = ["torch._dynamo"] if "experiments.training" in sys.modules else []
    results = in_processes(
        task.attempt,
        trials,
        jobs,
        preload=[type(task.experiment).__module__, *compiler],
        started=started,
        progress=lambda trial, *done: watch.progress(trial.name, *done),
    )
    with closing(results):
        for trial, record in results:
            if isinstance(record, LostError):
                at, clock = began[trial.name]
                seconds = time.perf_counter() - clock
                record = task.record(trial, Outcome({}), f"LostError: {record}", at, seconds)
            yield record


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
