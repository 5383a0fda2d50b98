"""The README's errata are the ledger's."""

import pytest

from verification.claims import Claim, Erratum, load_claims
from verification.errata import BEGIN, END, README, inserted, table

SLIP = Erratum("P22 eq. 38", "λ", "λ/2", ("verification/test_a.py::test_it",))
CLAIM = Claim("p22-eq38", "a claim", "P22", "verified", tests=("t.py::test",), errata=(SLIP,))


def test_the_readme_lists_the_errata_of_the_ledger() -> None:
    readme = README.read_text(encoding="utf-8")
    assert inserted(readme, load_claims()) == readme, "run python -m verification.errata --write"


def test_a_row_says_where_what_and_how_it_is_shown() -> None:
    assert table([CLAIM]).splitlines()[2] == (
        "| P22 eq. 38 | λ | λ/2 | [test_a](verification/test_a.py) |"
    )


def test_a_bar_in_a_formula_does_not_end_its_cell() -> None:
    slip = Erratum("P18 eq. 9", "p(y | z)", "p(y | z̃)", SLIP.tests)
    claim = Claim("p18-eq7-9", "a claim", "P18", "verified", tests=SLIP.tests, errata=(slip,))
    assert "| p(y \\| z) | p(y \\| z̃) |" in table([claim])


def test_the_table_replaces_what_stood_between_the_markers() -> None:
    readme = f"before\n{BEGIN}\nold\n{END}\nafter"
    written = inserted(readme, [CLAIM])
    assert "old" not in written
    assert written.startswith("before\n")
    assert written.endswith("\nafter")
    assert inserted(written, [CLAIM]) == written


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="`readme` must hold"):
        inserted("no markers", [CLAIM])
