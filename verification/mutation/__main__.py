"""Run mutants of the numerical core: `python -m verification.mutation --budget 20`."""

from __future__ import annotations

import argparse
import math
import platform
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import FunctionType

import pytest

from verification.mutation.cold import cold_failure
from verification.mutation.forking import Outcome, forked
from verification.mutation.mutants import Mutant, Source
from verification.mutation.records import Recorder, Result
from verification.mutation.report import document, markdown, read_reasons, write
from verification.mutation.selection import Place, Selection, live_functions, select
from verification.mutation.suite import Suite

# Of the engine, the numerical core: the conformance kit is a test itself, and what runs on several
# processes is tested by tests that start processes.
NOT_CORE = ("apo_core/testing", "apo_core/distributed.py", "apo_core/compatibility.py")
REPORTS = Path("verification/reports")


def sources_of(packages: Sequence[str], root: Path) -> list[Source]:
    """The modules of the packages (folders or files under `root`), `NOT_CORE` left out."""
    paths: list[Path] = []
    for package in packages:
        path = root / package
        if not path.exists():
            raise ValueError(f"`packages` must be folders or files, got {package!r}.")
        paths += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    names = ((path, path.relative_to(root).as_posix()) for path in paths)
    return [
        Source(path, root)
        for path, name in names
        if not any(name == out or name.startswith(f"{out}/") for out in NOT_CORE)
    ]


def judge(
    suite: Suite,
    mutant: Mutant,
    source: Source,
    functions: Sequence[FunctionType],
    tests: Sequence[tuple[pytest.Item, float]],
    again: Sequence[tuple[pytest.Item, float]],
) -> str | None:
    """The first test that fails: of `tests` with the mutant put in place here, else of `again`.

    The second trial is in a fresh process.
    """
    code = source.code(mutant)
    for function in functions:
        function.__code__ = code
    return suite.first_failure(tests) or cold_failure(mutant, again)


def result_of(mutant: Mutant, tests: int, outcome: Outcome) -> Result:
    """What a forked process's outcome says: an alarm is a timeout, another death a crash."""
    if outcome.signal is not None:
        status = "timeout" if outcome.signal == signal.SIGALRM else "crash"
        return Result.of(mutant, status, None, tests, outcome.seconds)
    test = outcome.value
    return Result.of(mutant, "killed" if test else "survived", test, tests, outcome.seconds)


def run(options: argparse.Namespace, suite: Suite, items: list[pytest.Item]) -> None:
    """Judge the mutants that have no result yet, in random order, and write the report."""
    start = time.monotonic()
    until = start + 60 * options.budget
    root = Path.cwd()
    sources = sources_of(options.packages, root)
    by_file = {source.file: source for source in sources}
    everything = [mutant for source in sources for mutant in source.mutants]
    chosen = random.Random(options.seed).sample(
        everything, min(len(everything), options.sample or len(everything))
    )
    recorder = Recorder(options.records)
    todo = [mutant for mutant in chosen if mutant.key not in recorder.results]
    done = len(chosen) - len(todo)
    print(f"{len(everything)} mutants, {len(chosen)} chosen, {done} done", flush=True)

    functions = live_functions(sources)
    selection = select(suite, items, sources, options.jobs, options.selection)
    print(f"{selection.tests} tests traced, {time.monotonic() - start:.0f} s", flush=True)

    def place(mutant: Mutant) -> Place:
        return by_file[mutant.file].path, mutant.first

    def tests_of(mutant: Mutant) -> list[tuple[pytest.Item, float]]:
        return selection.of(place(mutant), options.limit)

    def work(mutant: Mutant) -> str | None:
        mine = functions.get(place(mutant), [])
        again = selection.of(place(mutant), options.limit / 4)
        return judge(suite, mutant, by_file[mutant.file], mine, tests_of(mutant), again)

    for mutant in todo:
        if not tests_of(mutant):
            recorder.add(Result.of(mutant, "no test", None, 0, 0.0))
    todo = [mutant for mutant in todo if mutant.key not in recorder.results]
    for mutant, outcome in forked(todo, work, options.jobs, until):
        if outcome.signal is None and outcome.trouble:
            print(f"not judged: {mutant.key}\n{outcome.trouble}", flush=True)
            continue
        result = result_of(mutant, len(tests_of(mutant)), outcome)
        recorder.add(result)
        mark = "SURVIVED" if result.alive else result.status
        change = f"{result.before} -> {result.after}".replace("\n", " ")
        print(f"{mark:8}  {result.file}:{result.line}  {change}  [{result.test}]", flush=True)
    _report(options, sources, recorder, selection)


def _report(
    options: argparse.Namespace,
    sources: Sequence[Source],
    recorder: Recorder,
    selection: Selection,
) -> None:
    mutants = [mutant for source in sources for mutant in source.mutants]
    keys = {mutant.key for mutant in mutants}
    results = [result for key, result in recorder.results.items() if key in keys]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "hypothesis"))
    report = document(
        results,
        Counter(mutant.file for mutant in mutants),
        read_reasons(options.reasons),
        {source.file: source.lines for source in sources},
        {
            "seed": options.seed,
            "tests": selection.tests,
            "limit": options.limit,
            "minutes": round(sum(result.seconds for result in results) / 60, 1),
            "where": f"Python {platform.python_version()}, {versions}",
        },
    )
    write(report, options.report)
    print("\n".join(markdown(report).splitlines()[4:10]), flush=True)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m verification.mutation", description=__doc__)
    add = parser.add_argument
    add("--packages", nargs="+", default=["apo_core", "reference"], help="folders to mutate")
    add("--tests", nargs="+", default=["verification"], help="files and folders of tests")
    add("--budget", type=float, default=math.inf, help="minutes, the traced run included")
    add("--sample", type=int, default=0, help="mutants to draw; 0 is all, in random order")
    add("--seed", type=int, default=0, help="of the order and of the sample")
    add("--jobs", type=int, default=1, help="processes at a time")
    add("--limit", type=float, default=120.0, help="seconds of tests for one mutant")
    add("--records", type=Path, default=Path("results/mutation.jsonl"), help="goes on from here")
    add("--selection", type=Path, default=Path("results/selection.json"), help="kept, traced tests")
    add("--reasons", type=Path, default=REPORTS / "survivors.toml", help="why survivors survive")
    add("--report", type=Path, default=REPORTS / "mutation", help="without a suffix")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Collect the suite and run the mutants."""
    options = parsed(arguments)
    Suite.collect(options.tests, lambda suite, items: run(options, suite, items))


if __name__ == "__main__":
    main(sys.argv[1:])
