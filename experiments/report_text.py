"""The report as text: Markdown for a file, tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from experiments.registry import Row

COLUMNS = ("method", "ours", "paper", "n", "note")


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
        problems: What could not be made from the records, and why.
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


def cells(row: Row) -> tuple[str, str, str, str, str]:
    """The row as text, in the order of `COLUMNS`."""
    return row.label, row.ours, row.paper, str(row.n), row.note


def markdown(sections: Sequence[Section]) -> str:
    """The whole report as Markdown; the figures lie beside it."""
    lines = ["# Experiments", ""]
    for section in sections:
        lines += [f"## {section.experiment}: {_escaped(section.title)}", ""]
        if section.source:
            lines += [section.source, ""]
        lines += [f"**{_escaped(section.verdict)}**", ""] if section.verdict else []
        lines += [f"Not shown: {problem}." for problem in section.problems]
        lines += [""] if section.problems else []
        if section.figure:
            lines += [f"![{section.experiment}]({section.figure_path})", ""]
        if section.rows:
            lines += [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
            lines += [_line([_escaped(cell) for cell in cells(row)]) for row in section.rows]
            lines += [""]
        lines += [f"- {name}: {_escaped(fact)}" for name, fact in section.facts.items()]
        lines += [""]
    return "\n".join(lines)


def print_sections(sections: Sequence[Section], console: Console) -> None:
    """Print each section's table and verdict."""
    for section in sections:
        table = Table(title=f"{section.experiment} ({section.preset}): {section.title}")
        for column in COLUMNS:
            table.add_column(column, justify="right" if column == "n" else "left")
        for row in section.rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in cells(row)))
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
