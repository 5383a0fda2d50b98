"""The committed records: those that the protocol plans, of clean commits, and a report's worth.

What a testbed is expected to keep: the protocol stands in a file and was followed, no best value
lies at an edge of its grid without a declared reason, a run that failed counts as infinite, every
record tells its commit and hardware, and tables and verdicts come of the records alone.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from experiments.records import Record, read_records
from experiments.registry import AT_EDGE, Preset, experiments
from experiments.report import found_records
from experiments.runner import record_folder

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
FOUND = found_records(RESULTS)


def _records(preset: Preset, name: str) -> dict[str, Record]:
    return read_records(record_folder(RESULTS, preset, name))


@pytest.mark.parametrize(("preset", "name"), FOUND)
def test_what_ran_is_what_the_protocol_plans(preset: Preset, name: str) -> None:
    """Round by round, since what a search finds decides what runs after it."""
    experiment, found = experiments()[name], _records(preset, name)
    settled: dict[str, Record] = {}
    while due := [
        trial
        for trial in experiment.plan(preset, None, list(settled.values()))
        if trial.name not in settled
    ]:
        for trial in due:
            assert trial.name in found, "planned and not committed"
            assert found[trial.name].trial.same_work(trial), "the plan changed since it ran"
            settled[trial.name] = found[trial.name]
    assert settled.keys() == found.keys(), "committed and not planned"


@pytest.mark.parametrize(("preset", "name"), FOUND)
def test_every_record_tells_where_it_comes_from(preset: Preset, name: str) -> None:
    for record in _records(preset, name).values():
        provenance = record.provenance
        assert re.fullmatch("[0-9a-f]{40}", provenance.commit)
        assert not provenance.dirty
        assert provenance.hardware
        assert {"python", "numpy", "apo-core"} <= provenance.versions.keys()


@pytest.mark.parametrize(("preset", "name"), FOUND)
def test_what_did_not_finish_counts_as_infinite(preset: Preset, name: str) -> None:
    for record in _records(preset, name).values():
        assert not record.error
        if record.status == "diverged":
            assert record.metric("loss") == math.inf


@pytest.mark.parametrize(("preset", "name"), FOUND)
def test_the_table_compares_no_undeclared_edge_and_the_verdict_has_words(
    preset: Preset, name: str
) -> None:
    experiment, records = experiments()[name], list(_records(preset, name).values())
    edges = {row.label for row in experiment.table(records) if AT_EDGE in row.note}
    assert edges <= {label for at, label in experiment.edges if at == preset}
    assert experiment.verdict(records)
    assert "not yet" not in experiment.verdict(records)
    assert "no run yet" not in experiment.verdict(records)
