"""Records: one JSON file a trial, that says what ran, on what, and what came out.

A file is complete or absent: it is written beside its place, synced, and moved there. JSON has no
infinity, so a non-finite metric or curve value is stored as the string "inf", "-inf" or "nan".
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from experiments.provenance import Provenance

SCHEMA = 1
Status = Literal["finished", "diverged", "failed"]
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")


class RecordError(ValueError):
    """A record file that cannot be trusted, and what to do about it."""


@dataclass(frozen=True)
class Trial:
    """One run that an experiment plans.

    Attributes:
        name: A slug, unique in its experiment; the record's file name.
        options: All that decides the outcome beside the seed, as JSON has it, finite numbers only.
        seed: Seed of everything random in the trial.
        label: The method, as the legend and the table call it.
    """

    name: str
    options: dict[str, Any]
    seed: int
    label: str

    def __post_init__(self) -> None:
        if not _SLUG.fullmatch(self.name):
            raise ValueError(
                f"`name` must be a file name of letters, digits and ._+=-, got {self.name!r}."
            )
        try:
            json.dumps(self.options, allow_nan=False, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`options` of trial {self.name!r} must be what JSON can hold, with finite "
                f"numbers, got {self.options!r} ({error})."
            ) from error

    def same_work(self, other: Trial) -> bool:
        """Whether the other trial has equal options and seed, and so an equal outcome."""
        return self.seed == other.seed and _canonical(self.options) == _canonical(other.options)


@dataclass(frozen=True)
class Outcome:
    """What a trial measured.

    Attributes:
        metrics: Final figures by name; a non-finite one marks the trial as diverged.
        curves: Equally long lists by name, one of which is the x axis, such as "step".
    """

    metrics: dict[str, float]
    curves: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """A trial with its outcome, and where the outcome comes from.

    Attributes:
        experiment: The experiment's name.
        preset: The preset that it ran under.
        trial: What was planned.
        outcome: What was measured; empty where the trial failed.
        provenance: Commit, versions and hardware.
        started: UTC time in ISO format.
        seconds: Wall time of the trial.
        error: Kind and text of the exception that ended the trial, else empty.
    """

    experiment: str
    preset: str
    trial: Trial
    outcome: Outcome
    provenance: Provenance
    started: str
    seconds: float
    error: str = ""

    @property
    def label(self) -> str:
        """The method, as in the legend."""
        return self.trial.label

    @property
    def options(self) -> dict[str, Any]:
        """The trial's options."""
        return self.trial.options

    @property
    def seed(self) -> int:
        """The trial's seed."""
        return self.trial.seed

    @property
    def status(self) -> Status:
        """Whether an exception ended the trial, a metric is not finite, or neither."""
        if self.error:
            return "failed"
        finite = all(math.isfinite(value) for value in self.outcome.metrics.values())
        return "finished" if finite else "diverged"

    def metric(self, name: str, worst: float = math.inf) -> float:
        """The final figure of that name; `worst` where the trial failed or the figure is NaN.

        A failed run is thus never left out of a mean or a minimum. `worst` is 0 for an accuracy.

        Raises:
            KeyError: A trial that did not fail has no metric of that name.
        """
        value = math.nan if self.error else self.outcome.metrics[name]
        return worst if math.isnan(value) else value

    def curve(self, name: str) -> list[float]:
        """The curve of that name; empty where the trial failed."""
        return [] if self.error else self.outcome.curves[name]


def write_record(path: Path, record: Record) -> None:
    """Write the record to `path`, whole or not at all."""
    document = asdict(record)
    document["outcome"] = _encoded(record.outcome)
    document = {"schema": SCHEMA, "status": record.status, **document}
    # A line an entry: people can read the file, and a long curve does not take a line a number.
    lines = ",\n".join(f'"{key}": {json.dumps(document[key], allow_nan=False)}' for key in document)
    write_whole(path, f"{{\n{lines}\n}}\n".encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is complete or absent, whatever interrupts: temp file, sync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two runs into one folder from writing to one temporary file.
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_record(path: Path) -> Record:
    """The record in that file.

    Raises:
        RecordError: The file is not a record of this schema.
    """
    try:
        return _decoded(json.loads(path.read_bytes()))
    except (KeyError, TypeError, ValueError) as error:
        reason = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
        raise RecordError(
            f"`{path}` must be a record of schema {SCHEMA}, but {reason.rstrip('.')}; delete the "
            "file, and the next run makes it anew."
        ) from error


def read_records(folder: Path) -> dict[str, Record]:
    """All records of one experiment's folder, by trial name; empty where there is no folder."""
    records = {}
    for path in sorted(folder.glob("[!.]*.json")):
        record = read_record(path)
        if record.trial.name != path.stem:
            raise RecordError(
                f"`{path}` must hold the trial of its file name, got {record.trial.name!r}; give "
                "it its own name back or delete it."
            )
        records[path.stem] = record
    return records


def _canonical(options: Mapping[str, Any]) -> str:
    return json.dumps(options, sort_keys=True)


def _encoded(outcome: Outcome) -> dict[str, Any]:
    """The outcome as JSON has it, with non-finite numbers as strings."""
    return {
        "metrics": {name: _to_json(value) for name, value in outcome.metrics.items()},
        "curves": {name: [_to_json(v) for v in values] for name, values in outcome.curves.items()},
    }


def _to_json(value: float) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _from_json(value: object) -> float:
    if isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    return float(_typed("a number", value, (int, float)))


def _decoded(document: object) -> Record:
    """The record of a parsed file; raises KeyError, TypeError or ValueError with the reason."""
    whole = _typed("the file", document, dict)
    if whole["schema"] != SCHEMA:
        raise ValueError(f"`schema` is {whole['schema']!r}")
    trial = _typed("trial", whole["trial"], dict)
    outcome = _typed("outcome", whole["outcome"], dict)
    source = _typed("provenance", whole["provenance"], dict)
    record = Record(
        experiment=_typed("experiment", whole["experiment"], str),
        preset=_typed("preset", whole["preset"], str),
        trial=Trial(
            name=_typed("trial.name", trial["name"], str),
            options=_typed("trial.options", trial["options"], dict),
            seed=_typed("trial.seed", trial["seed"], int),
            label=_typed("trial.label", trial["label"], str),
        ),
        outcome=Outcome(
            metrics={
                name: _from_json(value)
                for name, value in _typed("outcome.metrics", outcome["metrics"], dict).items()
            },
            curves={
                name: [_from_json(value) for value in _typed(f"curve {name}", values, list)]
                for name, values in _typed("outcome.curves", outcome["curves"], dict).items()
            },
        ),
        provenance=Provenance(
            commit=_typed("provenance.commit", source["commit"], str),
            dirty=_typed("provenance.dirty", source["dirty"], (bool, type(None))),
            versions=_typed("provenance.versions", source["versions"], dict),
            hardware=_typed("provenance.hardware", source["hardware"], str),
        ),
        started=_typed("started", whole["started"], str),
        seconds=_from_json(whole["seconds"]),
        error=_typed("error", whole["error"], str),
    )
    if whole["status"] not in get_args(Status) or whole["status"] != record.status:
        raise ValueError(
            f"`status` is {whole['status']!r} where its content says {record.status!r}"
        )
    return record


def _typed(name: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    """`value`, if it is of that kind; JSON's true is not a number here."""
    wanted = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        kinds = " or ".join(one.__name__ for one in wanted)
        raise TypeError(f"`{name}` is of type {type(value).__name__} instead of {kinds}")
    return value
