"""What of the engine and the oracle the suite does not run, and why, from coverage's own figures.

    coverage json -o results/coverage.json
    python -m verification.coverage_report results/coverage.json

Writes verification/reports/coverage.md. The reasons stand in uncovered.toml beside it; a line is
known by its text there, so that a reason stays with it when the lines above move. Exit status 1 if
a line or branch that did not run has no reason.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "verification" / "reports"
COUNTS = ("num_statements", "covered_lines", "num_branches", "covered_branches")

Document = dict[str, Any]
Reasons = dict[tuple[str, str], str]


class Gap(NamedTuple):
    """A line that did not run, or that was never left for `target`, another line's text."""

    file: str
    line: str
    target: str | None

    def shown(self) -> str:
        """In Markdown."""
        if self.target is None:
            return f"`{self.line}`"
        return f"`{self.line}` never goes to `{self.target}`"


def load_reasons(path: Path) -> Reasons:
    """(file, text of the line) -> why it does not run.

    Raises:
        ValueError: a line has two reasons.
    """
    reasons: Reasons = {}
    for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("gap", []):
        for line in entry["lines"]:
            if (entry["file"], line) in reasons:
                raise ValueError(
                    f"`{path.name}` must give one reason for each line, got two for {line!r} of "
                    f"{entry['file']}; merge them."
                )
            reasons[entry["file"], line] = entry["reason"]
    return reasons


def gaps_of(document: Document, root: Path) -> list[Gap]:
    """The lines that did not run, and the branches that ran lines never took."""
    gaps = []
    for file, found in sorted(document["files"].items()):
        text = ["", *(root / file).read_text(encoding="utf-8").splitlines()]
        missing = set(found["missing_lines"])
        gaps += [Gap(file, text[n].strip(), None) for n in sorted(missing)]
        for start, end in found["missing_branches"]:
            if start in missing or end in missing:
                continue  # told by the line
            gaps.append(Gap(file, text[start].strip(), text[end].strip() if end > 0 else "the end"))
    return gaps


def packages_of(document: Document) -> dict[str, list[int]]:
    """Folder -> statements, those that ran, branches, those that ran; all together last."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0] * len(COUNTS))
    for file, found in sorted(document["files"].items()):
        for name in (str(Path(file).parent), "together"):
            for i, count in enumerate(COUNTS):
                sums[name][i] += found["summary"][count]
    total = sums.pop("together")
    return {**sums, "together": total}


def page(document: Document, gaps: Iterable[Gap], reasons: Reasons) -> str:
    """The report as Markdown."""
    rows = [
        f"| {name} | {lines:,} | {_share(ran, lines)} | {branches:,} | {_share(taken, branches)} |"
        for name, (lines, ran, branches, taken) in packages_of(document).items()
    ]
    by_reason: dict[str, list[Gap]] = defaultdict(list)
    for gap in gaps:
        by_reason[reasons.get((gap.file, gap.line), "No reason is known.")].append(gap)
    told = [
        f"- **{reason}** " + "; ".join(f"{gap.file}: {gap.shown()}" for gap in dict.fromkeys(mine))
        for reason, mine in sorted(by_reason.items())
    ]
    return "\n".join(
        [
            "# Coverage",
            "",
            "Written by `nox -s coverage`: what the suite runs of the engine and the oracle, in the"
            " quick profile (8 examples a property), subprocesses and ranks included.",
            "",
            "| package | lines | ran | branches | taken |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "## What does not run, and why",
            "",
            *(told or ["Nothing."]),
            "",
        ]
    )


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def main(arguments: list[str]) -> int:
    """Write the report from coverage's JSON; 0 if every gap has its reason."""
    (source,) = arguments
    document = json.loads(Path(source).read_text(encoding="utf-8"))
    reasons = load_reasons(REPORTS / "uncovered.toml")
    gaps = gaps_of(document, ROOT)
    text = page(document, gaps, reasons)
    (REPORTS / "coverage.md").write_text(text, encoding="utf-8")
    unknown = [gap for gap in gaps if (gap.file, gap.line) not in reasons]
    stale = reasons.keys() - {(gap.file, gap.line) for gap in gaps}
    for gap in unknown:
        print(f"no reason: {gap.file}: {gap.shown()}")
    for file, line in sorted(stale):
        print(f"needs no reason any more: {file}: {line}")
    return int(bool(unknown))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
