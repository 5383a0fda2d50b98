"""What limits a learned rate: each variant does what its name says, and the verdict counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import apo_core as apo
from experiments.limits import (
    BASE,
    FIXED,
    REMEDY,
    VARIANTS,
    APOVariant,
    Limits,
    Lookback,
)
from experiments.models import mlp
from experiments.problems import Batch, Problem, Stream, Supervised
from experiments.records import Outcome, Record, Trial
from experiments.seeds import generator
from experiments.small_tasks import TASKS
from experiments.tuning import runs_of
from verification.experiments.fakes import record_by
from verification.tolerances import CENTRAL_DIFFERENCE, ROUNDING, assert_close

WIDTHS = (4, 5, 3)


def _problem() -> Supervised:
    source = generator(11, "task")
    inputs = torch.randn(40, WIDTHS[0], generator=source, dtype=torch.float64)
    labels = torch.randint(0, WIDTHS[-1], (40,), generator=source)
    data = (inputs, labels)
    return Supervised(data, data, "cross_entropy", batch_size=8, seed=1, curvature_size=8)


def _model() -> nn.Sequential:
    return mlp(WIDTHS, seed=2, dtype=torch.float64)


def _backward(model: nn.Module, problem: Problem, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    problem.loss(model, problem.batch("loss")).backward()


def test_the_averaged_meta_gradient_is_the_mean_over_the_mini_batches() -> None:
    """The slope in log η of the mean Q over the drawn pairs, by a central difference of Q."""
    model, problem = _model(), _problem()
    recipe = APOVariant(lr=0.3, fsd_weight=0.5, batches=3, meta="Adam")
    optimizer = recipe.build(model, problem)
    assert isinstance(optimizer, apo.APO)
    _backward(model, problem, optimizer)
    own = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    theta = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    twin = _problem()
    pairs = [(twin.batch("curvature"), twin.batch("discrepancy")) for _ in range(3)]

    def mean_q(log_lr: float) -> float:
        return sum(_q(theta, log_lr, *pair) for pair in pairs) / 3

    h = float(torch.finfo(torch.float64).eps) ** (1 / 3)
    expected = (mean_q(math.log(0.3) + h) - mean_q(math.log(0.3) - h)) / (2 * h)
    slope = next(optimizer.rule.parameters()).grad
    assert slope is not None
    # |f'''| of Q in log η is of the order of Q here: η g moves θ by less than its own size
    assert_close(
        slope.reshape(()).numpy(),
        torch.tensor(expected, dtype=torch.float64).numpy(),
        CENTRAL_DIFFERENCE,
        condition=1.0,
        size=8,
        scale=abs(mean_q(math.log(0.3))),
    )
    # the step itself is along the gradient of its own mini-batch, with the η that is now there
    lr = math.exp(optimizer.rule.get_parameter("log_lr").item())
    for p, before, g in zip(model.parameters(), theta, own, strict=True):
        assert_close(
            p.detach().numpy(), (before - lr * g).numpy(), ROUNDING, size=2, scale=1.0 + lr
        )


def _q(theta: list[Tensor], log_lr: float, batch: Batch, other: Batch) -> float:
    """J_B(θ − η ∇J_B(θ)) + ½ KL on B', written out."""
    model = _model()
    with torch.no_grad():
        for p, value in zip(model.parameters(), theta, strict=True):
            p.copy_(value)
    before = model(other[0]).log_softmax(1).detach()
    slopes = torch.autograd.grad(
        nn.functional.cross_entropy(model(batch[0]), batch[1]), list(model.parameters())
    )
    with torch.no_grad():
        for p, g in zip(model.parameters(), slopes, strict=True):
            p.sub_(math.exp(log_lr) * g)
        after = model(other[0]).log_softmax(1)
        kl = (after.exp() * (after - before)).sum(1).mean()
        return float(nn.functional.cross_entropy(model(batch[0]), batch[1]) + 0.5 * kl)


