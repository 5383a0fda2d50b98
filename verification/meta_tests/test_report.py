"""A run's report: readable lines, and a page that needs no other file."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, final

import pytest

from verification import report
from verification.report import SLOWEST, WIDTH, lines, page, write

VOID = {"meta"}


def property_row(number: int, **changes: Any) -> dict[str, Any]:
    """A property that passed, `number` seconds long."""
    return {
        "name": f"verification/l1_values/test_it.py::test_number_{number}",
        "cases": 1,
        "failed": 0,
        "seconds": float(number),
        "examples": 40,
        "comparisons": 40,
        "worst": 0.5,
        "loose": False,
        "reason": None,
        **changes,
    }


def document(*properties: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run of these properties, with one claim."""
    claim = {"id": "p22-eq9", "claim": "a < b & c", "status": "verified", "passed": 1}
    return {
        "profile": "ci",
        "seconds": 1.0,
        "test_seconds": 2.0,
        "examples": 1234,
        "rejected": 0,
        "comparisons": 40,
        "worst": "inf",
        "loose": [row["name"] for row in properties if row["loose"] and not row["reason"]],
        "explained": [row["name"] for row in properties if row["loose"] and row["reason"]],
        "faults": [],
        "claims": [{**claim, "evidence": 1, "examples": 40, "worst": 0.5}],
        "properties": list(properties),
        "tests": {row["name"]: {} for row in properties},
        **changes,
    }


@final
class Tags(HTMLParser):
    """Which elements are open, and every attribute that names another file."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element that is not void."""
        self.seen.add(tag)
        self.open += [tag] * (tag not in VOID)
        self.references += [name for name, _ in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        """It must be the last that was opened."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """All that is read."""
        self.text += data


def parsed(html: str) -> Tags:
    """The page, whose elements must all be closed."""
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert tags.open == []
    return tags


def test_the_page_is_whole_and_needs_no_other_file_or_script() -> None:
    tags = parsed(page(document(property_row(1), property_row(2, loose=True))))
    assert tags.references == []
    assert "script" not in tags.seen
    assert {"table", "details", "style"} <= tags.seen


def test_what_tests_are_called_is_no_markup() -> None:
    odd = property_row(1, name="test_it.py::test_<b>&")
    tags = parsed(page(document(odd, faults=["`p22-eq9`: <gone>"])))
    assert "b" not in tags.seen
    for shown in ("test_<b>&", "a < b & c", "LEDGER FAULT: `p22-eq9`: <gone>"):
        assert shown in tags.text


def test_the_page_lists_all_and_the_terminal_the_slowest() -> None:
    rows = [property_row(n) for n in reversed(range(2 * SLOWEST))]
    html, shown = page(document(*rows)), "\n".join(lines(document(*rows)))
    for n in range(2 * SLOWEST):
        assert f"test_number_{n}<" in html
        assert (f"test_number_{n} " in shown) == (n >= SLOWEST)


def test_a_long_name_is_cut_to_its_end_and_a_long_claim_to_its_beginning() -> None:
    long = property_row(1, name="verification/" + "x" * 100 + ".py::test_the_end")
    run = document(long)
    run["claims"][0]["claim"] = "It begins " + "x" * 200
    shown = lines(run)
    assert max(map(len, shown)) <= WIDTH
    assert any(line.startswith("…x") and "::test_the_end " in line for line in shown)
    assert any("It begins x" in line and "…" in line for line in shown)


def test_failures_and_infinite_ratios_are_told_in_words() -> None:
    shown = lines(document(property_row(1, failed=2, worst="inf", loose=True)))
    (line,) = [line for line in shown if "test_number_1 " in line]
    assert "(2 FAILED, loose)" in line
    assert line.endswith(" inf")
    assert shown[-1].startswith("40 comparisons, worst error/tolerance inf;")


def test_a_reason_for_a_loose_tolerance_is_told_and_counted_apart() -> None:
    run = document(property_row(1, loose=True), property_row(2, loose=True, reason="Same passes."))
    assert any(line.startswith("1 loose of 2 ") and "(1 more for" in line for line in lines(run))
    told = parsed(page(run)).text
    assert "test_number_1 (loose)" in told
    assert "test_number_2 (loose for a reason)Same passes." in told


def test_what_is_written_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = document(property_row(1))
    write(first, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "ledger.json").read_text(encoding="utf-8")) == first

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(document(property_row(2)), tmp_path / "new")
    assert json.loads((tmp_path / "new" / "ledger.json").read_text(encoding="utf-8")) == first
