"""The papers' slips as a table of the README, generated from the ledger.

`python -m verification.errata` prints the table, `--write` puts it between the README's markers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from verification.claims import ROOT, Claim, load_claims

README = ROOT / "README.md"
BEGIN = "<!-- errata: written by python -m verification.errata --write -->"
END = "<!-- end of errata -->"


def table(claims: list[Claim]) -> str:
    """One row for each erratum: where, printed, meant, and the test file that shows it."""
    lines = ["| where | as printed | as meant | shown in |", "|---|---|---|---|"]
    for claim in claims:
        for slip in claim.errata:
            files = dict.fromkeys(test.partition("::")[0] for test in slip.tests)
            shown = ", ".join(f"[{Path(file).stem}]({file})" for file in files)
            cells = [cell.replace("|", "\\|") for cell in (slip.where, slip.printed, slip.meant)]
            lines.append(f"| {' | '.join(cells)} | {shown} |")
    return "\n".join(lines)


def inserted(readme: str, claims: list[Claim]) -> str:
    """The README with the table between its markers.

    Raises:
        ValueError: the README lacks a marker.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"`readme` must hold {BEGIN!r} and {END!r}; add both lines.")
    return f"{head}{BEGIN}\n\n{table(claims)}\n\n{END}{tail}"


def main() -> None:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write it into README.md")
    claims = load_claims()
    if parser.parse_args().write:
        README.write_text(inserted(README.read_text(encoding="utf-8"), claims), encoding="utf-8")
    else:
        print(table(claims))


if __name__ == "__main__":
    main()
