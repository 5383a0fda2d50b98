"""The command line: what it runs, what it says, its exit codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.__main__ import EMBEDDED_SUITE, INTERRUPTED, main
from experiments.records import read_records, write_record
from experiments.registry import Experiment, experiments
from experiments.runner import Tally, record_folder
from verification.experiments.fakes import Descent, record_of

FIRST = "rate-0.1-seed-0"


def catalogue(*fakes: Experiment) -> dict[str, Experiment]:
    """The fakes by name."""
    return {one.name: one for one in fakes}


def run(out: Path, *words: str, known: dict[str, Experiment]) -> int:
    """The exit code of `run` with those words into that folder, one trial at a time."""
    return main(["run", *words, "--jobs", "1", "--out", str(out)], known)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["run", "decent"],
            "`NAME` must be an experiment, one of descent, got 'decent'; did you mean descent?",
        ),
        (["run", "xyz"], "one of descent, got 'xyz'; `list` describes them."),
        (["run", "--preset", "huge"], "argument --preset: invalid choice: 'huge' (choose from"),
        (["run", "--seeds", "0"], "`--seeds` must be a whole number of at least 1, got '0'; leave"),
        (["run", "--seeds", "many"], "got 'many'; leave it out for the preset's own number."),
        (["run", "--jobs", "0"], "`--jobs` must be a whole number of at least 1, got '0'; leave"),
        (["run", "--device", "abacus"], "`--device` must be a device of this machine, one of cpu"),
        (["run", "--device", "cuda:99"], "got 'cuda:99'; leave it out to run on the CPU."),
        ([], "the following arguments are required: list | run | report"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_choices(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words, catalogue(Descent()))
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_list_shows_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"], catalogue(Descent(), Descent("other", datasets=("digits",)))) == 0
    shown = capsys.readouterr().out
    for text in ("descent", "other", "no paper | none", "p22-eq3", "digits", "synthetic"):
        assert text in shown


def test_list_tells_the_time_of_committed_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.__main__.COMMITTED", tmp_path)
    for seed, seconds in enumerate((100.0, 80.0)):
        record = replace(record_of(f"t{seed}", loss=1.0), seconds=seconds)
        write_record(record_folder(tmp_path, "default", "descent") / f"t{seed}.json", record)
    assert main(["list"], catalogue(Descent(), Descent("other"))) == 0
    rows = {
        line.split()[1]: line for line in capsys.readouterr().out.splitlines() if "no paper" in line
    }
    assert "3 min" in rows["descent"]
    assert "min" not in rows["other"]


@pytest.mark.parametrize(
    ("words", "jobs"), [([], 7), (["--jobs", "3"], 3), (["--device", "meta"], 1)]
)
def test_as_many_jobs_as_cores_unless_told_or_on_another_device(
    words: list[str], jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def record_jobs(*arguments: object, **options: int) -> Tally:
        asked.append(options["jobs"])
        return Tally()

    monkeypatch.setattr("experiments.__main__.cores", lambda: 7)
    monkeypatch.setattr("experiments.__main__.run_experiment", record_jobs)
    main(["run", "descent", *words, "--out", str(tmp_path)], catalogue(Descent()))
    assert asked == [jobs]


def test_run_records_reports_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "descent", "--preset", "smoke", known=catalogue(Descent())) == 0
    assert len(read_records(record_folder(tmp_path, "smoke", "descent"))) == 5
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {"report.html", "report.md", "figures/smoke-descent.png"} <= written
    shown = capsys.readouterr().out
    assert "The best loss is 0.00e+00." in shown
    assert "descent, rate 0.1" in shown
    assert str(tmp_path / "report.html") in shown


def test_seeds_reach_the_plan(tmp_path: Path) -> None:
    run(tmp_path, "descent", "--seeds", "1", known=catalogue(Descent()))
    assert len(read_records(record_folder(tmp_path, "default", "descent"))) == 3


def test_an_experiment_named_twice_runs_once(tmp_path: Path) -> None:
    experiment = Descent()
    run(tmp_path, "descent", "descent", known=catalogue(experiment))
    assert len(experiment.ran) == 5


def test_without_names_the_embedded_suite_runs(tmp_path: Path) -> None:
    fakes = [Descent(name) for name in EMBEDDED_SUITE]
    assert run(tmp_path, known=catalogue(*fakes, Descent("extra"))) == 0
    assert sorted(path.name for path in (tmp_path / "default").iterdir()) == sorted(EMBEDDED_SUITE)


# linear_operator, which curvlinops imports, calls torch.jit.script at import: not ours to change.
@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")
def test_the_embedded_suite_exists_and_needs_no_download() -> None:
    known = experiments()
    assert all(known[name].embedded for name in EMBEDDED_SUITE)


def test_a_failed_trial_fails_the_command_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = catalogue(Descent("first", faults={FIRST: ValueError("no luck")}), Descent("second"))
    assert run(tmp_path, "first", "second", known=known) == 1
    assert len(read_records(record_folder(tmp_path, "default", "first"))) == 5
    assert len(read_records(record_folder(tmp_path, "default", "second"))) == 5
    assert f"error: trial {FIRST} of first failed" in capsys.readouterr().err
    # It is tried again, and the command succeeds once it does.
    assert run(tmp_path, "first", known=catalogue(Descent("first"), Descent("second"))) == 0


def test_a_diverged_trial_is_a_result_and_no_failure(tmp_path: Path) -> None:
    assert run(tmp_path, "descent", known=catalogue(Descent())) == 0
    records = read_records(record_folder(tmp_path, "default", "descent"))
    assert records["rate-10.0-seed-0"].status == "diverged"


def test_missing_data_fails_the_command_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("APO_DATA_DIR", str(tmp_path / "nowhere"))
    known = catalogue(Descent("first", datasets=("mnist",)), Descent("second"))
    assert run(tmp_path / "out", "first", "second", known=known) == 1
    assert "error: first did not run: `APO_DATA_DIR` must name a folder" in capsys.readouterr().err
    assert len(read_records(record_folder(tmp_path / "out", "default", "second"))) == 5


def test_missing_data_alone_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("APO_DATA_DIR", str(tmp_path / "nowhere"))
    assert run(tmp_path / "out", "descent", known=catalogue(Descent(datasets=("mnist",)))) == 1
    assert capsys.readouterr().err.count("error: ") == 1


def test_an_interruption_says_how_to_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = catalogue(Descent(faults={"rate-1.0-seed-0": KeyboardInterrupt()}))
    assert run(tmp_path, "descent", known=known) == INTERRUPTED
    said = capsys.readouterr().err
    assert f"The finished trials are recorded in {tmp_path}" in said
    assert "the same command resumes" in said
    again = Descent()
    assert run(tmp_path, "descent", known=catalogue(again)) == 0
    assert FIRST not in again.ran


def test_report_needs_the_records_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "descent", known=catalogue(Descent()))
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    fresh = Descent()
    assert main(["report", str(tmp_path)], catalogue(fresh)) == 0
    assert fresh.ran == []
    assert (tmp_path / "report.html").read_text() == page
    assert "The best loss is" in capsys.readouterr().out


def test_report_without_records_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)], catalogue(Descent())) == 1
    said = capsys.readouterr().err
    assert "`DIR` must hold records" in said
    assert "run an experiment first, or name another folder" in said


def test_a_damaged_record_is_refused_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = record_folder(tmp_path, "default", "descent")
    folder.mkdir(parents=True)
    (folder / f"{FIRST}.json").write_text("{")
    assert run(tmp_path, "descent", known=catalogue(Descent())) == 1
    assert "delete the file, and the next run makes it anew" in capsys.readouterr().err