def test_looking_back_is_the_slope_of_the_loss_after_several_steps() -> None:
    """Two steps along fixed gradients, the loss a parabola: the slope by hand.

    J(θ) = ½ Σ θ², η = 0.1: θ₁ = 0.9 θ₀, θ₂ = 0.81 θ₀, ∇J(θ₂)ᵀ(θ₂ − θ₀) = −0.81 · 0.19 ‖θ₀‖².
    RMSprop's first step is α g / (√0.01 |g|) = 1 for α = 0.1, so that log η rises by 1.
    """
    model = mlp((2, 1), seed=0, bias=False, dtype=torch.float64)
    optimizer = Lookback(lr=0.1, horizon=2, batches=1).build(model, _Parabola())
    rates = []
    for _ in range(3):
        optimizer.zero_grad()
        _Parabola().loss(model, ()).backward()
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 0.1
    # RMSprop adds ε = 1e-8 to √(0.01 g²): relatively 1e-7/|g|; |g| > 0.02 with this θ₀
    assert rates[1] == pytest.approx(0.1 * math.e, rel=1e-5)
    assert rates[2] == rates[1]


class _Parabola(Problem):
    loss_name = "squared_error"

    def batch(self, stream: Stream) -> Batch:
        return ()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return torch.stack([0.5 * p.square().sum() for p in model.parameters()]).sum()

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {}


def test_the_weight_falls_by_its_factor_at_every_step() -> None:
    model, problem = _model(), _problem()
    optimizer = APOVariant(fsd_weight=0.1, fsd_decay=0.5).build(model, problem)
    assert isinstance(optimizer, apo.APO)
    for _ in range(3):
        _backward(model, problem, optimizer)
        optimizer.step()
    assert optimizer.objective.fsd_weight == 0.1 * 0.5**3


def _records(losses: dict[str, Sequence[float]], fixed: Sequence[float]) -> list[Record]:
    """Fake records of every task: of the named variants by seed, all others as the base."""
    experiment = Limits()
    named = {VARIANTS[name]: values for name, values in losses.items()}
    records = []
    for trial in experiment.plan("default", 3, []):
        values = next((v for one, v in named.items() if _is(trial, one)), losses[BASE])
        if trial.label == FIXED.label:
            values = fixed if trial.options["lr"] == 0.5 else [v * 100 for v in fixed]
        loss = values[trial.seed]
        curves = {"step": [0.0, 1.0], "loss": [2.0, loss]}
        outcome = Outcome({"loss": loss, "test": 0.1}, curves)
        records.append(record_by("limits", trial, outcome))
    return records


def _is(trial: Trial, recipe: object) -> bool:
    assert isinstance(recipe, APOVariant | Lookback)
    return all(trial.options.get(k) == v for k, v in recipe.options().items())


def test_the_verdict_counts_where_a_variant_pays() -> None:
    """A third of the base's loss for every seed pays on all tasks; a third and thrice does not."""
    base = [0.9, 1.0, 1.1]
    records = _records(
        {BASE: base, REMEDY: [0.3, 0.33, 0.36], "K = 1": [0.3, 3.0, 1.0]}, fixed=[0.3, 0.33, 0.36]
    )
    verdict = Limits().verdict(records)
    assert f"on {len(TASKS)} of {len(TASKS)} tasks: {REMEDY}." in verdict
    assert "K = 1" not in verdict
    assert f"1 [1, 1] with {REMEDY}" in verdict


def test_the_table_has_a_row_for_every_variant_and_the_best_rate_of_each_task() -> None:
    records = _records({BASE: [0.9, 1.0, 1.1]}, fixed=[0.3, 0.33, 0.36])
    rows = Limits().table(records)
    assert len(rows) == len(TASKS) * (len(VARIANTS) + 1)
    assert sum("η = 0.5" in row.label for row in rows) == len(TASKS)
    figure = Figure()
    Limits().draw(records, figure)
    assert len(figure.axes) == 2 * len(TASKS)


def test_every_variant_is_planned_once_for_every_seed() -> None:
    trials = Limits().plan("default", 3, [])
    assert len(trials) == len(TASKS) * 3 * (len(VARIANTS) + len(FIXED.grid))
    fakes = _records({BASE: [1.0, 1.0, 1.0]}, fixed=[1.0, 1.0, 1.0])
    for one in VARIANTS.values():
        assert len(runs_of(one, fakes)) == 3 * len(TASKS)
