"""The mutator mutates, the recorder goes on, and a suite that is blind leaves survivors."""

import ast
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verification.claims import ROOT
from verification.mutation.__main__ import REPORTS, likeliest_first, sources_of
from verification.mutation.mutants import Mutant, Source
from verification.mutation.records import Recorder, Result, score
from verification.mutation.report import document, markdown, read_reasons
from verification.mutation.selection import Traced, Tracer, by_turns
from verification.profiles import share

MUTANT = Mutant("a.py", "f", 1, 2, "sign", "-x", "x", 0, "0" * 12)


def source_of(text: str, folder: Path) -> Source:
    path = folder / "module.py"
    path.write_text(text, encoding="utf-8")
    return Source(path, folder)


@pytest.mark.parametrize(
    ("statement", "operator", "after"),
    [
        ("return a + b", "arithmetic", "a - b"),
        ("return a - b", "arithmetic", "a + b"),
        ("return a * b", "arithmetic", "a / b"),
        ("return a / b", "arithmetic", "a * b"),
        ("return a ** b", "arithmetic", "a * b"),
        ("return a @ b", "arithmetic", "b @ a"),
        ("a += b", "arithmetic", "a -= b"),
        ("a += b", "deletion", "pass"),
        ("print(a)", "deletion", "pass"),
        ("raise ValueError(a)", "deletion", "pass"),
        ("return a < b", "comparison", "a <= b"),
        ("return a < b", "comparison", "a >= b"),
        ("return a == b", "comparison", "a != b"),
        ("return a in b", "comparison", "a not in b"),
        ("return a and b", "boolean", "a or b"),
        ("return not a", "boolean", "a"),
        ("return True", "boolean", "False"),
        ("return a if b else 0", "boolean", "not b"),
        ("return a[0]", "constant", "1"),
        ("return 0.5 * a", "constant", "1.0"),
        ("return a + 0.0", "constant", "1.0"),
        ("return -a", "sign", "a"),
        ("return a.T", "axis", "a"),
        ("return a.sum(b)", "reduction", "a.mean(b)"),
        ("return a.detach()", "graph", "a"),
        ("return a.dot(a, b)", "argument", "a.dot(b, a)"),
    ],
)
def test_every_operator_makes_its_mutant(
    statement: str, operator: str, after: str, tmp_path: Path
) -> None:
    source = source_of(f"def f(a, b):\n    {statement}\n", tmp_path)
    assert (operator, after) in [(m.operator, m.after) for m in source.mutants]


@pytest.mark.parametrize(
    "text",
    [
        'def f(a):\n    """a + 1."""\n    return a\n',
        "def f(a: int = 1 + 1) -> tuple[int, 2]:\n    return a\n",
        'def f(a):\n    x: dict[str, 1] = a\n    raise ValueError(f"{a + 1}")\n',
        "def f(a):\n    assert a < 1\n    return a\n",
        "@g(1)\ndef f(a):\n    return zip(a, a, strict=a)\n",
        "def f(a):\n    return max(a, f) == 'x' + a\n",
        "X = 1 + 1\nclass C:\n    y = 2\n",
    ],
)
def test_what_computes_nothing_is_left_alone(text: str, tmp_path: Path) -> None:
    kept = {"deletion", "comparison"}  # of the raise and of `==` above
    assert {m.operator for m in source_of(text, tmp_path).mutants} <= kept


