"""One JSON line a mutant, written at once, so that an interrupted run goes on; and the score."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from scipy.stats import binomtest

from verification.mutation.mutants import Mutant

STATUSES = ("killed", "timeout", "crash", "survived", "no test")


@final
@dataclass(frozen=True)
class Result:
    """What the tests said to one mutant.

    Attributes:
        key: the mutant's.
        file: of the mutant.
        function: qualified name.
        line: of the change.
        operator: kind of the change.
        before: what stood there.
        after: what stood there instead.
        status: one of `STATUSES`. A timeout (a test hangs) and a crash count as killed.
        test: the test that failed, or None.
        tests: how many ran, or would have.
        seconds: wall time.
        limit: seconds of tests that it was allowed.
    """

    key: str
    file: str
    function: str
    line: int
    operator: str
    before: str
    after: str
    status: str
    test: str | None
    tests: int
    seconds: float
    limit: float

    @classmethod
    def of(
        cls,
        mutant: Mutant,
        status: str,
        test: str | None,
        tests: int,
        seconds: float,
        limit: float = 0.0,
    ) -> Result:
        """The result of `mutant`.

        Raises:
            ValueError: an unknown status.
        """
        if status not in STATUSES:
            raise ValueError(f"`status` must be one of {list(STATUSES)}, got {status!r}.")
        m = mutant
        change = (m.key, m.file, m.function, m.line, m.operator, m.before, m.after)
        return cls(*change, status, test, tests, round(seconds, 2), limit)

    @property
    def alive(self) -> bool:
        """Whether no test noticed."""
        return self.status in ("survived", "no test")

    def settled(self, limit: float) -> bool:
        """Whether a trial of `limit` seconds would say nothing new."""
        return not self.alive or self.limit >= limit


@final
class Recorder:
    """The results so far, in a file of JSON lines.

    Args:
        path: made where it does not exist; a torn last line is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Result] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for line in text.splitlines():
            try:
                result = Result(**json.loads(line))
            except (json.JSONDecodeError, TypeError):
                continue
            self.results[result.key] = result
        if text and not text.endswith("\n"):
            self._append("\n")

    def forget_survivors(self) -> None:
        """So that they are tried again, as after new tests."""
        self.results = {key: result for key, result in self.results.items() if not result.alive}

    def add(self, result: Result) -> None:
        """Keep `result`, in memory and on disk."""
        self.results[result.key] = result
        self._append(json.dumps(asdict(result), ensure_ascii=False) + "\n")

    def _append(self, line: str) -> None:
        """In one write, so that processes may share the file."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def score(results: Iterable[Result]) -> tuple[int, int, float, float]:
    """Killed, all, and the exact 95% interval (Clopper-Pearson) of the share of killed mutants."""
    alive = [result.alive for result in results]
    if not alive:
        return 0, 0, 0.0, 1.0
    killed = alive.count(False)
    interval = binomtest(killed, len(alive)).proportion_ci(0.95, "exact")
    return killed, len(alive), float(interval.low), float(interval.high)
