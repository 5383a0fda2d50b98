"""Pytest plugin: what this run shows for every claim and property, printed as the last thing.

For each test it counts the Hypothesis examples and the comparisons and keeps the worst
error/tolerance; they travel in the report's `user_properties`, so that they arrive from
pytest-xdist's workers as well. A property is a test function over all its parameters.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import pytest
from hypothesis import settings
from hypothesis.errors import UnsatisfiedAssumption

from verification.claims import (
    CLAIMS_FILE,
    Claim,
    LedgerError,
    covers,
    evidence_of,
    load_claims,
    missing_tests,
    shown_status,
)
from verification.report import LOOSE, LOOSE_AFTER, lines, write
from verification.tolerances import recording

_PROPERTY = "apo-ledger"


@final
@dataclass(frozen=True)
class Measured:
    """What one test showed.

    Attributes:
        outcome: pytest's.
        seconds: of its set-up, call and tear-down.
        examples: Hypothesis examples that ran.
        rejected: examples that `assume` rejected.
        comparisons: calls of `assert_close` that allow an error.
        worst: their largest error/tolerance.
        reason: why its tolerance may be loose, from `@pytest.mark.loose`.
    """

    outcome: str
    seconds: float = 0.0
    examples: int = 0
    rejected: int = 0
    comparisons: int = 0
    worst: float | None = None
    reason: str | None = None


@final
@dataclass
class Ledger:
    """The tests of one run against the claims; the plugin's state on the controlling process."""

    claims: list[Claim]
    measured: dict[str, Measured] = field(default_factory=dict)
    collected: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def note(self, report: pytest.TestReport) -> None:
        """Take in one phase of one test: a failure in any phase is a failure of the test."""
        properties = dict(report.user_properties).get(_PROPERTY, {})
        before = self.measured.get(report.nodeid)
        if report.failed or (before is not None and before.outcome == "failed"):
            outcome = "failed"
        elif report.when == "call" or report.skipped:
            outcome = report.outcome
        else:
            outcome = before.outcome if before is not None else "not run"
        values = properties if isinstance(properties, dict) else {}
        seconds = report.duration + (before.seconds if before is not None else 0.0)
        self.measured[report.nodeid] = Measured(outcome, seconds, **values)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each claim: what it is, what this run shows of it, and by how much."""
        outcomes = {node_id: measured.outcome for node_id, measured in self.measured.items()}
        rows = []
        for claim in self.claims:
            results = [r for found in evidence_of(claim, outcomes).values() for r in found]
            mine = [
                measured
                for node_id, measured in self.measured.items()
                if any(covers(test, node_id) for test in claim.all_tests)
            ]
            unrun = sum(not found for found in evidence_of(claim, outcomes).values())
            rows.append(
                {
                    "id": claim.id,
                    "claim": claim.claim,
                    "source": claim.source,
                    "declared": claim.status,
                    "status": shown_status(claim, outcomes),
                    "passed": results.count("passed") + len(claim.records),
                    "evidence": len(results) + unrun + len(claim.records),
                    "examples": sum(m.examples for m in mine),
                    "worst": _worst(mine),
                    "note": claim.note,
                }
            )
        return rows

    def properties(self) -> list[dict[str, Any]]:
        """One row for each test function: all its parameters together, the slowest first."""
        cases: dict[str, list[Measured]] = defaultdict(list)
        for node_id, measured in self.measured.items():
            cases[node_id.partition("[")[0]].append(measured)
        rows = [
            {
                "name": name,
                "cases": len(mine),
                "failed": sum(m.outcome == "failed" for m in mine),
                "seconds": round(sum(m.seconds for m in mine), 3),
                "examples": sum(m.examples for m in mine),
                "comparisons": sum(m.comparisons for m in mine),
                "worst": _worst(mine),
                "loose": _loose(mine),
                "reason": next((m.reason for m in mine if m.reason), None),
            }
            for name, mine in cases.items()
        ]
        return sorted(rows, key=lambda row: (-row["seconds"], row["name"]))

    def document(self) -> dict[str, Any]:
        """The whole run as plain data."""
        measured, properties = list(self.measured.values()), self.properties()
        loose = [row for row in properties if row["loose"]]
        return {
            "profile": settings.get_current_profile_name(),
            "seconds": round(time.perf_counter() - self.started, 3),
            "test_seconds": round(sum(m.seconds for m in measured), 3),
            "examples": sum(m.examples for m in measured),
            "rejected": sum(m.rejected for m in measured),
            "comparisons": sum(m.comparisons for m in measured),
            "worst": _worst(measured),
            "loose": sorted(row["name"] for row in loose if not row["reason"]),
            "explained": sorted(row["name"] for row in loose if row["reason"]),
            "faults": self.faults,
            "claims": self.rows(),
            "properties": properties,
            "tests": {
                node_id: vars(m) | {"worst": _number(m.worst), "seconds": round(m.seconds, 3)}
                for node_id, m in sorted(self.measured.items())
            },
        }


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--verify-report FOLDER` and `--claims PATH`."""
    group = parser.getgroup("ledger", "the claims ledger")
    group.addoption(
        "--verify-report",
        metavar="FOLDER",
        type=Path,
        default=os.environ.get("APO_VERIFY_OUT"),
        help="write the run to FOLDER/ledger.json and FOLDER/ledger.html (default: the "
        "environment variable APO_VERIFY_OUT, else nothing is written)",
    )
    group.addoption(
        "--claims",
        metavar="PATH",
        type=Path,
        default=CLAIMS_FILE,
        help="the ledger to judge by, its paths relative to the root folder (default: %(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Read the claims, on the controlling process alone."""
    config.addinivalue_line(
        "markers", "loose(reason): why nothing comes near this property's tolerance"
    )
    if hasattr(config, "workerinput"):
        return
    try:
        ledger = Ledger(load_claims(config.option.claims, config.rootpath))
    except LedgerError as error:
        raise pytest.UsageError(str(error)) from error
    config.pluginmanager.register(_Controller(ledger), "apo-ledger-controller")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Count the examples and record the worst error/tolerance of one test."""
    counts = {"examples": 0, "rejected": 0}
    handle = getattr(getattr(item, "obj", None), "hypothesis", None)
    inner = getattr(handle, "inner_test", None)
    if handle is not None and inner is not None:
        handle.inner_test = _counted(inner, counts)
    try:
        with recording() as worst:
            return (yield)
    finally:
        if handle is not None and inner is not None:
            handle.inner_test = inner
        shown = {**counts, "comparisons": worst.comparisons, "worst": worst.value}
        marker = item.get_closest_marker("loose")
        shown["reason"] = marker.args[0] if marker is not None else None
        item.user_properties.append((_PROPERTY, shown))


def _counted(inner: Callable[..., object], counts: dict[str, int]) -> Callable[..., object]:
    """The test's body, which counts its calls and those of them that `assume` rejects."""

    @functools.wraps(inner)
    def counting(*args: object, **kwargs: object) -> object:
        try:
            result = inner(*args, **kwargs)
        except UnsatisfiedAssumption:
            counts["rejected"] += 1
            raise
        except Exception:
            counts["examples"] += 1
            raise
        counts["examples"] += 1
        return result

    return counting


@final
class _Controller:
    """The hooks of the controlling process."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ledger.note(report)

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        self.ledger.collected.add(item.nodeid)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: list[str]) -> None:
        self.ledger.collected.update(ids)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        """After everything else, pytest's own summary included, print the ledger."""
        result = yield
        ledger = self.ledger
        if _collects_whole_files(session.config):
            ledger.faults = missing_tests(ledger.claims, ledger.collected)
        shown = {row["status"] for row in ledger.rows()}
        if (ledger.faults or "FAILED" in shown) and session.exitstatus in (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if not session.config.option.collectonly:
            reporter = session.config.pluginmanager.get_plugin("terminalreporter")
            document = ledger.document()
            if reporter is not None:
                reporter.write_line("\n" + "\n".join(lines(document)))
            folder = session.config.option.verify_report
            if folder is not None:
                write(document, Path(folder))
        return result


def _collects_whole_files(config: pytest.Config) -> bool:
    """Whether nothing was asked for that collects only a part of a file."""
    option = config.option
    partial = option.keyword or option.markexpr or getattr(option, "deselect", None)
    cached = any(getattr(option, name, False) for name in ("lf", "stepwise"))
    return not (partial or cached or any("::" in argument for argument in config.args))


def _worst(measured: Sequence[Measured]) -> float | str | None:
    """The worst error/tolerance of several tests, None where nothing was compared."""
    return _number(max((m.worst for m in measured if m.worst is not None), default=None))


def _loose(measured: Sequence[Measured]) -> bool:
    """Whether enough was compared, and nothing came near its tolerance."""
    worst = max((m.worst for m in measured if m.worst is not None), default=math.inf)
    return worst < LOOSE and sum(m.comparisons for m in measured) >= LOOSE_AFTER


def _number(worst: float | None) -> float | str | None:
    """JSON has no infinity: it is written as the string "inf"."""
    return "inf" if worst is not None and math.isinf(worst) else worst
