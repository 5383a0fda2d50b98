"""A small experiment of two rounds to hold the machinery against; one `undertake`s it to end it."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final
from unittest import mock

import numpy as np
import pooch
from matplotlib.figure import Figure

from experiments.data.sources import SourceFile, fetch
from experiments.provenance import Provenance
from experiments.registry import Context, Experiment, Outcome, Preset, Record, Row, Trial
from experiments.runner import run_experiment
from experiments.watch import LineWatch

RATES = (0.1, 1.0, 10.0)
STEPS = 20
UNIT = Provenance("0" * 40, False, {"python": "3.11.0"}, "2 CPU cores, 1 thread")
WHEN = "2026-01-01T00:00:00+00:00"
INTERRUPTED = 130


class Killed(Exception):
    """A fault that ends the trial's process as the kernel does when memory is short."""


@final
class Descent(Experiment):
    """Gradient descent on x²/2 from a random point: a grid of rates, then the best with more seeds.

    The rate 10 diverges. `faults` maps trial names to what they raise; `pause` slows every trial
    down, and `hangs` those of its names, which tell nothing meanwhile; to the file `trace` each
    trial adds its process and name as it begins.
    """

    title = "Descent on a parabola <fake> & small"
    source = "no paper | none"
    claims = ("p22-eq3",)
    scales = {"smoke": "10 steps", "default": "20 steps, 3 seeds", "paper": "the same"}  # noqa: RUF012

    def __init__(
        self,
        name: str = "descent",
        faults: dict[str, BaseException] | None = None,
        pause: float = 0.0,
        datasets: tuple[str, ...] = (),
        power: float = 300.0,
        trace: Path | None = None,
        hangs: dict[str, float] | None = None,
    ) -> None:
        self.name, self.datasets, self._trace, self._hangs = name, datasets, trace, hangs or {}
        self._faults, self._pause, self._power = faults or {}, pause, power
        self.ran: list[str] = []

    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """A grid of rates with seed 0; once it is recorded, the best rate with the other seeds."""
        trials = [self._trial(rate, 0, preset) for rate in RATES]
        done = {record.trial.name: record for record in records}
        if all(trial.name in done for trial in trials):
            best = min(trials, key=lambda trial: done[trial.name].metric("loss"))
            trials += [
                self._trial(best.options["rate"], seed, preset) for seed in range(1, seeds or 3)
            ]
        return trials

    def _trial(self, rate: float, seed: int, preset: Preset) -> Trial:
        steps = STEPS // 2 if preset == "smoke" else STEPS
        options = {"rate": rate, "steps": steps, "power": self._power}
        return Trial(f"rate-{rate}-seed-{seed}", options, seed, f"descent, rate {rate}")

    def run(self, trial: Trial, context: Context) -> Outcome:
        """Descend."""
        self.ran.append(trial.name)
        if self._trace is not None:
            with self._trace.open("a") as file:
                file.write(f"{os.getpid()} {trial.name}\n")
        if isinstance(self._faults.get(trial.name), Killed):
            os.kill(os.getpid(), signal.SIGKILL)
        if trial.name in self._faults:
            raise self._faults[trial.name]
        time.sleep(self._hangs.get(trial.name, 0.0))
        x = np.random.default_rng(trial.seed).normal()
        losses = []
        for step in range(trial.options["steps"]):
            x -= trial.options["rate"] * x
            losses.append(x**2 / 2)
            context.progress(step + 1, trial.options["steps"], f"loss {losses[-1]:.2e}")
            time.sleep(self._pause / trial.options["steps"])
        # Too large a rate is meant to end in infinity; in 20 steps it only gets large.
        final = losses[-1] if losses[-1] < self._power else math.inf
        return Outcome({"loss": final}, {"step": list(range(1, len(losses) + 1)), "loss": losses})

    def table(self, records: Sequence[Record]) -> list[Row]:
        """One row a record."""
        return [
            Row(record.label, f"{record.metric('loss'):.2e}", "–", 1, f"<{record.status}>")
            for record in records
        ]

    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """The losses."""
        axes = figure.subplots()
        for record in records:
            axes.plot(record.curve("step"), record.curve("loss"), label=record.trial.name)
        axes.set(yscale="log", xlabel="step", ylabel="loss", title=self.title)
        axes.legend()

    def verdict(self, records: Sequence[Record]) -> str:
        """The best loss."""
        return f"The best loss is {min(record.metric('loss') for record in records):.2e}."


def record_by(
    experiment: str, trial: Trial, outcome: Outcome, preset: Preset = "default", error: str = ""
) -> Record:
    """The record of that outcome, of no real run."""
    return Record(experiment, preset, trial, outcome, UNIT, WHEN, 1.0, error)


def record_of(name: str = "t", error: str = "", **metrics: float) -> Record:
    """A record with those metrics, of no real run."""
    trial = Trial(name, {"rate": 0.1}, 0, "descent, rate 0.1")
    outcome = Outcome({} if error else metrics)
    return record_by("descent", trial, outcome, "smoke", error)


def lasting(records: dict[str, Record]) -> dict[str, Any]:
    """What two runs of the same work must agree on: all but the time they took."""
    return {
        name: repr((record.experiment, record.preset, record.trial, record.outcome, record.error))
        for name, record in records.items()
    }


def undertake(out: Path, jobs: int, experiment: Descent) -> None:
    """Run the experiment as the main process of a command; Ctrl-C ends it with `INTERRUPTED`."""
    # a suite that a shell runs in the background inherits an ignored SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run_experiment(experiment, "default", out, LineWatch([].append), jobs=jobs)
    except KeyboardInterrupt:
        sys.exit(1 if multiprocessing.active_children() else INTERRUPTED)


def fetched(item: tuple[Path, SourceFile], report: object) -> bytes:
    """The content of that file, fetched by way of that cache; work for a process of its own."""
    cache, source = item
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(pooch, "os_cache", return_value=cache),
    ):
        os.environ.pop("APO_DATA_DIR", None)
        return fetch(source).read_bytes()
