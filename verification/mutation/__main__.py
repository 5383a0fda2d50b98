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
from collections.abc import Sequence, Set
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import FunctionType

import pytest

from verification.mutation.cold import cold_failure
from verification.mutation.forking import Outcome, forked
from verification.mutation.mutants import Mutant, Source
from verification.mutation.records import Recorder, Result
from verification.mutation.report import EXPLAINED, document, markdown, read_reasons, write
from verification.mutation.selection import Place, Selection, Tracer, live_functions, select
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

    The second trial, where `again` has tests, is in a fresh process.
    """
    code = source.code(mutant)
    for function in functions:
        function.__code__ = code
    return suite.first_failure(tests) or (cold_failure(mutant, again) if again else None)


def result_of(mutant: Mutant, tests: int, limit: float, outcome: Outcome) -> Result:
    """What a forked process's outcome says: an alarm is a timeout, another death a crash."""
    if outcome.signal is not None:
        status = "timeout" if outcome.signal == signal.SIGALRM else "crash"
        return Result.of(mutant, status, None, tests, outcome.seconds, limit)
    test = outcome.value
    status = "killed" if test else "survived" if tests else "no test"
    return Result.of(mutant, status, test, tests, outcome.seconds, limit)


def likeliest_first(
    tests: Sequence[tuple[pytest.Item, float]], killers: Counter[str]
) -> list[tuple[pytest.Item, float]]:
    """By seconds over how many mutants of the same file a test has killed; none counts as 0.1."""
    return sorted(tests, key=lambda test: test[1] / (killers[test[0].nodeid] + 0.1))


def run(
    options: argparse.Namespace, suite: Suite, items: list[pytest.Item], imported: Set[Place]
) -> None:
    """Judge the mutants that are not settled, in random order, and write the report.

    A first pass gives each `options.first` seconds of tests, a second one more to the survivors of
    which no reason says that no test of this run can tell them apart. (A reason is not enough where
    several mutants of a file change the same text alike.)

    Args:
        options: of the command line.
        suite: has collected the tests.
        items: the tests.
        imported: statements that ran when the tests were imported.
    """
    start = time.monotonic()
    until = start + 60 * options.budget
    root = Path.cwd()
    sources = sources_of(options.packages, root)
    by_file = {source.file: source for source in sources}
    everything = [mutant for source in sources for mutant in source.mutants]
    shuffled = random.Random(options.seed).sample(everything, len(everything))
    chosen = shuffled[: options.sample or None]
    recorder = Recorder(options.records)
    if options.again:
        recorder.forget_survivors()
    done = sum(mutant.key in recorder.results for mutant in chosen)
    print(f"{len(everything)} mutants, {len(chosen)} chosen, {done} done", flush=True)

    functions = live_functions(sources)
    selection = select(suite, items, sources, options.jobs, options.selection)
    print(f"{selection.tests} tests traced, {time.monotonic() - start:.0f} s", flush=True)
    reasons = read_reasons(options.reasons)
    times = Counter(by_file[mutant.file].change(mutant) for mutant in everything)
    killers: dict[str, Counter[str]] = {source.file: Counter() for source in sources}
    for result in recorder.results.values():
        if result.test and result.file in killers:
            killers[result.file][result.test] += 1

    def tests_of(mutant: Mutant, limit: float) -> list[tuple[pytest.Item, float]]:
        return selection.of([by_file[mutant.file].statement(mutant)], limit)

    def tests_again(mutant: Mutant, limit: float) -> list[tuple[pytest.Item, float]]:
        """Of all that runs in its function: what ran at import, other tests may look at."""
        source = by_file[mutant.file]
        if source.statement(mutant) not in imported:
            return []
        return selection.of(source.body(mutant), limit / 4)

    def explained(mutant: Mutant) -> bool:
        change = by_file[mutant.file].change(mutant)
        return times[change] == 1 and change in reasons and reasons[change][0] in EXPLAINED

    def trial(limit: float) -> None:
        def work(mutant: Mutant) -> str | None:
            source = by_file[mutant.file]
            mine = functions.get((source.path, mutant.first), [])
            tests = likeliest_first(tests_of(mutant, limit), killers[mutant.file])
            return judge(suite, mutant, source, mine, tests, tests_again(mutant, limit))

        known = recorder.results
        todo = [
            m
            for m in chosen
            if m.key not in known or not (known[m.key].settled(limit) or explained(m))
        ]
        todo.sort(key=lambda mutant: mutant.key not in known)  # the survivors of less first
        for mutant, outcome in forked(todo, work, options.jobs, until):
            if outcome.signal is None and outcome.trouble:
                print(f"not judged: {mutant.key}\n{outcome.trouble}", flush=True)
                continue
            result = result_of(mutant, len(tests_of(mutant, limit)), limit, outcome)
            recorder.add(result)
            if result.test:
                killers[mutant.file][result.test] += 1
            mark = "SURVIVED" if result.alive else result.status
            change = f"{result.before} -> {result.after}".replace("\n", " ")
            print(f"{mark:8}  {result.file}:{result.line}  {change}  [{result.test}]", flush=True)

    for limit in (options.first, options.limit):
        trial(limit)
    _report(options, sources, recorder, selection)


def _report(
    options: argparse.Namespace,
    sources: Sequence[Source],
    recorder: Recorder,
    selection: Selection,
) -> None:
    mutants = [mutant for source in sources for mutant in source.mutants]
    known = recorder.results  # whose lines may be those of an earlier version of the file
    results = [replace(known[m.key], line=m.line) for m in mutants if m.key in known]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "hypothesis"))
    report = document(
        results,
        Counter(mutant.file for mutant in mutants),
        read_reasons(options.reasons),
        {source.file: source.lines for source in sources},
        {
            "seed": options.seed,
            "tests": selection.tests,
            "first": options.first,
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
    add("--sample", type=int, default=0, help="mutants, the first in random order; 0 is all")
    add("--seed", type=int, default=0, help="of the order")
    add("--jobs", type=int, default=1, help="processes at a time")
    add("--first", type=float, default=10.0, help="seconds of tests for one mutant at first")
    add("--limit", type=float, default=120.0, help="seconds of tests for one that survives them")
    add("--again", action="store_true", help="try the survivors of the records again")
    add("--records", type=Path, default=Path("results/mutation.jsonl"), help="goes on from here")
    add("--selection", type=Path, default=Path("results/selection.json"), help="kept, traced tests")
    add("--reasons", type=Path, default=REPORTS / "survivors.toml", help="why survivors survive")
    add("--report", type=Path, default=REPORTS / "mutation", help="without a suffix")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Collect the suite and run the mutants."""
    options = parsed(arguments)
    importing = Tracer(sources_of(options.packages, Path.cwd()))

    def work(suite: Suite, items: list[pytest.Item]) -> None:
        sys.settrace(None)
        run(options, suite, items, importing.seen)

    sys.settrace(importing)
    Suite.collect(options.tests, work)


if __name__ == "__main__":
    main(sys.argv[1:])
