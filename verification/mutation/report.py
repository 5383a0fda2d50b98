"""The report of a mutation run: the score of each module, and every survivor with its reason.

The reasons stand in `verification/reports/survivors.toml`, a table for each survivor:

    [[survivor]]
    file = "apo_core/objective.py"
    source = "if self.wsd_weight > 0:"
    before = "self.wsd_weight > 0"
    after = "self.wsd_weight >= 0"
    verdict = "equivalent"
    reason = "one sentence"

verdict      meaning
equivalent   no test can tell it from the original, or it is no error
elsewhere    noticed by what this run leaves out: tests that start processes, an accelerator
closed       a test that notices it was written since
gap          a test is missing
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from verification.mutation.mutants import Change
from verification.mutation.records import STATUSES, Result, score

VERDICTS = ("equivalent", "elsewhere", "closed", "gap")
EXPLAINED = ("equivalent", "elsewhere")  # no test of a run can notice these
Reasons = dict[Change, tuple[str, str]]


def read_reasons(path: Path) -> Reasons:
    """The verdict and the reason of each survivor, by file, source line, before and after.

    Raises:
        ValueError: an unknown verdict, or no reason.
    """
    if not path.exists():
        return {}
    reasons: Reasons = {}
    for row in tomllib.loads(path.read_text(encoding="utf-8"))["survivor"]:
        if row["verdict"] not in VERDICTS or not row["reason"]:
            raise ValueError(
                f"`survivor` must have a reason and one of the verdicts {list(VERDICTS)}, got "
                f"{row}; correct {path.name}."
            )
        key = (row["file"], row["source"], row["before"], row["after"])
        reasons[key] = row["verdict"], row["reason"]
    return reasons


def document(
    results: Sequence[Result],
    population: Counter[str],
    reasons: Reasons,
    lines: dict[str, list[str]],
    run: dict[str, Any],
) -> dict[str, Any]:
    """The whole report as plain data.

    Args:
        results: of the mutants that ran.
        population: how many mutants each file has.
        reasons: of the survivors.
        lines: the source of each file.
        run: how the results came about.
    """
    by_file: dict[str, list[Result]] = {file: [] for file in sorted(population)}
    for result in results:
        by_file[result.file].append(result)
    survivors = []
    for result in sorted((r for r in results if r.alive), key=lambda r: (r.file, r.line)):
        source = lines[result.file][result.line - 1].strip()
        change = (result.file, source, result.before, result.after)
        verdict, reason = reasons.get(change, ("open", ""))
        row = {"source": source, "verdict": verdict, "reason": reason}
        survivors.append(asdict(result) | row)
    return {
        "run": run,
        "mutants": sum(population.values()),
        "all": _tally(results),
        "modules": {
            file: {"mutants": population[file], **_tally(mine)} for file, mine in by_file.items()
        },
        "operators": {
            operator: _tally([r for r in results if r.operator == operator])
            for operator in sorted({r.operator for r in results})
        },
        "verdicts": dict(sorted(Counter(row["verdict"] for row in survivors).items())),
        "survivors": survivors,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report to read."""
    tally, run = report["all"], report["run"]
    verdicts = Counter(report["verdicts"])
    differing = tally["ran"] - verdicts["equivalent"]
    rest = {
        "of those that are not equivalent": differing,
        "of those that tests of this run could notice": differing - verdicts["elsewhere"],
    }
    lines = [
        "# Mutation testing",
        "",
        "Written by `nox -s mutate`; the machinery is described in `verification/mutation`.",
        "",
        f"- {report['mutants']:,} mutants, of which "
        + (
            "all ran."
            if tally["ran"] == report["mutants"]
            else f"a random sample of {tally['ran']:,} ({tally['ran'] / report['mutants']:.0%}) "
            f"ran; seed {run['seed']}."
        ),
        f"- Killed: {tally['killed']:,} of {tally['ran']:,}, **{_share(tally)}** "
        f"(95% interval, exact: {tally['low']:.1%} to {tally['high']:.1%})"
        + "".join(f"; {tally['killed'] / n:.1%} {of}" for of, n in rest.items() if n)
        + ".",
        "- Survivors: "
        + (", ".join(f"{n} {verdict}" for verdict, n in report["verdicts"].items()) or "none")
        + ".",
        f"- {run['tests']:,} tests in the quick profile (8 examples a property), each mutant by "
        f"those that run its statement, at most {run['first']:g} s of them, and where it survives "
        f"those at most {run['limit']:g} s, until one fails.",
        f"- {run['where']}; {run['minutes']:.0f} minutes of processes.",
        "",
    ]
    lines += [*_table("module", report["modules"], "mutants"), ""]
    lines += [*_table("operator", report["operators"]), "", "## Survivors", ""]
    if report["survivors"]:
        lines += ["| where | source | change | verdict | reason |", "|---|---|---|---|---|"]
    for row in report["survivors"]:
        change = f"{_code(row['before'])} → {_code(row['after'])}"
        where = f"{row['file']}:{row['line']}"
        cells = (where, _code(row["source"]), change, row["verdict"], row["reason"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(report: dict[str, Any], stem: Path) -> None:
    """Write `stem`.json and `stem`.md."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    stem.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


def _tally(results: Sequence[Result]) -> dict[str, Any]:
    killed, ran, low, high = score(results)
    counts = Counter(result.status for result in results)
    by_status = {status: counts[status] for status in STATUSES}
    # A timeout and a crash are noticed too.
    return by_status | {"killed": killed, "ran": ran, "low": round(low, 4), "high": round(high, 4)}


def _share(tally: dict[str, Any]) -> str:
    return f"{tally['killed'] / tally['ran']:.1%}" if tally["ran"] else "-"


def _table(head: str, rows: dict[str, dict[str, Any]], *more: str) -> list[str]:
    columns = [*more, "ran", "killed", "timeout", "crash", "survived", "no test"]
    lines = [f"| {' | '.join([head, *columns, 'score'])} |", "|---" * (len(columns) + 2) + "|"]
    for name, tally in rows.items():
        cells = [name, *(str(tally[column]) for column in columns), _share(tally)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _code(text: str) -> str:
    """In one cell of a table."""
    return "`" + " ".join(text.split()).replace("|", "\\|") + "`"
