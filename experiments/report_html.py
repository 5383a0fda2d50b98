"""The report as one HTML file that needs no other: styles inside, figures as data, no script."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape

from experiments.report_text import Section, cells, columns

STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; }
h1, h2 { line-height: 1.2; }
section { border-top: 2px solid #1a1a1a; margin-top: 2.5rem; }
img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .8rem .3rem 0;
         text-align: left; vertical-align: top; }
.verdict { font-weight: 600; }
.problem { border-left: 4px solid #D55E00; padding-left: .8rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .85rem; }
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { section { break-before: page; } }
"""


def page(sections: Sequence[Section]) -> str:
    """The whole report as an HTML document."""
    contents = "".join(
        f'<li><a href="#{_anchor(one)}">{escape(one.experiment)} ({escape(one.preset)})</a>: '
        f"{escape(one.title)}</li>"
        for one in sections
    )
    body = "".join(_section(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Experiments of apo-core</title><style>{STYLE}</style></head>\n"
        "<body><h1>Experiments of apo-core</h1><p>Each figure and table of the papers that was "
        "run, ours beside theirs. A run that diverged or failed counts as infinite and is never "
        f"left out.</p><ul>{contents}</ul>\n{body}</body></html>\n"
    )


def _anchor(section: Section) -> str:
    return escape(f"{section.preset}-{section.experiment}", quote=True)


def _section(section: Section) -> str:
    parts = [
        f'<section id="{_anchor(section)}"><h2>{escape(section.experiment)}: '
        f"{escape(section.title)}</h2>"
    ]
    if section.source:
        parts.append(f"<p>{escape(section.source)}</p>")
    if section.verdict:
        parts.append(f'<p class="verdict">{escape(section.verdict)}</p>')
    parts += [f'<p class="problem">Problem: {escape(one)}.</p>' for one in section.problems]
    if section.figure:
        data = b64encode(section.figure).decode()
        described = escape(f"Figure of {section.experiment}: {section.title}", quote=True)
        parts.append(f'<img alt="{described}" src="data:image/png;base64,{data}">')
    if section.rows:
        heads = columns(section.rows)
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells(row, heads))}</tr>"
            for row in section.rows
        )
        parts.append(
            f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in section.facts.items())
    parts.append(f"<dl>{facts}</dl></section>\n")
    return "".join(parts)
