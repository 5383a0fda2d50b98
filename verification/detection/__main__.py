"""Measure the detection limit of every core quantity: `python -m verification.detection`."""

from __future__ import annotations

import argparse
import platform
import sys
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import FunctionType

import pytest

from verification.detection.errors import (
    Change,
    Error,
    Quantity,
    find,
    put,
    scaled_by,
    through_float32,
    unchanged,
)
from verification.detection.quantities import QUANTITIES
from verification.detection.report import STEM, TARGET, Limit, share_reached, write
from verification.mutation.__main__ import sources_of
from verification.mutation.forking import forked
from verification.mutation.mutants import Source
from verification.mutation.selection import live_functions, select
from verification.mutation.suite import Suite

FINER, COARSER = (1e-10, 1e-12), (1e-6, 1e-4)
Tests = Sequence[tuple[pytest.Item, float]]


def noticing_test(suite: Suite, error: Error, change: Change, tests: Tests) -> str | None:
    """The first test that passes without the error and fails with it."""
    for item, seconds in tests:
        error.change = change
        if suite.passes(item, seconds):
            continue
        error.change = unchanged
        if suite.passes(item, seconds):
            return item.nodeid
    return None


def measure(
    suite: Suite,
    quantity: Quantity,
    sources: Sequence[Source],
    functions: Sequence[FunctionType],
    tests: Tests,
    few: Tests,
) -> Limit:
    """The limit of one quantity, in this process.

    Args:
        suite: runs the tests.
        quantity: what is changed.
        sources: where its function stands.
        functions: the function in memory.
        tests: for the target and coarser errors.
        few: for finer ones, of which nothing is promised.
    """
    error = put(quantity, sources, functions)
    limit, found = None, noticing_test(suite, error, scaled_by(TARGET), tests)
    if found:
        limit = TARGET
        for epsilon in FINER:
            first = [pair for pair in tests if pair[0].nodeid == found]
            finer = noticing_test(suite, error, scaled_by(epsilon), [*first, *few])
            if finer is None:
                break
            limit, found = epsilon, finer
    else:
        for epsilon in COARSER:
            found = noticing_test(suite, error, scaled_by(epsilon), tests)
            if found:
                limit = epsilon
                break
    cast = noticing_test(suite, error, through_float32, tests)
    name, target, _, of = quantity
    return Limit(name, target, of, limit, found, cast, len(tests))


def run(options: argparse.Namespace, suite: Suite, items: list[pytest.Item]) -> None:
    """Measure every quantity, and write the report."""
    sources = sources_of(["apo_core", "reference"], Path.cwd())
    functions = live_functions(sources)
    selection = select(suite, items, sources, options.jobs, options.selection)
    print(f"{selection.tests} tests traced", flush=True)

    def work(quantity: Quantity) -> Limit:
        source, name, first = find(quantity, sources)
        places = source.within(name, first)
        tests, few = (selection.of(places, options.limit / share) for share in (1, 4))
        return measure(suite, quantity, sources, functions[source.path, first], tests, few)

    chosen = [q for q in QUANTITIES if not options.only or options.only in q.name]
    limits: dict[str, Limit] = {}
    for quantity, outcome in forked(chosen, work, options.jobs):
        if outcome.value is None:
            print(f"not measured: {quantity.name}\n{outcome.trouble}", flush=True)
            name, target, _, of = quantity
            limits[name] = Limit(name, target, of, None, None, None, 0, "not measured")
            continue
        limit = limits[quantity.name] = outcome.value
        print(f"{limit.limit!s:>6}  {limit.name}  [{limit.test}] {limit.float32}", flush=True)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy"))
    about = {
        "tests": selection.tests,
        "limit": options.limit,
        "where": f"Python {platform.python_version()}, {versions}",
    }
    ordered = [limits[quantity.name] for quantity in chosen]
    write([explained(limit, options.reasons) for limit in ordered], about, options.report)
    print(f"{share_reached(ordered):.1%} of {len(ordered)} reach {TARGET:g}", flush=True)


def explained(limit: Limit, path: Path) -> Limit:
    """With the reason that `path` (TOML, reason by name) gives for a limit above the target."""
    if limit.reached or not path.exists():
        return limit
    reasons = tomllib.loads(path.read_text(encoding="utf-8"))
    return Limit(**(vars(limit) | {"reason": reasons.get(limit.name, limit.reason)}))


def main(arguments: Sequence[str]) -> None:
    """Collect the suite and measure."""
    parser = argparse.ArgumentParser(prog="python -m verification.detection", description=__doc__)
    add = parser.add_argument
    add("--tests", nargs="+", default=["verification"], help="files and folders of tests")
    add("--jobs", type=int, default=1, help="processes at a time")
    add("--limit", type=float, default=30.0, help="seconds of tests for one error")
    add("--only", default="", help="quantities whose name contains this")
    add("--selection", type=Path, default=Path("results/selection.json"), help="kept, traced tests")
    add("--reasons", type=Path, default=STEM.with_suffix(".toml"), help="why limits are coarse")
    add("--report", type=Path, default=STEM, help="without a suffix")
    options = parser.parse_args(arguments)
    Suite.collect(options.tests, lambda suite, items: run(options, suite, items))


if __name__ == "__main__":
    main(sys.argv[1:])
