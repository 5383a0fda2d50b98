"""Collects the suite once, and hands its tests to a function in place of running them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import final

import pytest
from hypothesis import Phase, settings

# Of a test's own time, traced: then it hangs. The seconds are for a machine that is busy.
PATIENCE, GRACE = 10.0, 20.0

# Tests that say nothing about a mutant in this process: they start others, or a compiler.
LEFT_OUT = (
    "verification/engine/test_distributed.py",
    "verification/engine/test_compile.py",
    "verification/examples",
    "verification/experiments",
    "verification/conformance",
    "verification/meta_tests",
    "verification/mutation",
    "verification/detection",
)

Work = Callable[["Suite", list[pytest.Item]], None]


@final
class Suite:
    """The collected tests; a pytest plugin whose run is `work(self, items)`."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._failed = False

    @classmethod
    def collect(cls, tests: Sequence[str], work: Work) -> None:
        """Collect `tests` (files and folders) in the quick profile, and call `work`.

        Raises:
            RuntimeError: pytest could not collect them.
        """
        os.environ["APO_PROFILE"] = "quick"
        arguments = [*tests, *(f"--ignore={path}" for path in LEFT_OUT)]
        options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:faulthandler"]
        options += ["-W", "ignore:Module already imported"]  # Hypothesis, by this module
        status = pytest.main([*arguments, *options, "--no-header"], plugins=[cls(work)])
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            raise RuntimeError(f"`tests` must be collectable, got pytest's exit status {status}.")

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Without shrinking, which only makes a failure readable; without the ledger's table."""
        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutation", settings(), phases=phases, report_multiple_bugs=False)
        settings.load_profile("mutation")
        session.config.pluginmanager.unregister(name="apo-ledger-controller")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In place of a run of all tests."""
        if session.testsfailed:
            raise session.Interrupted(f"{session.testsfailed} errors during collection")
        self._work(self, session.items)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes that a phase of a test failed."""
        self._failed = self._failed or report.failed

    def passes(self, item: pytest.Item, seconds: float) -> bool:
        """Run one test, with its fixtures; one that hangs ends the process, by SIGALRM.

        Args:
            item: the test.
            seconds: its own time.
        """
        self._failed = False
        signal.setitimer(signal.ITIMER_REAL, GRACE + PATIENCE * seconds)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        return not self._failed

    def first_failure(self, tests: Sequence[tuple[pytest.Item, float]]) -> str | None:
        """The first test that fails, or None.

        Args:
            tests: each with its own time in seconds.
        """
        for item, seconds in tests:
            if not self.passes(item, seconds):
                return item.nodeid
        return None
