"""The limits as JSON and as a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

STEM = Path("verification/reports/detection")
TARGET = 1e-8  # the relative error that the suite promises to notice


@final
@dataclass(frozen=True)
class Limit:
    """What the suite notices of one quantity.

    Attributes:
        name: of the quantity.
        target: its function.
        of: "value" or "derivative".
        limit: the smallest relative error that was noticed, or None.
        test: the test that noticed it.
        float32: the test that noticed a round trip through float32, or None.
        tests: how many tests enter the function, those beyond the time left out.
        reason: why the limit is above the target, where it is.
    """

    name: str
    target: str
    of: str
    limit: float | None
    test: str | None
    float32: str | None
    tests: int
    reason: str = ""

    @property
    def reached(self) -> bool:
        """Whether an error of `TARGET` is noticed."""
        return self.limit is not None and self.limit <= TARGET


def share_reached(limits: list[Limit]) -> float:
    """The share of the quantities whose limit is at most `TARGET`."""
    return sum(limit.reached for limit in limits) / max(1, len(limits))


def read(stem: Path = STEM) -> tuple[dict[str, Any], list[Limit]]:
    """The run and the limits of a committed report."""
    document = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    return document["run"], [Limit(**row) for row in document["quantities"]]


def write(limits: list[Limit], run: dict[str, Any], stem: Path) -> None:
    """Write `stem`.json and `stem`.md."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    document = {"run": run, "quantities": [asdict(limit) for limit in limits]}
    text = json.dumps(document, indent=1, ensure_ascii=False)
    stem.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(limits, run), encoding="utf-8")


def markdown(limits: list[Limit], run: dict[str, Any]) -> str:
    """The report to read."""
    epsilons = (1e-4, 1e-6, 1e-8, 1e-10, 1e-12)
    counts = [
        sum(limit.limit is not None and limit.limit <= epsilon for limit in limits)
        for epsilon in epsilons
    ]
    cast = sum(limit.float32 is not None for limit in limits)
    lines = [
        "# The detection limit",
        "",
        "Written by `nox -s detect`; the machinery is described in `verification/detection`.",
        "",
        f"{len(limits)} core quantities, one at a time times 1 + ε, or through float32 and back. "
        f"**{share_reached(limits):.1%} are noticed at {TARGET:g}.** {run['tests']:,} tests in the "
        f"quick profile (8 examples a property); {run['where']}.",
        "",
        f"| ε | {' | '.join(f'{epsilon:g}' for epsilon in epsilons)} | float32 |",
        "|---" * (len(epsilons) + 2) + "|",
        f"| noticed of {len(limits)} | {' | '.join(map(str, counts))} | {cast} |",
        "",
        "| quantity | of | limit | noticed by | float32 | why above the target |",
        "|---|---|---|---|---|---|",
    ]
    for limit in limits:
        shown = "-" if limit.limit is None else f"{limit.limit:g}"
        test = "-" if limit.test is None else limit.test.removeprefix("verification/")
        cells = (
            limit.name,
            limit.of,
            shown,
            test.replace("|", "\\|"),
            "yes" if limit.float32 else "no",
            limit.reason,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
