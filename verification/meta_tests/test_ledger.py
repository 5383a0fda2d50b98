"""The ledger holds every claim once, refuses rows that contradict themselves, and shows the run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from verification.claims import (
    ROOT,
    Claim,
    LedgerError,
    covers,
    load_claims,
    missing_tests,
    shown_status,
)
from verification.report import WIDTH

EVERY_ID = [
    "p22-eq3",
    "p22-fig1",
    "p22-tab1",
    "p22-eq4",
    "p22-eq16",
    "p22-eq34",
    "p22-kl-fisher",
    "p22-bregman-ggn",
    "p22-thm1",
    "p22-eq9",
    "p22-eq10",
    "p22-cor2",
    "p22-cor2-damped",
    "p22-cor2-violated",
    "p22-cost",
    "p22-eq13",
    "p22-eq14",
    "p22-eq38",
    "p22-eq47",
    "p22-eq45-50",
    "p18-eq5-6",
    "p18-eq7-9",
    "p18-eq14",
    "p18-lem1",
    "p18-thm1",
    "p18-thm2",
    "p18-tab2",
    "p22-fig3",
    "p22-fig4-left",
    "p22-fig4-right",
    "p22-tab2",
    "p22-tab3",
    "p22-fig23",
    "p22-fig5",
    "p22-fig6",
    "p22-tab4",
    "p22-tab6",
    "p22-fig11-22",
    "p22-fig7",
    "p22-fig8",
    "p22-fig9",
    "p22-fig10",
    "p22-fig24-26",
    "p22-fig27",
    "p22-fig28-30",
    "p18-fig1",
    "p18-fig2",
    "p18-fig3",
    "p18-fig4",
    "p18-fig5",
    "p18-fig6",
    "p18-fig7",
    "p18-fig8",
    "p18-fig9",
    "p18-fig10",
    "p18-fig11",
    "p18-fig14",
    "p18-fig15",
]


def test_every_claim_of_both_papers_has_one_row() -> None:
    ids = [claim.id for claim in load_claims()]
    assert len(ids) == len(set(ids))
    assert set(ids) == set(EVERY_ID)


def test_every_claim_of_theory_is_decided() -> None:
    """The rows up to P18 Table 2 are theory: a test verifies each, or refutes it as printed."""
    theory = EVERY_ID[: EVERY_ID.index("p18-tab2") + 1]
    statuses = {claim.id: claim.status for claim in load_claims()}
    assert {id_ for id_ in theory if statuses[id_] not in ("verified", "refuted")} == set()


def test_claims_fit_the_table() -> None:
    assert [claim.id for claim in load_claims() if len(claim.claim) > 58] == []


COUNTER = ["test_it.py::test_two"]
SLIP = """
[[claim.errata]]
where = "eq. 1"
printed = "a"
meant = "b"
tests = ["test_it.py::test_two"]
"""


def row(**changes: object) -> str:
    """A row of TOML: a sound verified claim, but for the changes; None leaves a key out."""
    keys = {
        "id": "p22-eq9",
        "claim": "a claim",
        "source": "P22",
        "status": "verified",
        "tests": ["test_it.py::test_a"],
        **changes,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items() if value is not None]
    return "[[claim]]\n" + "\n".join(lines) + "\n"


def written(folder: Path) -> Path:
    """A repository with one test file and one record."""
    tests = """
        from hypothesis import assume, given, settings, strategies as st
        from verification.tolerances import ROUNDING, assert_close
        import pytest

        @settings(max_examples=25, database=None)
        @given(st.integers(0, 10))
        def test_a(n):
            assume(n != 3)
            assert_close(n + 1e-16, float(n), ROUNDING, scale=1.0)

        @pytest.mark.parametrize("k", [0, 1])
        def test_two(k):
            assert k < 2

        def test_fails():
            assert_close(2.0, 1.0, ROUNDING)

        @pytest.mark.skip
        def test_skipped():
            pass
    """
    (folder / "test_it.py").write_text("\n".join(line[8:] for line in tests.splitlines()))
    (folder / "record.json").write_text("{}")
    (folder / "pytest.ini").write_text("[pytest]\n")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository of the test's own."""
    return written(tmp_path)


