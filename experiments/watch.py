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
    TimeRemainingColumn,
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
        """A trial starts to run."""

    @abstractmethod
    def progress(self, done: int, total: int, text: str) -> None:
        """The trial has done `done` of `total` steps; called at every step."""

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
class BarWatch(Watch):
    """One bar an experiment, over its trials, with the time left and the trial that runs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._settled = self._total = 0
        self._name = ""
        self._shown = 0.0

    def begin(self, experiment: str) -> None:
        """Start a bar."""
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}", markup=False),
            console=self._console,
        )
        self._settled = self._total = 0
        self._task = self._bar.add_task(experiment, total=None, now="")
        self._bar.start()

    def plan(self, more: int) -> None:
        """Lengthen the bar."""
        self._total += more
        self._update(total=self._total)

    def trial(self, name: str) -> None:
        """Name the trial."""
        self._name = name
        self._update(now=name)

    def progress(self, done: int, total: int, text: str) -> None:
        """Move the bar by a part of a trial."""
        if time.monotonic() - self._shown >= BAR_EVERY:
            self._shown = time.monotonic()
            part = done / total if total else 0.0
            self._update(completed=self._settled + part, now=f"{self._name}  {text}")

    def settled(self, record: Record, *, kept: bool) -> None:
        """Move the bar to the next trial; print what did not finish."""
        self._settled += 1
        self._update(completed=self._settled, now="")
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

    def _update(self, **fields: object) -> None:
        if self._bar is not None:
            self._bar.update(self._task, **fields)  # pyright: ignore[reportArgumentType]


@final
class LineWatch(Watch):
    """Plain lines for logs: one every few seconds while a trial runs, and one when it ended."""

    def __init__(
        self,
        write: Callable[[str], object],
        every: float = LINE_EVERY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._every, self._clock = write, every, clock
        self._name = self._experiment = ""
        self._settled = self._kept = self._total = 0
        self._started = self._shown = 0.0

    def begin(self, experiment: str) -> None:
        """Start counting."""
        self._experiment = experiment
        self._settled = self._kept = self._total = 0
        self._started = self._shown = self._clock()

    def plan(self, more: int) -> None:
        """Tell how many trials the round has."""
        self._total += more
        if more:
            self._write(f"{self._experiment}: {more} trials to settle, {self._total} in all so far")

    def trial(self, name: str) -> None:
        """Remember the name."""
        self._name = name

    def progress(self, done: int, total: int, text: str) -> None:
        """Print where the trial is, if the last line is old enough."""
        now = self._clock()
        if now - self._shown >= self._every:
            self._shown = now
            part = done / total if total else 0.0
            self._write(f"{self._where(part)} {self._name}: {done} of {total} {text}".rstrip())

    def settled(self, record: Record, *, kept: bool) -> None:
        """Print how the trial ended, where it ran now."""
        self._settled += 1
        self._kept += kept
        if not kept:
            self._shown = self._clock()
            self._write(f"{self._where(0.0)} {_told(record)}")

    def note(self, text: str) -> None:
        """Print the text."""
        self._write(text)

    def end(self) -> None:
        """Tell what was kept."""
        if self._kept:
            self._write(f"{self._experiment}: {self._kept} of {self._total} trials recorded before")

    def _where(self, part: float) -> str:
        """The trials so far, and the time left if the rest takes as long as what ran now."""
        ran = self._settled - self._kept + part
        elapsed = self._clock() - self._started
        left = (
            f", {_span(elapsed / ran * (self._total - self._settled - part))} left" if ran else ""
        )
        return f"{self._experiment} [{self._settled}/{self._total}{left}]"


def _told(record: Record) -> str:
    """One line on how a trial ended."""
    ended = f"{record.trial.name} {record.status} in {_span(record.seconds)}"
    return f"{ended}: {record.error}" if record.error else ended


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{max(seconds, 0):.1f} s"
