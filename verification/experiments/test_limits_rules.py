"""Settings for rules with a momentum: what σ does to it, and the verdict over tasks."""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure

import apo_core as apo
from experiments.limits_rules import FIXED, SEEDS, VARIANTS, RuleLimits
from experiments.models import mlp
from experiments.problems import Supervised
from experiments.records import Outcome, Record
from experiments.seeds import generator
from experiments.self_tuned import MOMENTUM, SelfTuned
from experiments.small_tasks import TASKS
from experiments.tuning import runs_of
from verification.experiments.fakes import record_by
from verification.tolerances import ROUNDING, assert_close


def test_with_sigma_of_one_less_momentum_a_gradient_moves_as_far_as_was_looked_at() -> None:
    """Of a gradient at the first step alone: Σ σ η μᵗ g = η g for σ = 1 − μ."""
    eta, steps = 0.3, 200
    source = generator(4, "task")
    data = (torch.randn(8, 3, generator=source, dtype=torch.float64), torch.arange(8) % 2)
    problem = Supervised(data, data, "cross_entropy", batch_size=8, seed=0)
    model = mlp((3, 2), seed=0, dtype=torch.float64)
    recipe = SelfTuned("SGDm", lr=eta, update_scale=1 - MOMENTUM, trust_factor=None, interval=10**6)
    optimizer = recipe.build(model, problem)
    assert isinstance(optimizer, apo.APO)
    start = [p.detach().clone() for p in model.parameters()]
    gradient = torch.autograd.grad(
        problem.loss(model, problem.batch("loss")), list(model.parameters())
    )
    for step in range(steps):
        for p, g in zip(model.parameters(), gradient, strict=True):
            p.grad = g if step == 0 else torch.zeros_like(g)
        optimizer.step()
    for p, before, g in zip(model.parameters(), start, gradient, strict=True):
        # what is left of the momentum after 200 steps is 0.9²⁰⁰ = 7e-10 of the whole
        moved = (p.detach() - before) / (1 - MOMENTUM**steps)
        scale = float(before.abs().max() + eta * g.abs().max())
        assert_close(moved, -eta * g, ROUNDING, iterations=steps, scale=scale)


def _records(factors: dict[str, float]) -> list[Record]:
    """Fake records: the fixed rates end at 1, the best of them at 0.5, variants at their factor."""
    experiment = RuleLimits()
    records = []
    for trial in experiment.plan("default", None, []):
        fixed = next((one for one in FIXED.values() if one.label == trial.label), None)
        if fixed is None:
            loss = 0.5 * factors.get(trial.label, 1.0)
        else:
            loss = 0.5 if trial.options["lr"] == fixed.grid[2].options()["lr"] else 1.0
        outcome = Outcome({"loss": loss, "test": 0.1}, {"step": [0.0], "loss": [loss]})
        records.append(record_by("limits-rules", trial, outcome))
    return records


def test_every_variant_is_planned_once_for_every_seed_and_task() -> None:
    records = _records({})
    recipes = [one for variants in VARIANTS.values() for one in variants.values()]
    recipes += [one for method in FIXED.values() for one in method.grid]
    assert len(records) == len(recipes) * len(TASKS) * SEEDS
    for one in recipes:
        assert len(runs_of(one, records)) == len(TASKS) * SEEDS


def test_the_verdict_is_beside_the_best_fixed_rate() -> None:
    records = _records({"σ = 0.18, κ = 1.1": 3.0, "κ = 1.1": math.inf})
    verdict = RuleLimits().verdict(records)
    assert "SGDm, σ = 0.18, κ = 1.1: 3 to 3" in verdict
    assert "Adam, κ = 1.1: inf to inf" in verdict
    assert "RMSprop, as in the papers: 1 to 1" in verdict
    rows = RuleLimits().table(records)
    assert len(rows) == len(TASKS) * sum(1 + len(variants) for variants in VARIANTS.values())
    assert not any("edge" in row.note for row in rows)
    figure = Figure()
    RuleLimits().draw(records, figure)
    assert len(figure.axes) == len(TASKS) * len(VARIANTS)
