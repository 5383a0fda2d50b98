"""Records: what is written is what is read, a file is whole or absent, and a bad one is refused."""

from __future__ import annotations

import json
import math
import re
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from experiments.provenance import CHECKOUT, Provenance, provenance
from experiments.records import (
    Outcome,
    Record,
    RecordError,
    Trial,
    read_record,
    read_records,
    write_record,
    write_whole,
)
from verification.experiments.fakes import record_of

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NUMBERS = st.floats()
SLUGS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,20}", fullmatch=True)


@st.composite
def records(draw: st.DrawFn) -> Record:
    """Any record: all floats, any text, any options that JSON holds."""
    error = draw(st.just("") | st.text(min_size=1), label="error")
    outcome = Outcome(
        draw(st.dictionaries(st.text(), NUMBERS, max_size=3), label="metrics"),
        draw(st.dictionaries(st.text(), st.lists(NUMBERS, max_size=4), max_size=2), label="curves"),
    )
    return Record(
        experiment=draw(SLUGS, label="experiment"),
        preset=draw(st.sampled_from(["smoke", "default", "paper"])),
        trial=Trial(
            name=draw(SLUGS, label="name"),
            options=draw(st.dictionaries(st.text(), JSON, max_size=4), label="options"),
            seed=draw(st.integers(0, 2**63)),
            label=draw(st.text(), label="label"),
        ),
        outcome=Outcome({}) if error else outcome,
        provenance=Provenance(
            commit=draw(st.text()),
            dirty=draw(st.none() | st.booleans()),
            versions=draw(st.dictionaries(st.text(), st.text(), max_size=2)),
            hardware=draw(st.text()),
        ),
        started="2026-01-01T00:00:00+00:00",
        seconds=draw(st.floats(0, 1e9)),
        error=error,
    )


@given(record=records())
@example(record=record_of(loss=math.nan, worst=-math.inf, tiny=5e-324))
def test_what_is_written_is_read(record: Record) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{record.trial.name}.json"
        write_record(path, record)
        # repr tells floats apart exactly and takes NaN as equal to NaN.
        assert repr(read_record(path)) == repr(record)
        assert read_record(path).trial.same_work(record.trial)


@given(record=records())
def test_a_record_is_json_in_the_strict_sense(record: Record) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        write_record(path, record)

        def refuse(constant: str) -> Any:
            raise AssertionError(f"{constant} is no JSON")

        document = json.loads(path.read_text(), parse_constant=refuse)
        assert document["schema"] == 1


@pytest.mark.parametrize(
    ("metrics", "error", "status"),
    [
        ({"loss": 1.0}, "", "finished"),
        ({"loss": math.inf, "accuracy": 0.1}, "", "diverged"),
        ({"loss": math.nan}, "", "diverged"),
        ({}, "ValueError: no", "failed"),
    ],
)
def test_status_follows_from_the_content(metrics: dict, error: str, status: str) -> None:
    assert record_of(error=error, **metrics).status == status


def test_failed_and_undefined_count_as_the_worst() -> None:
    assert record_of(error="ValueError: no").metric("loss") == math.inf
    assert record_of(error="ValueError: no").metric("accuracy", worst=0.0) == 0.0
    assert record_of(loss=math.nan).metric("loss") == math.inf
    assert record_of(error="ValueError: no").curve("loss") == []
    with pytest.raises(KeyError, match="los"):
        record_of(loss=1.0).metric("los")


