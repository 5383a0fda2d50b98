"""The report on coverage: figures by folder, and each gap with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from verification import coverage_report
from verification.coverage_report import Gap, gaps_of, load_reasons, main, packages_of, page

SOURCE = """\
def f(x):
    if x:
        return 1
    if x is None:
        x = 2
    return x
"""
REASONS = '[[gap]]\nfile = "pkg/a.py"\nlines = ["return 1"]\nreason = "Needs a GPU."\n'


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of one file, and reasons for one of its lines."""
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "a.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "uncovered.toml").write_text(REASONS, encoding="utf-8")
    monkeypatch.setattr(coverage_report, "ROOT", tmp_path)
    monkeypatch.setattr(coverage_report, "REPORTS", tmp_path)
    return tmp_path


def document(missing: list[int], branches: list[list[int]]) -> dict[str, Any]:
    """Coverage's JSON for that file: 6 lines, 4 branches."""
    summary = {
        "num_statements": 6,
        "covered_lines": 6 - len(missing),
        "num_branches": 4,
        "covered_branches": 4 - len(branches),
    }
    found = {"summary": summary, "missing_lines": missing, "missing_branches": branches}
    return {"files": {"pkg/a.py": found}}


def test_a_branch_to_a_line_that_did_not_run_is_told_once(root: Path) -> None:
    gaps = gaps_of(document([3], [[2, 3], [4, 5], [4, -1]]), root)
    assert gaps == [
        Gap("pkg/a.py", "return 1", None),
        Gap("pkg/a.py", "if x is None:", "x = 2"),
        Gap("pkg/a.py", "if x is None:", "the end"),
    ]


def test_figures_are_summed_by_folder(root: Path) -> None:
    one = document([3], [[2, 3]])
    one["files"]["pkg/deep/b.py"] = document([], [])["files"]["pkg/a.py"]
    assert packages_of(one) == {
        "pkg": [6, 5, 4, 3],
        "pkg/deep": [6, 6, 4, 4],
        "together": [12, 11, 8, 7],
    }
    assert "| together | 12 | 91.7% | 8 | 87.5% |" in page(one, [], {})


@pytest.mark.parametrize(
    ("missing", "branches", "status", "said"),
    [
        ([3], [[2, 3]], 0, ""),
        ([3], [[4, 5]], 1, "no reason: pkg/a.py: `if x is None:` never goes to `x = 2`"),
        ([], [], 0, "needs no reason any more: pkg/a.py: return 1"),
    ],
    ids=["explained", "unexplained", "stale"],
)
def test_every_gap_needs_a_reason(
    root: Path,
    missing: list[int],
    branches: list[list[int]],
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = root / "coverage.json"
    source.write_text(json.dumps(document(missing, branches)), encoding="utf-8")
    assert main([str(source)]) == status
    assert capsys.readouterr().out.strip() == said
    told = (root / "coverage.md").read_text(encoding="utf-8")
    assert ("**Needs a GPU.** pkg/a.py: `return 1`" in told) == bool(missing)
    assert ("**No reason is known.**" in told) == bool(status)


def test_a_line_has_one_reason(root: Path) -> None:
    (root / "uncovered.toml").write_text(2 * REASONS, encoding="utf-8")
    with pytest.raises(ValueError, match=r"one reason for each line, got two for 'return 1' of"):
        load_reasons(root / "uncovered.toml")