def load(root: Path, *rows: str) -> list[Claim]:
    (root / "claims.toml").write_text("\n".join(rows))
    return load_claims(root / "claims.toml", root)


def test_sound_rows_are_accepted(root: Path) -> None:
    claims = load(
        root,
        row(),
        row(id="p22-fig3", status="reproduced", tests=None, records=["record.json"]),
        row(id="p22-fig4-left", status="partly", tests=None, records=["record.json"], note="why"),
        row(id="p18-thm1", status="refuted", counterexamples=COUNTER, correction="what holds"),
        row(id="p22-fig5", status="open", tests=None),
    )
    assert [claim.status for claim in claims] == [
        "verified",
        "reproduced",
        "partly",
        "refuted",
        "open",
    ]


def test_the_tests_of_a_row_are_those_of_its_claim_counterexamples_and_slips(root: Path) -> None:
    refuted = row(status="refuted", counterexamples=["test_it.py::test_fails"], correction="c")
    (claim,) = load(root, refuted + SLIP)
    assert claim.all_tests == (
        "test_it.py::test_fails",
        "test_it.py::test_a",
        "test_it.py::test_two",
    )
    assert [erratum.printed for erratum in claim.errata] == ["a"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row() + row(), "`p22-eq9`: 2 rows where one is allowed"),
        (row(status="proven"), r"`status` must be one of \['verified', .*\], got 'proven'"),
        (row(status=None), r"row 1 \(`p22-eq9`\): `status` must be given"),
        (row(id=None), r"row 1 \(`no id`\): `id` must be given"),
        (row(claim=""), "`claim` must be given"),
        (row(claim=3), "`claim` must be a string, got 3"),
        (row(evidence=["a"]), "unknown key `evidence`"),
        (row(tests="test_it.py::test_a"), "`tests` must be a list of strings, got 'test_it"),
        (row(status="open"), "is open and yet has evidence; decide its status"),
        (row(tests=[]), "is verified without evidence; give it or say open"),
        (row(status="refuted", tests=None), "is refuted without evidence"),
        (row(status="refuted", correction="c"), "which requires `counterexamples`"),
        (row(status="refuted", counterexamples=COUNTER), "which requires `correction`"),
        (row(correction="c"), "has a counterexample or correction; say refuted"),
        (row() + "[[claim.errata]]\nwhere = 'eq. 1'\n", "an erratum must have"),
        (row() + SLIP.replace("test_it", "gone"), "the file of `gone.py::test_two` does not exist"),
        (row(tests=None, records=["record.json"]), "is verified, which requires `tests`"),
        (row(status="reproduced"), "is reproduced, which requires `records`"),
        (row(status="partly"), "the `note` must say what and at which scale"),
        (row(tests=["test_it.py"]), "`test_it.py` must be a node id"),
        (row(tests=["gone.py::test_a"]), "the file of `gone.py::test_a` does not exist"),
        (row(records=["gone.json"]), "the record `gone.json` does not exist"),
        (row(tests=["test_it.py::test_a"] * 2), "`test_it.py::test_a` is given twice"),
        ("[[claim]\n", "claims.toml must be TOML"),
        ("[other]\nx = 1\n", r"must hold only \[\[claim\]\] tables, got \['other'\]"),
    ],
)
def test_planted_bad_rows_are_refused(root: Path, bad: str, message: str) -> None:
    with pytest.raises(LedgerError, match=message):
        load(root, bad)


def test_all_faults_are_told_at_once(root: Path) -> None:
    with pytest.raises(LedgerError, match=r"(?s)2 fault\(s\).*is open.*must be one of"):
        load(root, row(status="open"), row(id="p22-eq10", status="?"))