@given(a=st.integers(-99, 99), b=st.integers(-99, 99))
def test_a_mutant_computes_what_it_says(
    a: int, b: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = source_of("def f(a, b):\n    return a * 3 - b\n", tmp_path_factory.mktemp("m"))
    values = {}
    for mutant in source.mutants:
        space: dict[str, int] = {"a": a, "b": b}
        exec("def f(a, b): pass", space)
        space["f"].__code__ = source.code(mutant)  # pyright: ignore[reportAttributeAccessIssue]
        values[mutant.after] = eval("f(a, b)", space)
    assert values == {"a * 3 + b": a * 3 + b, "a / 3": a / 3 - b, "4": a * 4 - b}


def test_mutants_of_methods_keep_their_free_variables_and_the_tree() -> None:
    """Else a mutant could not be put in place, or would carry the one before."""
    (source,) = sources_of(["apo_core/preconditioners/ekfac.py"], ROOT)
    before = ast.dump(source.tree)
    assert {m.function for m in source.mutants} >= {"EKFAC.__init__", "EKFAC.forward"}
    for mutant in source.mutants:
        free = source.code(mutant).co_freevars
        assert free == (("__class__",) if mutant.function.endswith("__init__") else ())
    assert ast.dump(source.tree) == before


def test_mutants_have_distinct_names_and_change_something() -> None:
    mutants = [m for source in sources_of(["apo_core", "reference"], ROOT) for m in source.mutants]
    assert len({m.key for m in mutants}) == len(mutants) > 3000
    assert all(m.before != m.after for m in mutants)


def test_a_package_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="`packages` must be folders or files, got 'nowhere'"):
        sources_of(["nowhere"], ROOT)


def test_the_recorder_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "records.jsonl"
    first, second = (Result.of(MUTANT._replace(place=i), "killed", "t", 1, 0.5) for i in range(2))
    Recorder(path).add(first)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"key": "a.py:f:1')  # the process was killed here
    recorder = Recorder(path)
    assert recorder.results == {first.key: first}
    recorder.add(second)
    assert Recorder(path).results == {first.key: first, second.key: second}


def test_a_limit_on_the_time_cuts_repetition_first() -> None:
    """Two cheap cases come before a dear test, the third case of a test after another's first."""
    durations = {"a[1]": 1.0, "a[2]": 1.0, "a[3]": 1.1, "b": 2.5, "c": 4.0}
    tests = [Traced(f"t.py::{name}", seconds, frozenset()) for name, seconds in durations.items()]
    order = [test.nodeid.removeprefix("t.py::") for test in by_turns(tests)]
    assert order == ["a[1]", "a[2]", "b", "a[3]", "c"]


def test_a_test_that_has_killed_comes_before_one_as_dear() -> None:
    """And a dear one that has killed before a cheap one that has not, by their seconds a kill."""
    durations = {"dear": 3.0, "idle": 1.0, "cheap": 0.1}
    tests: Any = [(SimpleNamespace(nodeid=name), cost) for name, cost in durations.items()]
    order = [item.nodeid for item, _ in likeliest_first(tests, Counter(dear=1))]
    assert order == ["cheap", "dear", "idle"]


def test_only_survivors_get_a_longer_trial(tmp_path: Path) -> None:
    """Of whatever a longer one allows; when tests are new, of the same length as well."""
    recorder = Recorder(tmp_path / "records.jsonl")
    for place, status in enumerate(("killed", "survived")):
        recorder.add(Result.of(MUTANT._replace(place=place), status, None, 3, 1.0, limit=5.0))
    killed, survived = recorder.results.values()
    assert [killed.settled(limit) for limit in (5.0, 120.0)] == [True, True]
    assert [survived.settled(limit) for limit in (5.0, 120.0)] == [True, False]
    recorder.forget_survivors()
    assert list(recorder.results) == [killed.key]


def test_a_test_is_traced_by_the_statements_that_it_runs(tmp_path: Path) -> None:
    """A statement over several lines is one; of a branch, the condition and what it chose."""
    source = source_of(
        "def f(a):\n    if (\n        a > 0\n    ):\n        return [\n            -a,\n"
        "            +a,\n        ]\n    return a\n",
        tmp_path,
    )
    space: dict[str, Any] = {}
    exec(compile(source.tree, source.path, "exec"), space)
    tracer, before = Tracer([source]), sys.gettrace()
    sys.settrace(tracer)
    try:
        space["f"](1)
    finally:
        sys.settrace(before)
    # Line 1 is the call itself; the mutants `a >= 0`, `a <= 0` stand in 2, `a` in 5.
    assert tracer.seen == {(source.path, line) for line in (1, 2, 5)}
    assert {source.statements[mutant.line] for mutant in source.mutants} <= {2, 5}


