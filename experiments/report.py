"""The report on all records of a folder: a page, a Markdown file, and the figures as PNG files.

It needs the records alone: no data set, no device, no trial runs again.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from experiments.records import Record, RecordError, read_records, write_whole
from experiments.registry import AT_EDGE, PRESETS, Experiment, Preset, Row
from experiments.report_html import page
from experiments.report_style import png, report_style
from experiments.report_text import Section, markdown
from experiments.runner import record_folder


@dataclass
class Report:
    """What `write_report` wrote.

    Attributes:
        page: The self-contained HTML page.
        sections: One an experiment and preset.
        failures: One sentence each on what could not be shown, and on what was chosen at an edge of
            its grid without a declared reason.
    """

    page: Path
    sections: list[Section] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def found_records(out: Path) -> list[tuple[Preset, str]]:
    """The pairs of preset and experiment that have records below `out`."""
    return [
        (preset, folder.name)
        for preset in PRESETS
        for folder in sorted((out / preset).glob("*"))
        if any(folder.glob("[!.]*.json"))
    ]


def write_report(out: Path, catalogue: Mapping[str, Experiment]) -> Report:
    """Write report.html, report.md and figures/*.png below `out`, from the records there.

    What cannot be shown is named in the report and in `failures`; the rest is shown.

    Raises:
        RecordError: There is no record below `out`, or a file is not one.
    """
    found = found_records(out)
    if not found:
        raise RecordError(
            f"`DIR` must hold records, as `run --out DIR` writes them, got {str(out)!r} without "
            "any; run an experiment first, or name another folder."
        )
    order = list(catalogue)
    found.sort(key=lambda pair: order.index(pair[1]) if pair[1] in order else len(order))
    report = Report(page=out / "report.html")
    for preset, name in found:
        records = list(read_records(record_folder(out, preset, name)).values())
        if name in catalogue:
            section = _section(catalogue[name], preset, records)
        else:
            problem = f"`{name}` has records but is not among the experiments"
            section = _bare(name, preset, records, [problem])
        report.sections.append(section)
        report.failures += [f"report of {name} ({preset}): {one}" for one in section.problems]
        if section.figure:
            write_whole(out / section.figure_path, section.figure)
    write_whole(report.page, page(report.sections).encode())
    write_whole(out / "report.md", markdown(report.sections).encode())
    return report


def _section(experiment: Experiment, preset: Preset, records: Sequence[Record]) -> Section:
    """All that is said of one experiment; what it cannot say becomes a problem."""
    problems: list[str] = []

    def attempt(what: str, make, otherwise):
        try:
            return make()
        except (
            Exception
        ) as error:  # records of an interrupted run may lack what an experiment needs
            reason = "".join(traceback.format_exception_only(error)).strip()
            problems.append(f"the {what} cannot be made from these records ({reason})")
            return otherwise

    rows: list[Row] = attempt("table", lambda: experiment.table(records), [])
    verdict: str = attempt("verdict", lambda: experiment.verdict(records), "")
    figure: bytes = attempt("figure", lambda: _drawn(experiment, records), b"")
    problems += _at_edge(experiment, preset, rows)
    reasons = [
        f"{label}: {reason}" for (at, label), reason in experiment.edges.items() if at == preset
    ]
    return Section(
        experiment=experiment.name,
        preset=preset,
        title=experiment.title,
        source=experiment.source,
        rows=rows,
        verdict=verdict,
        figure=figure,
        facts={
            "Scale": f"{preset}: {experiment.scales[preset]}",
            "Claims": ", ".join(experiment.claims) or "none",
            **({"Edges of grids": "; ".join(reasons)} if reasons else {}),
            **facts(records),
        },
        problems=problems,
    )


def _at_edge(experiment: Experiment, preset: Preset, rows: Sequence[Row]) -> list[str]:
    """The rows whose best value lies at an edge of its grid for no declared reason.

    Beyond the edge there may be a better one, and so the row compares nothing. The preset `smoke`
    measures nothing in any case, and its grids are thin.
    """
    return [
        f"the best of {row.label!r} lies at an edge ({note}); widen the grid, or declare the "
        f"reason in the `edges` of {experiment.name}"
        for row in rows
        for note in row.note.split("; ")
        if AT_EDGE in note and preset != "smoke" and (preset, row.label) not in experiment.edges
    ]


def _bare(name: str, preset: str, records: Sequence[Record], problems: list[str]) -> Section:
    return Section(name, preset, name, "", [], "", b"", facts(records), problems)


def _drawn(experiment: Experiment, records: Sequence[Record]) -> bytes:
    with report_style():
        figure = Figure()
        experiment.draw(records, figure)
        return png(figure)


def facts(records: Sequence[Record]) -> dict[str, str]:
    """What a reader must know of the records beside their numbers; every record counts."""
    states = Counter(record.status for record in records)
    commits = Counter(
        f"{record.provenance.commit[:12]}{' with changes' if record.provenance.dirty else ''}"
        for record in records
    )
    versions = {
        f"{k} {v}": None for record in records for k, v in record.provenance.versions.items()
    }
    minutes = sum(record.seconds for record in records) / 60
    days = sorted({record.started[:10] for record in records})
    return {
        "Trials": ", ".join(f"{count} {state}" for state, count in sorted(states.items())),
        "Seeds": ", ".join(str(seed) for seed in sorted({record.seed for record in records})),
        "Hardware": "; ".join(sorted({record.provenance.hardware for record in records})),
        "Wall time": f"{minutes:.1f} minutes in all",
        "Commit": "; ".join(
            commit if len(commits) == 1 else f"{commit} (trials: {count})"
            for commit, count in commits.items()
        ),
        "Versions": ", ".join(versions),
        "Run on": days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
    }