@pytest.mark.parametrize(
    ("outcomes", "shown"),
    [
        ({"t.py::test_a": "passed"}, "verified"),
        ({"t.py::test_a[1]": "passed", "t.py::test_a[2]": "passed"}, "verified"),
        ({"t.py::test_a[1]": "passed", "t.py::test_a[2]": "failed"}, "FAILED"),
        ({"t.py::test_a": "skipped"}, "not run"),
        ({"t.py::test_ab": "passed"}, "not run"),
        ({}, "not run"),
    ],
)
def test_this_runs_evidence_decides_the_status(outcomes: dict[str, str], shown: str) -> None:
    claim = Claim("p22-eq9", "a claim", "P22", "verified", ("t.py::test_a",))
    assert shown_status(claim, outcomes) == shown


def test_one_failed_test_of_several_fails_the_claim() -> None:
    claim = Claim("p22-eq9", "a claim", "P22", "verified", ("t.py::test_a", "t.py::test_b"))
    assert shown_status(claim, {"t.py::test_a": "passed"}) == "not run"
    assert shown_status(claim, {"t.py::test_a": "passed", "t.py::test_b": "failed"}) == "FAILED"


def test_evidence_must_exist_where_its_file_was_collected() -> None:
    claim = Claim("p22-eq9", "a claim", "P22", "verified", ("t.py::test_a", "u.py::test_b"))
    assert missing_tests([claim], {"t.py::test_a[1]"}) == []
    assert missing_tests([claim], {"t.py::test_other"}) == [
        "`p22-eq9`: no test `t.py::test_a` was collected from its file."
    ]
    assert not covers("t.py::test_a", "t.py::test_a_longer")


Run = tuple[int, list[str], dict[str, Any]]


def run(root: Path, *arguments: str, **environment: str) -> Run:
    """Exit status, the lines printed, and the JSON of pytest with the plugin on `root`."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "verification.ledger",
        "-p",
        "no:cacheprovider",
    ]
    command += ["--rootdir", str(root), "-c", str(root / "pytest.ini")]
    command += ["--claims", str(root / "claims.toml")]
    if not environment:
        command += ["--verify-report", str(root)]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    written = Path(environment.get("APO_VERIFY_OUT", root)) / "ledger.json"
    document = json.loads(written.read_text()) if written.exists() else {}
    return done.returncode, (done.stdout + done.stderr).splitlines(), document


@pytest.fixture(scope="module", params=[(), ("-n", "1")], ids=["alone", "xdist"])
def whole_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run of all that `written` has, alone and by a worker."""
    root = written(tmp_path_factory.mktemp("whole"))
    load(
        root,
        row(),
        row(id="p22-eq10", tests=["test_it.py::test_fails", "test_it.py::test_a"]),
        row(id="p22-thm1", tests=["test_it.py::test_two"]),
        row(id="p22-cor2", tests=["test_it.py::test_skipped"]),
    )
    return run(root, str(root / "test_it.py"), *request.param)


def test_the_table_comes_last_and_is_written_as_json(whole_run: Run) -> None:
    status, lines, document = whole_run
    assert status == 1
    table = {line.split()[0]: line for line in lines if line.startswith("p22-")}
    assert table["p22-eq9"].split()[3:] == ["verified", "1/1", "10", "0.09"]
    assert table["p22-eq10"].split()[3:5] == ["FAILED", "1/2"]
    assert "2/2" in table["p22-thm1"]
    assert table["p22-cor2"].split()[3:6] == ["not", "run", "0/1"]
    assert lines[-4] == "4 claims: 1 FAILED, 1 not run, 2 verified"
    assert lines[-2].startswith("5 tests of 4 properties, 10 Hypothesis examples (1 more rejected)")
    assert max(map(len, lines[lines.index(table["p22-eq9"]) :])) <= WIDTH
    first = document["claims"][0]
    assert (first["examples"], document["rejected"]) == (10, 1)  # the integers 0 to 10 but for 3
    assert first["worst"] == pytest.approx(0.09, rel=0.1)  # 1e-16 of 5 eps
    assert document["tests"]["test_it.py::test_fails"]["worst"] > 1e10
    assert [c["status"] for c in document["claims"]] == [
        "verified",
        "FAILED",
        "verified",
        "not run",
    ]