def test_an_unknown_status_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`status` must be one of \['killed', .*, got 'dead'"):
        Result.of(MUTANT, "dead", None, 0, 0.0)


@given(ran=st.integers(1, 60), data=st.data())
def test_the_interval_is_the_binomials(ran: int, data: st.DataObject) -> None:
    """At either end, the tail beyond what was seen has 2.5% (or the end is 0 or 1)."""
    killed = data.draw(st.integers(0, ran), label="killed")
    results = [
        Result.of(MUTANT, "killed" if i < killed else "survived", None, 1, 0.0) for i in range(ran)
    ]
    _, _, low, high = score(results)

    def tail(p: float, counts: range) -> float:
        return sum(math.comb(ran, k) * p**k * (1 - p) ** (ran - k) for k in counts)

    # scipy finds each end by bisection, to 1e-12 or better; the tail's slope is at most `ran`.
    room = 1e-9 * ran
    assert low == 0.0 if killed == 0 else abs(tail(low, range(killed, ran + 1)) - 0.025) < room
    assert high == 1.0 if killed == ran else abs(tail(high, range(killed + 1)) - 0.025) < room


def test_the_report_joins_survivors_and_reasons(tmp_path: Path) -> None:
    path = tmp_path / "survivors.toml"
    path.write_text(
        '[[survivor]]\nfile = "a.py"\nsource = "return -x"\nbefore = "-x"\nafter = "x"\n'
        'verdict = "equivalent"\nreason = "x is 0"\n',
        encoding="utf-8",
    )
    other = MUTANT._replace(place=1, after="y | z")
    results = [
        Result.of(MUTANT, "survived", None, 3, 1.0),
        Result.of(other, "no test", None, 0, 0.0),
        Result.of(MUTANT._replace(place=2), "timeout", None, 3, 1.0),
    ]
    run = {"seed": 0, "tests": 3, "first": 9.0, "limit": 60.0, "minutes": 1.0, "where": "here"}
    lines = {"a.py": ["def f(x):", "    return -x"]}
    report = document(results, Counter({"a.py": 9}), read_reasons(path), lines, run)
    assert report["verdicts"] == {"equivalent": 1, "open": 1}
    assert (report["all"]["killed"], report["all"]["ran"]) == (1, 3)
    text = markdown(report)
    assert "| a.py:2 | `return -x` | `-x` → `x` | equivalent | x is 0 |" in text
    assert "`y \\| z` | open |" in text
    assert "9 mutants, of which a random sample of 3 (33%)" in text


@pytest.mark.parametrize(("verdict", "reason"), [("fine", "because"), ("gap", "")])
def test_a_reason_must_be_one(verdict: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "survivors.toml"
    path.write_text(
        '[[survivor]]\nfile = "a"\nsource = "s"\nbefore = "b"\nafter = "c"\n'
        f'verdict = "{verdict}"\nreason = "{reason}"\n',
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match="`survivor` must have a reason and one of the verdicts"):
        read_reasons(path)


def test_every_survivor_of_the_committed_report_is_explained() -> None:
    """And its two files are one report, with the reasons that the committed list gives."""
    stem = ROOT / REPORTS / "mutation"
    report = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    reasons = read_reasons(ROOT / REPORTS / "survivors.toml")
    for row in report["survivors"]:
        key = (row["file"], row["source"], row["before"], row["after"])
        assert (row["verdict"], row["reason"]) == reasons[key]
    assert stem.with_suffix(".md").read_text(encoding="utf-8") == markdown(report)


def run_tool(folder: Path, module: str, *arguments: str) -> str:
    """What a command of the suite prints, run in `folder`."""
    done = subprocess.run(
        [sys.executable, *module.split(), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_blind_suite_leaves_survivors_and_the_run_goes_on(tmp_path: Path) -> None:
    """Of a toy: one value is checked, one was when the test was imported, one is only computed."""
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\npythonpath = ['.']\n")
    (tmp_path / "toy.py").write_text(
        "def seen(a):\n    return -a\n\ndef unseen(b):\n    return -b\n\n"
        "def untested(a):\n    return -a\n\ndef early(a):\n    return -a\n"
    )
    (tmp_path / "test_toy.py").write_text(
        "import toy\nEARLY = toy.early(3)\n\n"
        "def test_early():\n    toy.early(3)\n    assert EARLY == -3\n\n"
        "def test_seen():\n    assert toy.seen(3) == -3\n\n"
        "def test_unseen():\n    toy.unseen(3)\n\n"
        "def test_broken():\n    assert toy.seen(0) == 7\n"
    )
    (tmp_path / "why.toml").write_text(
        '[[survivor]]\nfile = "toy.py"\nsource = "return -b"\nbefore = "-b"\nafter = "b"\n'
        'verdict = "equivalent"\nreason = "for this test"\n'
    )
    arguments = ("--packages", "toy.py", "--tests", "test_toy.py", "--report", "report")
    reasons = ("--reasons", "why.toml")
    first = run_tool(tmp_path, "-m verification.mutation", *arguments, *reasons)
    assert "left out, it fails without a mutant: test_toy.py::test_broken" in first
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    alive = {(s["function"], s["status"], s["after"]) for s in report["survivors"]}
    assert alive == {("unseen", "survived", "b"), ("untested", "no test", "a")}
    assert (report["all"]["killed"], report["all"]["ran"], report["mutants"]) == (2, 4, 4)

    records = tmp_path / "results" / "mutation.jsonl"
    limits = {r.function: r.limit for r in Recorder(records).results.values()}
    assert limits == {"seen": 10.0, "early": 10.0, "unseen": 10.0, "untested": 120.0}
    lines = records.read_text(encoding="utf-8").splitlines()
    records.write_text("\n".join(lines[:3]) + "\n", encoding="utf-8")  # killed in the middle
    second = run_tool(tmp_path, "-m verification.mutation", *arguments)
    assert "4 mutants, 4 chosen, 3 done" in second
    limits = {r.function: r.limit for r in Recorder(records).results.values()}
    assert limits == {"seen": 10.0, "early": 10.0, "unseen": 120.0, "untested": 120.0}


def test_a_process_that_dies_or_raises_takes_nobody_with_it(tmp_path: Path) -> None:
    """In a fresh process, since forking from this one is not safe where it has threads."""
    script = (
        "import os, signal\n"
        "from verification.mutation.forking import forked\n"
        "def work(task):\n"
        "    if task == 1: raise ValueError('no')\n"
        "    if task == 2: os.kill(os.getpid(), signal.SIGALRM)\n"
        "    return task * 10\n"
        "found = {t: o for t, o in forked(range(4), work, jobs=2)}\n"
        "assert [found[t].value for t in range(4)] == [0, None, None, 30]\n"
        "assert [found[t].signal for t in range(4)] == [None, None, signal.SIGALRM, None]\n"
        "assert 'ValueError: no' in found[1].trouble\n"
        "assert list(forked(range(4), work, until=0.0)) == []\n"
    )
    (tmp_path / "script.py").write_text(script)
    run_tool(tmp_path, "script.py")


@share(0.25)
@given(seed=st.integers(0, 2**16))
def test_a_mutant_of_the_core_compiles(seed: int) -> None:
    (source,) = sources_of(["reference/curvature.py"], ROOT)
    mutant = source.mutants[seed % len(source.mutants)]
    assert source.code(mutant).co_qualname == mutant.function
