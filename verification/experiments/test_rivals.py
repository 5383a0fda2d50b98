"""The rivals beyond the papers: each trains, repeats, and is what it is called."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from experiments.models import mlp
from experiments.problems import Supervised, mean_loss
from experiments.recipes import Recipe, recipe
from experiments.records import Outcome
from experiments.rivals import (
    CosineSGD,
    HypergradientDescent,
    MoMo,
    Muon,
    MuonInFloat32,
    ScheduleFreeSGD,
    StepSGD,
    rivals,
)
from experiments.seeds import generator
from experiments.training import train
from experiments.tuning import Method
from verification.tolerances import FUNCTION, assert_close

WIDTHS = (5, 7, 6, 3)
EXAMPLES, BATCH, STEPS = 48, 16, 20
METHODS = rivals(STEPS)
VARIED = {"Prodigy": "d_coef", "SGD-HD": "hypergradient_lr", "Mechanic SGD": "s_decay"}


def _data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    source = generator(7, "task")
    inputs = torch.randn(EXAMPLES, WIDTHS[0], generator=source, dtype=dtype)
    return inputs, torch.randint(0, WIDTHS[-1], (EXAMPLES,), generator=source)


def _problem(dtype: torch.dtype = torch.float32, batch: int = BATCH) -> Supervised:
    return Supervised(_data(dtype), _data(dtype), "cross_entropy", batch_size=batch, seed=0)


def _run(one: Recipe) -> Outcome:
    model, problem = mlp(WIDTHS, seed=0), _problem()
    return train(model, one.build(model, problem), problem, steps=STEPS, record_every=5)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_a_rival_trains_and_repeats_and_leaves_the_global_random_state(method: Method) -> None:
    before = torch.get_rng_state()
    first = _run(method.grid[0])
    assert first.metrics["loss"] < first.curves["loss"][0]
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    second = _run(method.grid[0])
    assert first.curves["loss"] == second.curves["loss"]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_the_authors_default_stands_first_in_the_grid_and_inside_it(method: Method) -> None:
    default, *others = method.grid
    kind: Any = type(default)
    own = {"SPS": {"momentum": 0.0}}.get(method.label, {})
    assert default == (kind(STEPS) if hasattr(default, "steps") else kind(**own))
    varied = VARIED.get(method.label, "lr")
    values = [getattr(one, varied) for one in others]
    assert min(values) < getattr(default, varied) < max(values)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_a_rival_comes_back_from_its_options(method: Method) -> None:
    for one in method.grid:
        assert recipe({**one.options(), "epochs": 3}) == one


@pytest.mark.parametrize(
    ("one", "schedule"),
    [
        (CosineSGD(STEPS), lambda optimizer: CosineAnnealingLR(optimizer, STEPS)),
        (StepSGD(STEPS), lambda optimizer: MultiStepLR(optimizer, [6, 12, 16], 0.2)),
    ],
    ids=["cosine", "steps"],
)
def test_a_schedule_is_torchs_stepped_by_hand(one: CosineSGD | StepSGD, schedule: Any) -> None:
    outcome = _run(one)
    model, problem = mlp(WIDTHS, seed=0), _problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=one.lr, momentum=one.momentum)
    by_hand: LRScheduler = schedule(optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        problem.loss(model, problem.batch("loss")).backward()
        optimizer.step()
        by_hand.step()
    assert outcome.metrics["loss"] == problem.evaluate(model)["loss"]


def test_the_schedules_are_the_formulas() -> None:
    cosine, steps = (_run(one).curves["learning_rate"] for one in (CosineSGD(20), StepSGD(20)))
    for t, rate in zip((0, 5, 10, 15, 20), cosine, strict=True):
        # torch multiplies ratios of one step to the next: 20 of them
        expected = 0.05 * (1 + math.cos(math.pi * t / STEPS))
        assert_close(rate, expected, FUNCTION, iterations=STEPS, scale=0.1)
    # decayed after 6, 12 and 16 steps
    assert_close(
        np.array(steps), np.array([0.1, 0.1, 0.02, 0.004, 0.0008]), FUNCTION, iterations=3, size=1
    )


def _gradient(weights: list[np.ndarray]) -> list[np.ndarray]:
    """∇ of the mean loss over all examples, at those parameters."""
    model = mlp(WIDTHS, seed=0, dtype=torch.float64)
    with torch.no_grad():
        for p, value in zip(model.parameters(), weights, strict=True):
            p.copy_(torch.from_numpy(value))
    inputs, labels = _data(torch.float64)
    mean_loss("cross_entropy", model(inputs), labels).backward()
    return [p.grad.numpy() for p in model.parameters() if p.grad is not None]


def _start() -> list[np.ndarray]:
    return [
        p.detach().numpy().copy() for p in mlp(WIDTHS, seed=0, dtype=torch.float64).parameters()
    ]


def test_schedule_free_sgd_is_evaluated_at_its_average() -> None:
    lr, momentum, steps = 0.5, 0.9, 4
    model = mlp(WIDTHS, seed=0, dtype=torch.float64)
    problem = _problem(torch.float64, batch=EXAMPLES)
    optimizer = ScheduleFreeSGD(lr=lr, momentum=momentum).build(model, problem)
    outcome = train(model, optimizer, problem, steps=steps, record_every=1)

    # Defazio et al. (2024), eq. 3: y = (1 − β)z + βx, z ← z − γ∇f(y), x ← (1 − c)x + cz, c = 1/t
    average, base = _start(), _start()
    for t in range(1, steps + 1):
        middle = [(1 - momentum) * z + momentum * x for x, z in zip(average, base, strict=True)]
        base = [z - lr * g for z, g in zip(base, _gradient(middle), strict=True)]
        average = [(1 - 1 / t) * x + z / t for x, z in zip(average, base, strict=True)]
    judged = mlp(WIDTHS, seed=0, dtype=torch.float64)
    with torch.no_grad():
        for p, value in zip(judged.parameters(), average, strict=True):
            p.copy_(torch.from_numpy(value))
    expected = problem.evaluate(judged)["loss"]
    # the library goes from y to x and back by factors 1/β at every evaluation
    assert_close(
        outcome.metrics["loss"],
        expected,
        FUNCTION,
        size=EXAMPLES + sum(WIDTHS),
        iterations=3 * steps,
        condition=1 / momentum,
    )
    # at y, where it trains, the loss is another
    assert abs(problem.evaluate(model)["loss"] - expected) > 1e-6


def test_hypergradient_descent_is_its_recursion() -> None:
    lr, beta, steps = 0.1, 5.0, 5
    model = mlp(WIDTHS, seed=0, dtype=torch.float64)
    problem = _problem(torch.float64, batch=EXAMPLES)
    optimizer = HypergradientDescent(model.parameters(), lr=lr, hypergradient_lr=beta)
    outcome = train(model, optimizer, problem, steps=steps, record_every=1)

    weights, rate, rates = _start(), lr, [lr]
    before = [np.zeros_like(value) for value in weights]
    for _ in range(steps):
        gradient = _gradient(weights)
        rate += beta * sum(float((g * b).sum()) for g, b in zip(gradient, before, strict=True))
        weights = [value - rate * g for value, g in zip(weights, gradient, strict=True)]
        before = gradient
        rates.append(rate)
    assert rates[-1] > 1.01 * lr, "the learning rate must move for this test to see it"
    size = EXAMPLES + sum(value.size for value in weights)
    assert_close(
        np.array(outcome.curves["learning_rate"]),
        np.array(rates),
        FUNCTION,
        size=size,
        iterations=steps,
    )


@pytest.mark.parametrize(("lr", "beta"), [(0.0, 0.1), (0.1, -1.0)])
def test_hypergradient_descent_refuses_rates_that_are_none(lr: float, beta: float) -> None:
    model = mlp(WIDTHS, seed=0)
    with pytest.raises(ValueError, match="`lr` must be positive and `hypergradient_lr` non-negat"):
        HypergradientDescent(model.parameters(), lr=lr, hypergradient_lr=beta)


@pytest.mark.parametrize("lr", [1e9, 0.05])
def test_momo_without_momentum_is_the_bounded_stochastic_polyak_step(lr: float) -> None:
    steps = 3
    model = mlp(WIDTHS, seed=0, dtype=torch.float64)
    problem = _problem(torch.float64, batch=EXAMPLES)
    optimizer = MoMo(lr=lr, momentum=0.0).build(model, problem)
    outcome = train(model, optimizer, problem, steps=steps, record_every=1)

    # Loizou et al. (2021), eq. 3 with c = 1, f* = 0: η = min{f / ‖∇f‖², η_b}
    weights, rates, condition = _start(), [], 1.0
    for loss in outcome.curves["loss"][:-1]:
        gradient = _gradient(weights)
        square = sum(float((g * g).sum()) for g in gradient)
        # the library adds and takes off ⟨∇f, θ⟩, two sums that cancel
        along = sum(float(np.abs(g * w).sum()) for g, w in zip(gradient, weights, strict=True))
        condition = max(condition, 1 + 2 * along / loss)
        rates.append(min(loss / square, lr))
        weights = [w - rates[-1] * g for w, g in zip(weights, gradient, strict=True)]
    assert all((rate == lr) == (lr < 1) for rate in rates), "each side of the bound is met"
    assert_close(
        np.array(outcome.curves["step_ratio"][1:]),
        np.array(rates),
        FUNCTION,
        size=EXAMPLES + sum(w.size for w in weights),
        iterations=steps,
        condition=condition,
    )


def test_muon_in_float32_steps_as_the_library_does_in_bfloat16() -> None:
    steps = []
    for kind in (MuonInFloat32, pytorch_optimizer.Muon):
        weight = torch.zeros(6, 8, requires_grad=True)
        weight.grad = torch.randn(6, 8, generator=generator(1, "task"))
        kind([{"params": [weight], "lr": 1.0, "use_muon": True}]).step()
        steps.append(weight.detach().double().numpy())
    ours, library = steps
    # bfloat16 rounds to 2⁻⁸, in each of 5 iterations of three products; near 1, where the singular
    # values end, the iteration's slope is below 1.7 in absolute value and errors do not grow.
    assert np.linalg.norm(ours - library, 2) < 5 * 3 * 1.7 * 2**-8
    # Jordan et al. (2024): five iterations take the singular values into about [0.7, 1.2]
    values = np.linalg.svd(ours, compute_uv=False)
    assert np.abs(values - 0.95).max() < 0.3


@pytest.mark.parametrize(("widths", "moved"), [((5, 7, 6, 3), [0, 2]), ((5, 3), [0])])
def test_muon_moves_the_hidden_matrices_and_adamw_the_rest(
    widths: tuple[int, ...], moved: list[int]
) -> None:
    model = mlp(widths, seed=0)
    optimizer = Muon().build(model, _problem())
    params = list(model.parameters())
    groups = {group["use_muon"]: group["params"] for group in optimizer.param_groups}
    assert [i for i, p in enumerate(params) if any(p is one for one in groups[True])] == moved
    assert len(groups[True]) + len(groups[False]) == len(params)