def _without(name: str) -> Any:
    return lambda document: {k: v for k, v in document.items() if k != name}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda document: [document], "`the file` is of type list instead of dict"),
        (lambda document: {**document, "schema": 2}, "`schema` is 2"),
        (_without("trial"), "`trial` is missing"),
        (lambda document: {**document, "status": "finished"}, "content says 'diverged'"),
        (lambda document: {**document, "seconds": True}, "`a number` is of type bool"),
        (
            lambda document: {**document, "seconds": "long"},
            "is of type str instead of int or float",
        ),
        (
            lambda document: {**document, "trial": {**document["trial"], "name": "../up"}},
            "must be a file name",
        ),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, change: Any, reason: str) -> None:
    path = tmp_path / "t.json"
    write_record(path, record_of(loss=math.inf))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(RecordError, match=re.escape(reason) + ".*; delete the file"):
        read_record(path)


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_record_is_refused(cut: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.json"
        write_record(path, record_of(loss=1.0))
        whole = path.read_bytes()
        # The last two bytes are the closing brace and a line end, which may be missing.
        path.write_bytes(whole[: int(cut * (len(whole) - 1))])
        with pytest.raises(RecordError, match="must be a record of schema 1"):
            read_record(path)


def test_a_record_under_another_name_is_refused(tmp_path: Path) -> None:
    write_record(tmp_path / "other.json", record_of(name="t", loss=1.0))
    with pytest.raises(RecordError, match="must hold the trial of its file name, got 't'"):
        read_records(tmp_path)


def test_equal_work_is_equal_options_and_seed_in_any_order() -> None:
    trial = Trial("t", {"rate": 0.1, "shape": [1, 2]}, 0, "label")
    assert trial.same_work(Trial("u", {"shape": [1, 2], "rate": 0.1}, 0, "other label"))
    assert not trial.same_work(replace(trial, seed=1))
    assert not trial.same_work(replace(trial, options={"rate": 0.1, "shape": [2, 1]}))
    assert not trial.same_work(replace(trial, options={**trial.options, "more": None}))


@pytest.mark.parametrize("options", [{"rate": math.inf}, {"rate": object()}, {1: 1, "a": 2}])
def test_options_that_json_cannot_hold_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="`options` of trial 't' must be what JSON can hold"):
        Trial("t", options, 0, "label")


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a b", "a\n"])
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="`name` must be a file name"):
        Trial(name, {}, 0, "label")


def test_an_error_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.json"
    write_whole(path, b"old")

    def fail(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.records.os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["t.json"]


def test_a_kill_between_write_and_replace_leaves_the_old_record(tmp_path: Path) -> None:
    write_record(tmp_path / "t.json", record_of(loss=1.0))
    program = """
import os, signal, sys
from pathlib import Path
from experiments import records
from verification.experiments.fakes import record_of
records.os.replace = lambda source, target: os.kill(os.getpid(), signal.SIGKILL)
records.write_record(Path(sys.argv[1]) / "t.json", record_of(loss=2.0))
"""
    killed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=CHECKOUT, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    found = read_records(tmp_path)
    assert {name: one.metric("loss") for name, one in found.items()} == {"t": 1.0}


def _git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True
    )


def test_provenance_knows_commit_and_changes(tmp_path: Path) -> None:
    assert provenance(checkout=tmp_path).commit == "unknown"
    _git(tmp_path, "init")
    assert provenance(checkout=tmp_path) == provenance(checkout=tmp_path / "nowhere")
    (tmp_path / "file").write_text("1")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "first")
    clean = provenance(checkout=tmp_path)
    assert re.fullmatch(r"[0-9a-f]{40}", clean.commit)
    assert clean.dirty is False
    (tmp_path / "file").write_text("2")
    assert provenance(checkout=tmp_path).dirty is True


def test_a_copy_inside_another_repository_has_no_commit(tmp_path: Path) -> None:
    _git(tmp_path, "init")
    _git(tmp_path, "commit", "--allow-empty", "-m", "first")
    inside = tmp_path / "copy"
    inside.mkdir()
    assert provenance(checkout=inside).commit == "unknown"
    assert provenance(checkout=inside).dirty is None


def test_provenance_names_versions_and_no_machine() -> None:
    found = provenance()
    assert {"python", "torch", "numpy", "apo-core"} <= found.versions.keys()
    assert re.fullmatch(r"\d+ CPU cores?, \d+ threads?", found.hardware)
    told = repr(found)
    assert socket.gethostname() not in told
    assert str(Path.home()) not in told
    assert str(CHECKOUT) not in told
