"""Pytest plugin: what this run shows for every claim, printed as the last thing.

For each test it counts the Hypothesis examples and keeps the worst error/tolerance; both travel in
the report's `user_properties`, so that they arrive from pytest-xdist's workers as well.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Generator
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
from verification.tolerances import recording

_PROPERTY = "apo-ledger"
_WIDTH = 118  # of the table: fits the log viewers that do not wrap at 120


@final
@dataclass(frozen=True)
class Measured:
    """What one test showed: its outcome, examples that ran, examples rejected, worst ratio."""

    outcome: str
    examples: int = 0
    rejected: int = 0
    worst: float | None = None


@final
@dataclass
class Ledger:
    """The tests of one run against the claims; the plugin's state on the controlling process."""

    claims: list[Claim]
    measured: dict[str, Measured] = field(default_factory=dict)
    collected: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

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
        self.measured[report.nodeid] = Measured(outcome, **values)

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
                    "worst": _number(
                        max((m.worst for m in mine if m.worst is not None), default=None)
                    ),
                    "note": claim.note,
                }
            )
        return rows

    def document(self) -> dict[str, Any]:
        """The whole run as plain data."""
        return {
            "profile": settings.get_current_profile_name(),
            "examples": sum(m.examples for m in self.measured.values()),
            "rejected": sum(m.rejected for m in self.measured.values()),
            "faults": self.faults,
            "claims": self.rows(),
            "tests": {
                node_id: vars(m) | {"worst": _number(m.worst)}
                for node_id, m in sorted(self.measured.items())
            },
        }


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--ledger-json PATH` and `--claims PATH`."""
    group = parser.getgroup("ledger", "the claims ledger")
    group.addoption(
        "--ledger-json",
        metavar="PATH",
        type=Path,
        help="write the ledger as JSON (or set APO_VERIFY_OUT to a folder: ledger.json in it)",
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
        item.user_properties.append((_PROPERTY, {**counts, "worst": worst.value}))


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
            if reporter is not None:
                reporter.write_line("\n" + "\n".join(render(ledger)))
            path = _json_path(session.config)
            if path is not None:
                write_json(ledger.document(), path)
        return result


def _collects_whole_files(config: pytest.Config) -> bool:
    """Whether nothing was asked for that collects only a part of a file."""
    option = config.option
    partial = option.keyword or option.markexpr or getattr(option, "deselect", None)
    cached = any(getattr(option, name, False) for name in ("lf", "stepwise"))
    return not (partial or cached or any("::" in argument for argument in config.args))


def render(ledger: Ledger) -> list[str]:
    """The ledger as lines of at most 118 columns."""
    rows = ledger.rows()
    widths = (max(len(row["id"]) for row in rows) if rows else 2, 0, 10, 8, 8, 9)
    claim_width = _WIDTH - sum(widths) - 2 * (len(widths) - 1)
    heads = ("id", "claim", "status", "evidence", "examples", "worst e/t")

    def line(cells: tuple[str, ...]) -> str:
        id_, claim, status, evidence, examples, worst = cells
        short = claim if len(claim) <= claim_width else claim[: claim_width - 1] + "…"
        return (
            f"{id_:<{widths[0]}}  {short:<{claim_width}}  {status:<{widths[2]}}"
            f"  {evidence:>{widths[3]}}  {examples:>{widths[4]}}  {worst:>{widths[5]}}"
        ).rstrip()

    lines = ["The claims and what this run shows of them", line(heads), "-" * _WIDTH]
    for row in rows:
        ran = row["evidence"] > 0
        lines.append(
            line(
                (
                    row["id"],
                    row["claim"],
                    row["status"],
                    f"{row['passed']}/{row['evidence']}" if ran else "-",
                    f"{row['examples']:,}" if ran else "-",
                    "-" if row["worst"] is None else f"{float(row['worst']):.2g}",
                )
            )
        )
    document = ledger.document()
    tally = {status: 0 for status in sorted({row["status"] for row in rows})}
    for row in rows:
        tally[row["status"]] += 1
    worst = max((m.worst for m in ledger.measured.values() if m.worst is not None), default=None)
    lines += [
        "-" * _WIDTH,
        f"{len(rows)} claims: " + ", ".join(f"{n} {status}" for status, n in tally.items()),
        f"{len(ledger.measured):,} tests, {document['examples']:,} Hypothesis examples "
        f"({document['rejected']:,} more rejected), profile {document['profile']}, "
        f"worst error/tolerance {'-' if worst is None else f'{worst:.2g}'}",
    ]
    return lines + [f"LEDGER FAULT: {fault}" for fault in ledger.faults]


def _number(worst: float | None) -> float | str | None:
    """JSON has no infinity: it is written as the string "inf"."""
    return "inf" if worst is not None and math.isinf(worst) else worst


def _json_path(config: pytest.Config) -> Path | None:
    given: Path | None = config.option.ledger_json
    folder = os.environ.get("APO_VERIFY_OUT")
    return given or (Path(folder) / "ledger.json" if folder else None)


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write `document` so that a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
