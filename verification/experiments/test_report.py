"""The report: self-contained, complete, made of the records alone, and legible to all."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure

from experiments.__main__ import main
from experiments.records import Record, RecordError, read_records, write_record
from experiments.registry import AT_EDGE, Preset, Row
from experiments.report import write_report
from experiments.report_html import page
from experiments.report_style import MARKS, SETTINGS, png, report_style
from experiments.report_text import Section, markdown
from experiments.runner import record_folder, run_experiment
from experiments.watch import LineWatch
from verification.experiments.fakes import Descent, record_of

PNG = b"\x89PNG\r\n\x1a\n"
VOID = ("meta", "img", "link", "br")


class Page(HTMLParser):
    """The tags of a page with their attributes, its text, and the tags left open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder with the records of a finished run, and one failed trial among them."""
    experiment = Descent(faults={"rate-0.1-seed-0": ValueError("<script>alert(1)</script>")})
    run_experiment(experiment, "default", tmp_path, LineWatch([].append))
    return tmp_path


def test_the_page_needs_no_other_file(out: Path) -> None:
    report = write_report(out, {"descent": Descent()})
    page = Page(report.page.read_text())
    assert page.open == []
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    targets = [
        value for _, found in page.tags for name, value in found.items() if name in ("src", "href")
    ]
    assert targets
    assert all(value and value.startswith(("data:image/png;base64,", "#")) for value in targets)
    assert "url(" not in report.page.read_text()
    assert "@import" not in report.page.read_text()


def test_the_page_shows_table_verdict_facts_and_figure(out: Path) -> None:
    experiment = Descent()
    report = write_report(out, {"descent": experiment})
    page = Page(report.page.read_text())
    records = list(read_records(record_folder(out, "default", "descent")).values())
    for row in experiment.table(records):
        for cell in (row.label, row.ours, row.paper, row.note):
            assert cell in page.text
    assert experiment.verdict(records) in page.text
    for fact in (
        experiment.title,
        experiment.source,
        "default: 20 steps, 3 seeds",
        "p22-eq3",
        "1 diverged, 1 failed, 3 finished",
        "0, 1, 2",
        records[0].provenance.hardware,
        records[0].provenance.commit[:12],
        f"torch {records[0].provenance.versions['torch']}",
    ):
        assert fact in page.text, fact
    images = [found for tag, found in page.tags if tag == "img"]
    assert len(images) == 1
    assert experiment.title in (images[0]["alt"] or "")
    figure = base64.b64decode((images[0]["src"] or "").split(",", 1)[1])
    assert figure.startswith(PNG)
    assert (out / "figures/default-descent.png").read_bytes() == figure


def test_the_report_depends_on_nothing_but_the_records(out: Path, tmp_path: Path) -> None:
    first = write_report(out, {"descent": Descent()})
    copy = tmp_path / "copy"
    for name, record in read_records(record_folder(out, "default", "descent")).items():
        write_record(record_folder(copy, "default", "descent") / f"{name}.json", record)
    second = write_report(copy, {"descent": Descent()})
    assert second.page.read_bytes() == first.page.read_bytes()
    assert (copy / "report.md").read_bytes() == (out / "report.md").read_bytes()


def test_presets_and_experiments_are_apart_in_the_order_of_the_catalogue(out: Path) -> None:
    run_experiment(Descent("a-late-one"), "default", out, LineWatch([].append))
    run_experiment(Descent(), "smoke", out, LineWatch([].append))
    report = write_report(out, {"descent": Descent(), "a-late-one": Descent("a-late-one")})
    assert [(one.experiment, one.preset) for one in report.sections] == [
        ("descent", "smoke"),
        ("descent", "default"),
        ("a-late-one", "default"),
    ]
    assert report.failures == []


def test_what_cannot_be_shown_is_said_and_the_rest_is_shown(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise KeyError("<b>loss")

    monkeypatch.setattr(Descent, "draw", broken)
    run_experiment(Descent("gone"), "default", out, LineWatch([].append))
    report = write_report(out, {"descent": Descent()})
    page = Page(report.page.read_text()).text
    assert report.failures == [
        "report of descent (default): the figure cannot be made from these records "
        "(KeyError: '<b>loss')",
        "report of gone (default): `gone` has records but is not among the experiments",
    ]
    for failure in report.failures:
        assert failure.split(": ", 1)[1] in page
    assert Descent().verdict([record_of(loss=0.0)]) in page


def test_mixed_commits_are_told_apart(tmp_path: Path) -> None:
    folder = record_folder(tmp_path, "smoke", "descent")
    for name, commit, dirty in (
        ("a", "0" * 40, False),
        ("b", "1" * 40, True),
        ("c", "0" * 40, False),
    ):
        record = record_of(name, loss=1.0)
        source = replace(record.provenance, commit=commit, dirty=dirty)
        write_record(folder / f"{name}.json", replace(record, provenance=source))
    facts = write_report(tmp_path, {"descent": Descent()}).sections[0].facts
    assert facts["Commit"] == "000000000000 (trials: 2); 111111111111 with changes (trials: 1)"


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="`DIR` must hold records"):
        write_report(tmp_path, {"descent": Descent()})


def test_markdown_keeps_cells_in_their_columns() -> None:
    row = Row("a|b", "*1*", "2_3_4", 5, "`x`\ny <b>")
    section = Section("e", "smoke", "t", "s", [row], "v", PNG, {"Seeds": "0"}, [])
    lines = markdown([section]).splitlines()
    start = lines.index("| method | ours | paper | n | note |")
    assert lines[start + 1] == "| --- | --- | --- | --- | --- |"
    assert lines[start + 2] == r"| a\|b | \*1\* | 2\_3\_4 | 5 | \`x\` y \<b\> |"
    assert "![e](figures/smoke-e.png)" in lines


def test_costs_are_columns_in_page_and_markdown() -> None:
    rows = [Row("a", "1", "–", 1, costs={"seconds": "12"}), Row("b", "2", "–", 1)]
    section = Section("e", "smoke", "t", "s", rows, "v", PNG, {}, [])
    lines = markdown([section]).splitlines()
    start = lines.index("| method | ours | paper | n | seconds | note |")
    assert lines[start + 2 : start + 4] == [
        "| a | 1 | – | 1 | 12 |  |",
        "| b | 2 | – | 1 | – |  |",
    ]
    html = page([section])
    assert '<th scope="col">seconds</th><th scope="col">note</th>' in html
    assert "<td>12</td><td></td>" in html


def _edged(self: Descent, records: Sequence[Record]) -> list[Row]:
    return [Row("descent", "1", "–", 1, f"best of 3: η = 1; lr {AT_EDGE}"), Row("b", "1", "–", 1)]


@pytest.mark.parametrize(
    ("preset", "declared", "fails"),
    [("default", False, True), ("default", True, False), ("smoke", False, False)],
)
def test_a_best_value_at_the_edge_fails_the_report_unless_a_reason_is_declared(
    preset: Preset, declared: bool, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Descent, "table", _edged)
    if declared:
        reason = {("default", "descent"): "the grid is printed so"}
        monkeypatch.setattr(Descent, "edges", reason, raising=False)
    run_experiment(Descent(), preset, tmp_path, LineWatch([].append))
    report = write_report(tmp_path, {"descent": Descent()})
    said = (
        "the best of 'descent' lies at an edge (lr at the grid's edge); widen the grid, or declare "
        "the reason in the `edges` of descent"
    )
    assert report.failures == ([f"report of descent ({preset}): {said}"] if fails else [])
    page = Page(report.page.read_text()).text
    assert (f"Problem: {said}." in page) == fails
    assert ("descent: the grid is printed so" in page) == declared
    assert main(["report", str(tmp_path)], {"descent": Descent()}) == (1 if fails else 0)


def test_no_two_of_the_first_lines_look_alike_to_anyone() -> None:
    styles = [
        (one["color"], str(one["linestyle"]), one["marker"]) for one in SETTINGS["axes.prop_cycle"]
    ]
    assert len(styles) == 14
    # Markers alone tell all apart; without them colour and dash together still do.
    assert max(Counter(marker for *_, marker in styles).values()) == 1
    for (colour, dash, _), (other_colour, other_dash, _) in combinations(styles, 2):
        assert (colour, dash) != (other_colour, other_dash)
    # The first seven differ in each of the three: grey print keeps dashes and markers.
    for first, second in combinations(styles[:7], 2):
        assert all(a != b for a, b in zip(first, second, strict=True))


def test_the_style_leaves_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    with report_style():
        assert matplotlib.rcParams["axes.grid"] is True
    assert dict(matplotlib.rcParams) == before


def test_markers_are_thinned_on_long_lines_only() -> None:
    with report_style():
        figure = Figure()
        axes = figure.subplots()
        long = [axes.plot(range(1000))[0] for _ in range(3)]
        short = axes.plot(range(5))[0]
        assert png(figure).startswith(PNG)
    offsets = []
    for line in long:
        every = line.get_markevery()
        assert isinstance(every, tuple)
        start, step = map(int, every)
        offsets.append(start)
        assert len(range(start, 1000, step)) == MARKS
    assert len(set(offsets)) == 3
    assert short.get_markevery() is None


def test_facts_of_failed_runs_stay_in(out: Path) -> None:
    write_report(out, {"descent": Descent()})
    text = (out / "report.md").read_text()
    assert re.search(r"\| descent, rate 0.1 \| inf \| – \| 1 \| \\<failed\\> \|", text)
