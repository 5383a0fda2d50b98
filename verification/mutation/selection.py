"""Which tests run which statement, and how long each takes: one traced run of the suite."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from types import FrameType, FunctionType
from typing import NamedTuple, final

import pytest

from verification.mutation.forking import forked
from verification.mutation.mutants import Place, Source
from verification.mutation.suite import Suite

# Seconds that a test may be expected to take before its own time is known.
PATIENCE = 60.0


class Traced(NamedTuple):
    """One test: its processor time under the tracer, and the statements that it ran."""

    nodeid: str
    seconds: float
    ran: frozenset[Place]


@final
class Tracer:
    """For `sys.settrace`: keeps the statements of the sources that ran, in `seen`."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self._statements = {source.path: source.statements for source in sources}
        self.seen: set[Place] = set()

    def __call__(self, frame: FrameType, event: str, argument: object) -> Tracer | None:
        """Of a new frame or line; None leaves the frame alone."""
        path = frame.f_code.co_filename
        if path not in self._statements:
            return None
        line = frame.f_lineno
        self.seen.add((path, self._statements[path].get(line, line)))
        return self


@final
class Selection:
    """The tests of every statement. Tests that fail without a mutant are left out.

    A limit on the time shall cut repetition: the k-th case of a parametrized test comes where a
    test of k times its duration would, and else the fastest first.
    """

    def __init__(self, traced: Iterable[Traced], items: Sequence[pytest.Item]) -> None:
        self._items = {item.nodeid: item for item in items}
        self._running: dict[Place, list[Traced]] = {}
        self.tests = 0
        for test in traced:
            self.tests += 1
            for place in test.ran:
                self._running.setdefault(place, []).append(test)

    def of(self, places: Iterable[Place], limit: float) -> list[tuple[pytest.Item, float]]:
        """The first tests that run one of the statements, of at most `limit` seconds together."""
        found = {test.nodeid: test for place in places for test in self._running.get(place, [])}
        chosen, total = [], 0.0
        for test in by_turns(sorted(found.values(), key=lambda test: test.seconds)):
            total += test.seconds
            if total > limit and chosen:
                break
            chosen.append((self._items[test.nodeid], test.seconds))
        return chosen


def by_turns(tests: Sequence[Traced]) -> list[Traced]:
    """By duration times the place among the cases of the same test; `tests` are fastest first."""
    cases: Counter[str] = Counter()
    turns = []
    for test in tests:
        name = test.nodeid.split("[")[0]
        cases[name] += 1
        turns.append((cases[name] * test.seconds, test))
    return [test for _, test in sorted(turns, key=lambda turn: turn[0])]


def select(
    suite: Suite,
    items: Sequence[pytest.Item],
    sources: Sequence[Source],
    jobs: int,
    cache: Path,
) -> Selection:
    """Run every test once under a tracer, file by file in forked processes.

    Args:
        suite: has collected the tests.
        items: the tests.
        sources: whose functions count.
        jobs: processes at a time.
        cache: a file that keeps what was traced, of each file of tests as long as it and the
            sources stay.
    """
    kept = json.loads(cache.read_text(encoding="utf-8")) if cache.exists() else {}
    files = {path: list(group) for path, group in groupby(items, key=lambda item: str(item.path))}
    digests = {path: _digest([source.path for source in sources], files[path]) for path in files}
    rows = {path: kept[path]["rows"] for path in files if _known(kept, path, digests[path])}
    todo = [path for path in files if path not in rows]
    for path, outcome in forked(todo, lambda path: _trace(suite, files[path], sources), jobs):
        if outcome.value is None:
            print(f"left out, {outcome.trouble}: {path}", flush=True)
            continue
        traced, failing = outcome.value
        rows[path] = [[test.nodeid, test.seconds, sorted(test.ran)] for test in traced]
        for nodeid in failing:
            print(f"left out, it fails without a mutant: {nodeid}", flush=True)
    cache.parent.mkdir(parents=True, exist_ok=True)
    keep = {path: {"digest": digests[path], "rows": rows[path]} for path in rows}
    cache.write_text(json.dumps(keep), encoding="utf-8")
    return Selection([_read(row) for of_file in rows.values() for row in of_file], items)


def _known(kept: dict, path: str, digest: str) -> bool:
    return path in kept and kept[path]["digest"] == digest


def live_functions(sources: Sequence[Source]) -> dict[Place, list[FunctionType]]:
    """The functions of the sources that are in memory, decorated ones and properties included."""
    paths = {source.path: source for source in sources}
    functions: dict[Place, list[FunctionType]] = {}
    for thing in gc.get_objects():
        if type(thing) is FunctionType and thing.__code__.co_filename in paths:
            code = thing.__code__
            functions.setdefault((code.co_filename, code.co_firstlineno), []).append(thing)
    return functions


def _trace(
    suite: Suite, items: Sequence[pytest.Item], sources: Sequence[Source]
) -> tuple[list[Traced], list[str]]:
    tracer = Tracer(sources)
    traced, failing = [], []
    for item in items:
        tracer.seen.clear()
        start = time.process_time()  # whatever else this machine does
        sys.settrace(tracer)
        try:
            passed = suite.passes(item, PATIENCE)
        finally:
            sys.settrace(None)
        seconds = time.process_time() - start
        if not passed:
            failing.append(item.nodeid)
            continue
        traced.append(Traced(item.nodeid, seconds, frozenset(tracer.seen)))
    return traced, failing


def _digest(paths: Iterable[str], items: Sequence[pytest.Item]) -> str:
    """Of the sources, the file of the tests, and the tests' names."""
    found = hashlib.sha256()
    for path in sorted({*paths, *(str(item.path) for item in items)}):
        found.update(Path(path).read_bytes())
    found.update("\n".join(sorted(item.nodeid for item in items)).encode())
    return found.hexdigest()


def _read(row: list) -> Traced:
    nodeid, seconds, ran = row
    return Traced(nodeid, seconds, frozenset((path, first) for path, first in ran))
