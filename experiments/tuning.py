"""Grid search as data: every method's grid, what was chosen, whether the choice lies at an edge.

The protocol of every experiment that searches: each recipe of a method's grid runs with the tuning
seeds; the one with the lowest mean final training loss (a diverged run counts as infinite) runs
again with the reporting seeds 0, 1, ..., and those runs alone are reported. No test set has a say.

Source: P22 appendix B.2 (the choice by final training loss, then repeated runs).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from experiments.recipes import Recipe
from experiments.records import Record, Trial
from experiments.registry import AT_EDGE

FIRST_TUNING_SEED = 1000
"""Tuning seeds count from here, reporting seeds from 0."""

Track = Literal["tuned", "self-tuning"]


@dataclass(frozen=True)
class Method:
    """What the legend calls a method, and the recipes that are tried for it.

    Attributes:
        label: What the legend calls it.
        grid: What is searched.
        track: Whether its learning rate is searched, or the method finds it by itself; the two are
            compared apart.
    """

    label: str
    grid: tuple[Recipe, ...]
    track: Track = "tuned"


def union(presets: Iterable[Sequence[Method]]) -> list[Method]:
    """Every method with every recipe of any preset: the records say which of them ran."""
    return [
        replace(same[0], grid=tuple(dict.fromkeys(one for method in same for one in method.grid)))
        for same in zip(*presets, strict=True)
    ]


def trial(label: str, recipe: Recipe, seed: int, task: Mapping[str, Any]) -> Trial:
    """One run of a recipe; `task` are the options that every method shares.

    Texts of `task` also stand in the name, so that two data sets do not collide.
    """
    where = [value for value in task.values() if isinstance(value, str)]
    name = "-".join([*where, recipe.slug(), f"seed{seed}"])
    return Trial(name=name, options={**recipe.options(), **task}, seed=seed, label=label)


def runs_of(recipe: Recipe, records: Sequence[Record], *, tuning: bool = False) -> list[Record]:
    """The records of a recipe with the reporting (or the tuning) seeds, by seed.

    A hyperparameter that a record lacks had no other value than its default when it was made.
    """
    options, defaults = recipe.options(), {f.name: f.default for f in fields(recipe)}
    found = [
        record
        for record in records
        if (record.seed >= FIRST_TUNING_SEED) == tuning
        and all(
            record.options.get(name, defaults.get(name)) == value for name, value in options.items()
        )
    ]
    return sorted(found, key=lambda record: record.seed)


def mean_loss(runs: Sequence[Record], metric: str = "loss") -> float:
    """The mean of a final metric; infinite if a run diverged, failed, or if there is none."""
    return sum(run.metric(metric) for run in runs) / len(runs) if runs else math.inf


def tried(method: Method, records: Sequence[Record]) -> Method:
    """The part of the method's grid that has records; another preset may have another part."""
    grid = tuple(
        recipe
        for recipe in method.grid
        if runs_of(recipe, records) or runs_of(recipe, records, tuning=True)
    )
    return replace(method, grid=grid)


def chosen(method: Method, records: Sequence[Record], *, tuning: bool = True) -> Recipe:
    """The recipe of the grid with the lowest mean training loss over the tuning seeds.

    With `tuning` False, over the reporting seeds: for a method whose whole grid is reported.
    """
    return min(method.grid, key=lambda recipe: mean_loss(runs_of(recipe, records, tuning=tuning)))


def plan_grids(
    methods: Sequence[Method], task: Mapping[str, Any], seeds: Iterable[int]
) -> list[Trial]:
    """Every recipe of every grid with every seed."""
    return [
        trial(method.label, recipe, seed, task)
        for seed in seeds
        for method in methods
        for recipe in method.grid
    ]


def plan_search(
    methods: Sequence[Method],
    task: Mapping[str, Any],
    *,
    tuning_seeds: int,
    seeds: int,
    records: Sequence[Record],
) -> list[Trial]:
    """First every grid with the tuning seeds; once it has run, the chosen with the others."""
    tuning = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + tuning_seeds)
    trials = plan_grids(methods, task, tuning)
    done = {record.trial.name for record in records}
    if all(one.name in done for one in trials):
        trials += [
            trial(method.label, chosen(method, records), seed, task)
            for method in methods
            for seed in range(seeds)
        ]
    return trials


def at_edge(method: Method, choice: Recipe) -> str:
    """ "lr and damping at the grid's edge": whose chosen value is the grid's least or greatest.

    Empty if there is none. A hyperparameter with fewer than three values has no interior.
    """
    names = []
    for field in fields(choice):
        tried = {getattr(recipe, field.name) for recipe in method.grid}
        if len(tried) >= 3 and getattr(choice, field.name) in (min(tried), max(tried)):
            names.append(field.name)
    return f"{' and '.join(names)} {AT_EDGE}" if names else ""
