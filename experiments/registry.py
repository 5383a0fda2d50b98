"""The registry: an experiment is one figure or table, its trials, and what their records show.

An experiment is one file with one final subclass of `Experiment`, registered at the file's end:

    register(Rosenbrock())

`plan` is called in rounds. It sees the records of the trials that it planned before, and returns
all trials known so far; so a grid search comes first, and the best of the grid with several seeds
after it. The experiment is complete once every planned trial has its record.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from experiments.data import Dataset, load
from experiments.records import Outcome, Record, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "AT_EDGE",
    "PRESETS",
    "Context",
    "Experiment",
    "Outcome",
    "Preset",
    "Record",
    "Row",
    "Trial",
    "experiments",
    "register",
]

Preset = Literal["smoke", "default", "paper"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
AT_EDGE = "at the grid's edge"
"""What a row's note says of a choice at an edge of its grid; the report fails where no reason is
declared for it."""

# Each registers its experiments when it is imported; `experiments.paper` imports its own files.
MODULES = (
    "experiments.digits",
    "experiments.digits_rivals",
    "experiments.limits",
    "experiments.limits_rules",
    "experiments.held_out",
    "experiments.gap",
    "experiments.sharpness",
    "experiments.overhead",
    "experiments.paper",
)


@dataclass(frozen=True)
class Context:
    """What a running trial may use of the world around it.

    Attributes:
        device: A torch device string, "cpu" or "cuda".
        report: Called with (done, total, text); text is a short remark such as "loss 0.31".
    """

    device: str = "cpu"
    report: Callable[[int, int, str], None] = lambda done, total, text: None

    def load(self, name: str, *, seed: int = 0) -> Dataset:
        """The data set of that name; `seed` draws the held-out split where the source has none."""
        return load(name, seed=seed)

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Tell that `done` of `total` steps are done; cheap enough to call at every step."""
        self.report(done, total, text)


@dataclass(frozen=True)
class Row:
    """One row of an experiment's table: our figure beside the paper's.

    Attributes:
        label: The method, as in the plot's legend.
        ours: Our figure as text, such as "0.031 ± 0.002".
        paper: The paper's figure as text, "–" where it gives none.
        n: How many runs stand behind `ours`.
        note: What else the reader must know, such as "1 of 5 diverged".
        costs: What a run took, by the unit, such as {"seconds": "12", "passes": "1.2e+04"}; each
            unit is a column of the report.
    """

    label: str
    ours: str
    paper: str
    n: int
    note: str = ""
    costs: Mapping[str, str] = field(default_factory=dict)


class Experiment(ABC):
    """One figure or table: which trials it needs, how one runs, and what their records show.

    Attributes:
        name: The slug that the command line takes, such as "p22-fig7".
        title: One line for people.
        source: Where the figure or table stands, such as "P22 Figure 7, appendix C.1".
        claims: Ids of the claims ledger that its records bear on.
        embedded: Whether it needs no download.
        datasets: Names of the data sets that it loads, made sure of before the first trial.
        scales: What each preset does, such as {"default": "2,000 steps, 5 seeds", …}.
        timed: Whether its trials measure time, so that none may run beside another.
        edges: Why the best of a grid may lie at its edge, by preset and the row's label, such as
            {("paper", "SGDm"): "the grid is the paper's"}.
    """

    name: str
    title: str
    source: str
    claims: tuple[str, ...] = ()
    embedded: bool = True
    datasets: tuple[str, ...] = ()
    scales: Mapping[Preset, str]
    timed: bool = False
    edges: Mapping[tuple[Preset, str], str] = MappingProxyType({})

    @abstractmethod
    def plan(self, preset: Preset, seeds: int | None, records: Sequence[Record]) -> list[Trial]:
        """All trials known so far, given the records of those planned before.

        Must depend on nothing but its arguments, so that an interrupted run resumes with the same
        trials. `seeds` overrides the preset's number of seeds where it is not None.
        """

    @abstractmethod
    def run(self, trial: Trial, context: Context) -> Outcome:
        """Run one trial. A diverged run returns its non-finite metrics; an error may be raised."""

    @abstractmethod
    def table(self, records: Sequence[Record]) -> list[Row]:
        """Ours beside the paper's, from the records alone."""

    @abstractmethod
    def draw(self, records: Sequence[Record], figure: Figure) -> None:
        """Draw the figure, from the records alone."""

    @abstractmethod
    def verdict(self, records: Sequence[Record]) -> str:
        """One sentence on what the records show of the claim, computed from them."""


_registered: dict[str, Experiment] = {}


def register(experiment: Experiment) -> None:
    """Add an experiment to the registry.

    Raises:
        ValueError: An experiment of that name is registered.
        TypeError: `name`, `title` or `source` is missing, or `scales` lacks a preset.
    """
    for attribute in ("name", "title", "source", "scales"):
        if not hasattr(experiment, attribute):
            raise TypeError(
                f"`{attribute}` must be set on {type(experiment).__name__}, got nothing; see the "
                "attributes of `Experiment`."
            )
    missing = [preset for preset in PRESETS if preset not in experiment.scales]
    if missing:
        raise TypeError(
            f"`scales` of {experiment.name} must say what each preset does, got nothing for "
            f"{', '.join(missing)}."
        )
    if experiment.name in _registered:
        raise ValueError(
            f"`name` must be unique among the experiments, got {experiment.name!r} again; choose "
            "another."
        )
    _registered[experiment.name] = experiment


def experiments() -> dict[str, Experiment]:
    """Every experiment by its name, in the order of registration."""
    for module in MODULES:
        importlib.import_module(module)
    return dict(_registered)