def test_every_property_has_its_figures(whole_run: Run) -> None:
    """Counted by hand from the file; a property is a function over its parameters."""
    _, lines, document = whole_run
    shown = {one["name"].removeprefix("test_it.py::"): one for one in document["properties"]}
    figures = {
        name: [one[key] for key in ("cases", "failed", "examples", "comparisons")]
        for name, one in shown.items()
    }
    assert figures == {
        "test_a": [1, 0, 10, 10],
        "test_two": [2, 0, 0, 0],
        "test_fails": [1, 1, 0, 1],
        "test_skipped": [1, 0, 0, 0],
    }
    assert shown["test_two"]["worst"] is None
    seconds = sum(one["seconds"] for one in document["tests"].values())
    assert sum(one["seconds"] for one in shown.values()) == pytest.approx(seconds, abs=0.01)
    assert document["test_seconds"] == pytest.approx(seconds, abs=0.01)
    assert document["seconds"] > 0
    heading = next(i for i, line in enumerate(lines) if line.startswith("The 4 slowest of 4"))
    listed = {line.split()[0] for line in lines[heading + 3 : heading + 7]}
    assert listed == {f"test_it.py::{name}" for name in shown}


def test_a_tolerance_that_nothing_comes_near_is_told(root: Path) -> None:
    """5e-18 is 4.5e-3 of 5 eps, and 4.5e-5 of 500 eps; BITWISE has no ratio."""
    (root / "test_it.py").write_text(
        """
import pytest
from verification.tolerances import BITWISE, ROUNDING, assert_close

def close(n=20, **how):
    for _ in range(n):
        assert_close(5e-18, 0.0, ROUNDING, scale=1.0, **how)

def test_tight():
    close()

def test_loose():
    close(iterations=100)

@pytest.mark.loose("Its worst case is rare.")
def test_explained():
    close(iterations=100)

def test_few():
    close(n=19, iterations=100)

def test_once_near():
    close(iterations=100)
    close(n=1)

def test_bitwise():
    for _ in range(20):
        assert_close(1.0, 1.0, BITWISE)
"""
    )
    load(root, row(tests=["test_it.py::test_tight"]))
    _, lines, document = run(root, str(root / "test_it.py"))
    assert document["loose"] == ["test_it.py::test_loose"]
    assert document["explained"] == ["test_it.py::test_explained"]
    assert lines[-3].startswith("1 loose of 5 properties with a tolerance (1 more for a reason)")
    assert any(line.startswith("test_it.py::test_loose (loose) ") for line in lines)
    page = (root / "ledger.html").read_text(encoding="utf-8")
    loose = page[page.index("too loose") : page.index("Loose for a reason")]
    explained = page[page.index("Loose for a reason") : page.index("Every property")]
    assert "test_loose" in loose
    assert "test_tight" not in loose + explained
    assert "test_explained (loose for a reason)" in explained
    assert "Its worst case is rare." in explained


def test_evidence_that_does_not_exist_fails_the_run(root: Path) -> None:
    load(root, row(tests=["test_it.py::test_renamed"]))
    status, lines, _ = run(root, str(root / "test_it.py"), "--deselect", "test_it.py::test_fails")
    assert status == 0  # a part of a file was asked for: nothing can be said
    (root / "test_it.py").write_text("def test_a():\n    pass\n")
    status, lines, _ = run(root, str(root / "test_it.py"))
    assert status == 1
    assert lines[-1].startswith("LEDGER FAULT: `p22-eq9`: no test `test_it.py::test_renamed`")


def test_a_bad_ledger_stops_the_run(root: Path) -> None:
    (root / "claims.toml").write_text(row(status="proven"))
    status, lines, document = run(root, str(root / "test_it.py"))
    assert status == pytest.ExitCode.USAGE_ERROR
    assert any("`status` must be one of" in line for line in lines)
    assert document == {}


def test_the_folder_may_come_from_the_environment(root: Path) -> None:
    load(root, row())
    folder = root / "given"
    status, _, _ = run(root, f"{root}/test_it.py::test_a", APO_VERIFY_OUT=str(folder))
    assert status == 0
    assert {path.name for path in folder.iterdir()} == {"ledger.json", "ledger.html"}
