"""The report as text: Markdown for a file, tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from experiments.registry import Row

TEXTS = ("method", "ours", "paper", "note")  # the columns that hold no single number


@dataclass(frozen=True)
class Section:
    """What the report says of one experiment at one preset.

    Attributes:
        experiment: Its name.
        preset: The preset of its records.
        title: One line for people.
        source: The figure or table of the paper.
        rows: Ours beside the paper's.
        verdict: One sentence computed from the records.
        figure: The content of a PNG file, empty where it could not be drawn.
        facts: What stands below the table, by heading.
        problems: What is wrong with the section, such as what could not be made of the records.
    """

    experiment: str
    preset: str
    title: str
    source: str
    rows: list[Row]
    verdict: str
    figure: bytes
    facts: dict[str, str]
    problems: list[str]

    @property
    def figure_path(self) -> str:
        """Where the figure lies below the report's folder."""
        return f"figures/{self.preset}-{self.experiment}.png"


def columns(rows: Sequence[Row]) -> list[str]:
    """The table's heads: what every row has, and the costs that any of them has."""
    units = dict.fromkeys(unit for row in rows for unit in row.costs)
    return ["method", "ours", "paper", "n", *units, "note"]


def cells(row: Row, heads: Sequence[str]) -> list[str]:
    """The row as text, in the order of the heads; "–" for a cost that it has not."""
    known = {
        **row.costs,
        "method": row.label,
        "ours": row.ours,
        "paper": row.paper,
        "n": str(row.n),
        "note": row.note,
    }
    return [known.get(head, "–") for head in heads]


def markdown(sections: Sequence[Section]) -> str:
    """The whole report as Markdown; the figures lie beside it."""
    lines = ["# Experiments", ""]
    for section in sections:
        lines += [f"## {section.experiment}: {_escaped(section.title)}", ""]
        if section.source:
            lines += [section.source, ""]
        lines += [f"**{_escaped(section.verdict)}**", ""] if section.verdict else []
        lines += [f"Problem: {_escaped(problem)}." for problem in section.problems]
        lines += [""] if section.problems else []
        if section.figure:
            lines += [f"![{section.experiment}]({section.figure_path})", ""]
        if section.rows:
            heads = columns(section.rows)
            lines += [_line(heads), _line(["---"] * len(heads))]
            lines += [_line([_escaped(cell) for cell in cells(row, heads)]) for row in section.rows]
            lines += [""]
        lines += [f"- {name}: {_escaped(fact)}" for name, fact in section.facts.items()]
        lines += [""]
    return "\n".join(lines)


def print_sections(sections: Sequence[Section], console: Console) -> None:
    """Print each section's table and verdict."""
    for section in sections:
        table = Table(title=f"{section.experiment} ({section.preset}): {section.title}")
        heads = columns(section.rows)
        for head in heads:
            table.add_column(head, justify="left" if head in TEXTS else "right")
        for row in section.rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in cells(row, heads)))
        console.print()
        console.print(table)
        console.print(section.verdict, markup=False, highlight=False)


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, also in a table's cell."""
    for character in "\\`*_<>[]|#":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")
