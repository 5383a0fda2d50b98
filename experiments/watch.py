"""What a person sees while trials run: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from experiments.records import Record

BAR_EVERY = 0.1  # seconds between two updates of the bar
LINE_EVERY = 10.0  # seconds between two plain lines


class Watch(ABC):
    """Follows one experiment at a time; the runner calls it in the order of the methods below."""

    @abstractmethod
    def begin(self, experiment: str) -> None:
        """An experiment starts."""

    @abstractmethod
    def plan(self, more: int) -> None:
        """A round has `more` trials."""

    @abstractmethod
    def trial(self, name: str) -> None:
        """A trial starts to run, beside others perhaps."""

    @abstractmethod
    def progress(self, name: str, done: int, total: int, text: str) -> None:
        """That trial has done `done` of `total` steps; called at every step."""

    @abstractmethod
    def settled(self, record: Record, *, kept: bool) -> None:
        """A trial has its record, now or (`kept`) from before."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Something that the person should know."""

    @abstractmethod
    def end(self) -> None:
        """The experiment ended, or was interrupted."""


@final
class Pace:
    """How far an experiment is, and the time left if the rest takes as long as what ran now."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.settled = self.kept = self.total = 0
        self.parts: dict[str, float] = {}
        self._clock, self._started = clock, clock()

    def progress(self, name: str, done: int, total: int) -> None:
        """That trial is so far."""
        self.parts[name] = done / total if total else 0.0

    def settle(self, record: Record, *, kept: bool) -> None:
        """That trial has its record."""
        self.parts.pop(record.trial.name, None)
        self.settled += 1
        self.kept += kept

    @property
    def done(self) -> float:
        """Trials, with the parts of those that run."""
        return self.settled + sum(self.parts.values())

    def left(self) -> str:
        """ "35.0 s left", of all trials that are planned; empty before any has begun."""
        ran = self.done - self.kept
        elapsed = self._clock() - self._started
        return f"{span(elapsed / ran * (self.total - self.done))} left" if ran else ""


@final
class BarWatch(Watch):
    """One bar an experiment, over its trials, with the time left and the trials that run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._pace = Pace(time.monotonic)
        self._shown = 0.0

    def begin(self, experiment: str) -> None:
        """Start a bar."""
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[now]}", markup=False),
            console=self._console,
        )
        self._pace = Pace(time.monotonic)
        self._task = self._bar.add_task(experiment, total=None, left="", now="")
        self._bar.start()

    def plan(self, more: int) -> None:
        """Lengthen the bar."""
        self._pace.total += more
        self._update(total=self._pace.total)

    def trial(self, name: str) -> None:
        """Name the trial."""
        self._pace.progress(name, 0, 1)
        self._update(now=self._running(name, ""))

    def progress(self, name: str, done: int, total: int, text: str) -> None:
        """Move the bar by a part of a trial."""
        self._pace.progress(name, done, total)
        if time.monotonic() - self._shown >= BAR_EVERY:
            self._shown = time.monotonic()
            self._update(now=self._running(name, text))

    def settled(self, record: Record, *, kept: bool) -> None:
        """Move the bar to the next trial; print what did not finish."""
        self._pace.settle(record, kept=kept)
        self._update(now="")
        if record.status != "finished" and not kept:
            self.note(_told(record))

    def note(self, text: str) -> None:
        """Print above the bar."""
        self._console.print(text, markup=False, highlight=False)

    def end(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _running(self, name: str, text: str) -> str:
        others = len(self._pace.parts) - 1
        return f"{name}  {text}" + (f"  (and {others} more)" if others else "")

    def _update(self, **fields: object) -> None:
        if self._bar is not None:
            fields |= {"completed": self._pace.done, "left": self._pace.left()}
            self._bar.update(self._task, **fields)  # pyright: ignore[reportArgumentType]


@final
class LineWatch(Watch):
    """Plain lines for logs: one every few seconds while trials run, and one when one ended."""

    def __init__(
        self,
        write: Callable[[str], object],
        every: float = LINE_EVERY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._every, self._clock = write, every, clock
        self._experiment = ""
        self._pace = Pace(clock)
        self._shown = 0.0

    def begin(self, experiment: str) -> None:
        """Start counting."""
        self._experiment = experiment
        self._pace = Pace(self._clock)
        self._shown = self._clock()

    def plan(self, more: int) -> None:
        """Tell how many trials the round has."""
        self._pace.total += more
        if more:
            total = self._pace.total
            self._write(f"{self._experiment}: {more} trials to settle, {total} in all so far")

    def trial(self, name: str) -> None:
        """Remember that it runs."""
        self._pace.progress(name, 0, 1)

    def progress(self, name: str, done: int, total: int, text: str) -> None:
        """Print where the trial is, if the last line is old enough."""
        self._pace.progress(name, done, total)
        now = self._clock()
        if now - self._shown >= self._every:
            self._shown = now
            self._write(f"{self._where()} {name}: {done} of {total} {text}".rstrip())

    def settled(self, record: Record, *, kept: bool) -> None:
        """Print how the trial ended, where it ran now."""
        self._pace.settle(record, kept=kept)
        if not kept:
            self._shown = self._clock()
            self._write(f"{self._where()} {_told(record)}")

    def note(self, text: str) -> None:
        """Print the text."""
        self._write(text)

    def end(self) -> None:
        """Tell what was kept."""
        if self._pace.kept:
            kept, total = self._pace.kept, self._pace.total
            self._write(f"{self._experiment}: {kept} of {total} trials recorded before")

    def _where(self) -> str:
        """The trials so far, and the time left."""
        left = self._pace.left()
        counted = f"{self._pace.settled}/{self._pace.total}"
        return f"{self._experiment} [{counted}{', ' * bool(left)}{left}]"


def _told(record: Record) -> str:
    """One line on how a trial ended."""
    ended = f"{record.trial.name} {record.status} in {span(record.seconds)}"
    return f"{ended}: {record.error}" if record.error else ended


def span(seconds: float) -> str:
    """ "1 min 05 s" or "5.0 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{max(seconds, 0):.1f} s"
