"""One run of the suite as lines for the terminal, as JSON and as a page.

All are made from the ledger's document, which is plain data, so that nothing is shown that the
JSON does not hold.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

WIDTH = 118  # of the tables: fits the log viewers that do not wrap at 120
SLOWEST = 10

LOOSE = 1e-3
"""A property whose error/tolerance stays below this has a tolerance that is too loose."""

LOOSE_AFTER = 20
"""Fewer comparisons say nothing about a tolerance."""

Document = dict[str, Any]
Row = tuple[str, ...]

CLAIM_HEADS = ("id", "claim", "status", "evidence", "examples", "worst e/t")
REASON_HEADS = ("property", "why nothing comes near its tolerance", "worst e/t")
PROPERTY_HEADS = ("property", "seconds", "examples", "compared", "worst e/t")

STYLE = """
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff;
       font: 15px/1.45 system-ui, sans-serif; }
h1, h2 { line-height: 1.2; }
h2 { border-top: 2px solid #1a1a1a; padding-top: .5rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { border-bottom: 1px solid #ccc; padding: .2rem .9rem .2rem 0; text-align: left;
         vertical-align: top; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; white-space: nowrap; overflow-wrap: normal; }
.fault { border-left: 4px solid #1a1a1a; padding-left: .8rem; font-weight: 600; }
"""


def lines(document: Document) -> list[str]:
    """What ends a run: the slowest properties, the ledger, and the figures."""
    slowest = [property_cells(row) for row in document["properties"][:SLOWEST]]
    claims = [claim_cells(row) for row in document["claims"]]
    return [
        f"The {len(slowest)} slowest of {len(document['properties']):,} properties",
        *_table(PROPERTY_HEADS, slowest, wide=0, left=()),
        "",
        "The claims and what this run shows of them",
        *_table(CLAIM_HEADS, claims, wide=1, left=(0, 2)),
        *figures(document),
        *faults(document),
    ]


def figures(document: Document) -> list[str]:
    """The run in numbers, one sentence a line."""
    claims = document["claims"]
    tally = Counter(row["status"] for row in claims)
    properties = document["properties"]
    compared = sum(row["comparisons"] > 0 for row in properties)
    return [
        f"{len(claims)} claims: "
        + ", ".join(f"{n} {status}" for status, n in sorted(tally.items())),
        f"{len(document['loose'])} loose of {compared:,} properties with a tolerance "
        f"({len(document['explained'])} more for a reason): below {LOOSE:g} in all of "
        f"{LOOSE_AFTER} comparisons or more",
        f"{len(document['tests']):,} tests of {len(properties):,} properties, "
        f"{document['examples']:,} Hypothesis examples ({document['rejected']:,} more rejected), "
        f"profile {document['profile']}",
        f"{document['comparisons']:,} comparisons, worst error/tolerance "
        f"{_ratio(document['worst'])}; {document['seconds']:.0f} s, of tests "
        f"{document['test_seconds']:.0f} s",
    ]


def faults(document: Document) -> list[str]:
    """What the ledger claims and the suite does not have."""
    return [f"LEDGER FAULT: {fault}" for fault in document["faults"]]


def claim_cells(row: dict[str, Any]) -> Row:
    """A row of the ledger, as `CLAIM_HEADS`."""
    ran = row["evidence"] > 0
    return (
        row["id"],
        row["claim"],
        row["status"],
        f"{row['passed']}/{row['evidence']}" if ran else "-",
        f"{row['examples']:,}" if ran else "-",
        _ratio(row["worst"]),
    )


def property_cells(row: dict[str, Any]) -> Row:
    """A property, as `PROPERTY_HEADS`; its failures and looseness are told in words."""
    remarks = [f"{row['failed']} FAILED"] * (row["failed"] > 0)
    if row["loose"]:
        remarks.append("loose for a reason" if row["reason"] else "loose")
    name = row["name"].removeprefix("verification/")
    return (
        f"{name} ({', '.join(remarks)})" if remarks else name,
        f"{row['seconds']:.2f}",
        f"{row['examples']:,}" if row["examples"] else "-",
        f"{row['comparisons']:,}" if row["comparisons"] else "-",
        _ratio(row["worst"]),
    )


def _ratio(worst: float | str | None) -> str:
    """An error/tolerance; infinity comes as a string."""
    return "-" if worst is None else f"{float(worst):.2g}"


def _table(heads: Row, rows: Sequence[Row], *, wide: int, left: Iterable[int]) -> list[str]:
    """Lines of at most `WIDTH` columns: column `wide` takes what the others leave.

    What is too long for it is cut, a node id in its middle: its end is its name.
    """
    widths = [max(len(cells[i]) for cells in (heads, *rows)) for i in range(len(heads))]
    widths[wide] = WIDTH - sum(widths) + widths[wide] - 2 * (len(heads) - 1)

    def line(cells: Row) -> str:
        shown = list(cells)
        shown[wide] = _cut(cells[wide], widths[wide])
        return "  ".join(
            f"{cell:<{width}}" if i == wide or i in left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(shown, widths, strict=True))
        ).rstrip()

    return [line(heads), "-" * WIDTH, *map(line, rows), "-" * WIDTH]


def _cut(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    if "::" in text:
        return "…" + text[len(text) - width + 1 :]
    return text[: width - 1] + "…"


def page(document: Document) -> str:
    """The run as an HTML document that needs no other file and no script."""
    properties = document["properties"]
    loose = [property_cells(row) for row in properties if row["loose"] and not row["reason"]]
    explained = [
        (property_cells(row)[0], row["reason"], _ratio(row["worst"]))
        for row in properties
        if row["loose"] and row["reason"]
    ]
    by_name = sorted(properties, key=lambda row: row["name"])
    sections = [
        ("The claims", _html(CLAIM_HEADS, map(claim_cells, document["claims"]), numbers=3)),
        (
            f"The {SLOWEST} slowest properties",
            _html(PROPERTY_HEADS, map(property_cells, properties[:SLOWEST])),
        ),
        (
            "Tolerances that may be too loose",
            _html(PROPERTY_HEADS, loose) if loose else "<p>None.</p>",
        ),
        (
            "Loose for a reason",
            _html(REASON_HEADS, explained, numbers=2) if explained else "<p>None.</p>",
        ),
        (
            "Every property",
            f"<details><summary>{len(properties):,} properties</summary>"
            f"{_html(PROPERTY_HEADS, map(property_cells, by_name))}</details>",
        ),
    ]
    body = "".join(f"<h2>{escape(title)}</h2>{content}\n" for title, content in sections)
    told = "".join(f'<p class="fault">{escape(fault)}</p>' for fault in faults(document))
    numbers = "".join(f"<li>{escape(figure)}</li>" for figure in figures(document))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Verification of apo-core</title><style>{STYLE}</style></head>\n"
        f"<body><h1>Verification of apo-core</h1>{told}<ul>{numbers}</ul>\n{body}</body></html>\n"
    )


def _html(heads: Row, rows: Iterable[Row], numbers: int = 1) -> str:
    """A table whose columns from `numbers` on are numbers."""

    def line(cells: Row, tag: str) -> str:
        return "".join(
            f'<{tag} class="number">{escape(cell)}</{tag}>'
            if i >= numbers
            else f"<{tag}>{escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(cells, 'td')}</tr>\n" for cells in rows)
    return f'<div class="wide"><table><tr>{line(heads, "th")}</tr>\n{body}</table></div>'


def write(document: Document, folder: Path) -> None:
    """Write ledger.json and ledger.html below `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    for name, content in (("ledger.json", text), ("ledger.html", page(document))):
        partial = folder / f".{name}.{os.getpid()}"
        partial.write_text(content, encoding="utf-8")
        partial.replace(folder / name)
