"""Runs an experiment's trials in rounds, keeps a record of each, and picks up where it was stopped.

The plan sees only the records of trials that it planned itself with equal options, never whatever
else lies in the folder. So a run that was interrupted, or killed, plans the same trials when it is
started again, and ends with the same records as one that was not.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

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
) -> Tally:
    """Run every trial of the plan that has no record with equal options yet.

    A trial that an exception ends is recorded as failed and the others run on; the next run tries
    it again. Interruption by Ctrl-C is passed on, with the records so far in place.

    Raises:
        DataError: A data set that the experiment names cannot be had; nothing has run.
        RecordError: A file among the records is not one.
        ValueError: The plan names two trials alike.
    """
    folder = record_folder(out, preset, experiment.name)
    earlier = read_records(folder)
    context = Context(device=device, report=watch.progress)
    for name in experiment.datasets:
        context.load(name)
    source = provenance(device)
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
            for trial in due:
                record = _reusable(earlier.get(trial.name), trial, watch)
                kept = record is not None
                if record is None:
                    watch.trial(trial.name)
                    record = _attempt(experiment, preset, trial, context, source)
                    write_record(folder / f"{trial.name}.json", record)
                settled[trial.name] = record
                tally.kept += [trial.name] if kept else []
                watch.settled(record, kept=kept)
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


def _attempt(
    experiment: Experiment, preset: Preset, trial: Trial, context: Context, source: Provenance
) -> Record:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    clock = time.perf_counter()
    outcome, error = Outcome({}), ""
    try:
        outcome = experiment.run(trial, context)
    except Exception as raised:  # whatever a trial raises is its result, and the others run on
        error = "".join(traceback.format_exception_only(raised)).strip()
    return Record(
        experiment=experiment.name,
        preset=preset,
        trial=trial,
        outcome=outcome,
        provenance=source,
        started=started,
        seconds=time.perf_counter() - clock,
        error=error,
    )
