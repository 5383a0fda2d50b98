"""Which tests enter which function, and how long each takes: one traced run of the suite."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import NamedTuple, final

import pytest

from verification.mutation.forking import forked
from verification.mutation.mutants import Source
from verification.mutation.suite import Suite

# Seconds that a test may be expected to take before its own time is known.
PATIENCE = 60.0

Place = tuple[str, int]  # a function: its file, absolute, and its first line


class Traced(NamedTuple):
    """One test: its time under the tracer, and the functions that it entered."""

    nodeid: str
    seconds: float
    entered: frozenset[Place]


@final
class Selection:
    """The tests of every function. Tests that fail without a mutant are left out.

    A limit on the time shall cut repetition: the k-th case of a parametrized test comes where a
    test of k times its duration would, and else the fastest first.
    """

    def __init__(self, traced: Iterable[Traced], items: Sequence[pytest.Item]) -> None:
        by_id = {item.nodeid: item for item in items}
        entering: dict[Place, list[Traced]] = {}
        self.tests = 0
        for test in sorted(traced, key=lambda test: test.seconds):
            self.tests += 1
            for place in test.entered:
                entering.setdefault(place, []).append(test)
        self._of = {
            place: [(by_id[test.nodeid], test.seconds) for test in by_turns(tests)]
            for place, tests in entering.items()
        }

    def of(self, place: Place, limit: float) -> list[tuple[pytest.Item, float]]:
        """The first tests that enter the function, of at most `limit` seconds together."""
        chosen, total = [], 0.0
        for item, seconds in self._of.get(place, []):
            total += seconds
            if total > limit and chosen:
                break
            chosen.append((item, seconds))
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
        cache: a file that keeps what was traced, as long as the sources and tests stay.
    """
    digest = _digest([source.path for source in sources], items)
    if cache.exists():
        kept = json.loads(cache.read_text(encoding="utf-8"))
        if kept["digest"] == digest:
            return Selection([_read(row) for row in kept["traced"]], items)
    files = [list(group) for _, group in groupby(items, key=lambda item: item.path)]
    found: list[Traced] = []
    for group, outcome in forked(files, lambda group: _trace(suite, group, sources), jobs):
        if outcome.value is None:
            print(f"left out, {outcome.trouble}: {group[0].path}", flush=True)
            continue
        traced, failing = outcome.value
        found += traced
        for nodeid in failing:
            print(f"left out, it fails without a mutant: {nodeid}", flush=True)
    cache.parent.mkdir(parents=True, exist_ok=True)
    rows = [[test.nodeid, test.seconds, sorted(test.entered)] for test in found]
    cache.write_text(json.dumps({"digest": digest, "traced": rows}), encoding="utf-8")
    return Selection(found, items)


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
    firsts = {source.path: sorted(line for _, line in source.functions) for source in sources}
    traced, failing = [], []
    seen: set[CodeType] = set()

    def enter(frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_filename in firsts:
            seen.add(frame.f_code)

    for item in items:
        seen.clear()
        start = time.perf_counter()
        sys.settrace(enter)
        try:
            passed = suite.passes(item, PATIENCE)
        finally:
            sys.settrace(None)
        seconds = time.perf_counter() - start
        if not passed:
            failing.append(item.nodeid)
            continue
        traced.append(Traced(item.nodeid, seconds, frozenset(_places(seen, firsts))))
    return traced, failing


def _places(codes: Iterable[CodeType], firsts: dict[str, list[int]]) -> Iterable[Place]:
    """The outermost function of each code object: the last one that starts before it."""
    for code in codes:
        lines = firsts[code.co_filename]
        place = bisect_right(lines, code.co_firstlineno) - 1
        if place >= 0:
            yield code.co_filename, lines[place]


def _digest(paths: Iterable[str], items: Sequence[pytest.Item]) -> str:
    """Of the sources, the files of the tests, and the tests' names."""
    found = hashlib.sha256()
    for path in sorted({*paths, *(str(item.path) for item in items)}):
        found.update(Path(path).read_bytes())
    found.update("\n".join(sorted(item.nodeid for item in items)).encode())
    return found.hexdigest()


def _read(row: list) -> Traced:
    nodeid, seconds, entered = row
    return Traced(nodeid, seconds, frozenset((path, first) for path, first in entered))
