"""The training loop: the loop that one would write; it repeats, and says when a run failed."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Literal, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.apo_recipes import APOSGD
from experiments.models import Rosenbrock, mlp
from experiments.problems import Supervised
from experiments.recipes import (
    KFAC,
    SGD,
    Adam,
    APOLearningRate,
    APOPrecond,
    Recipe,
    Shampoo,
)
from experiments.records import Outcome
from experiments.seeds import Purpose, generator
from experiments.training import train
from verification.tolerances import FUNCTION, ROUNDING, assert_close

WIDTHS = (5, 7, 3)
EXAMPLES, BATCH = 50, 16  # four mini-batches an epoch, the last of 2
RECIPES: tuple[Recipe, ...] = (
    SGD(0.1, momentum=0.9),
    Adam(1e-3),
    KFAC(0.01, 0.1),
    Shampoo(0.1),
    APOLearningRate(0.1, fsd_weight=0.1, interval=3),
    APOPrecond(0.1, meta_lr=1e-3, fsd_weight=0.1, wsd_weight=0.1, warmup_steps=4, interval=3),
)


def _data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    source = generator(7, "task")
    inputs = torch.randn(EXAMPLES, WIDTHS[0], generator=source, dtype=dtype)
    return inputs, torch.randint(0, WIDTHS[-1], (EXAMPLES,), generator=source)


def _problem(order: int, dtype: torch.dtype = torch.float32) -> Supervised:
    return Supervised(_data(dtype), _data(dtype), "cross_entropy", batch_size=BATCH, seed=order)


def _run(
    recipe: Recipe, *, initial: int = 0, order: int = 0, steps: int = 12, **how: int
) -> Outcome:
    model, problem = mlp(WIDTHS, seed=initial), _problem(order)
    optimizer = recipe.build(model, problem)
    return train(model, optimizer, problem, steps=steps, record_every=3, **how)  # type: ignore[arg-type]


def _same(left: list[float], right: list[float]) -> bool:
    """Bit for bit, a NaN equal to a NaN."""
    return np.array_equal(left, right, equal_nan=True)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_with_sgd_it_is_the_hand_written_loop_bit_for_bit(momentum: float) -> None:
    steps = 11
    model, problem = mlp(WIDTHS, seed=3), _problem(order=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=momentum)
    outcome = train(model, optimizer, problem, steps=steps, record_every=1)

    twin = mlp(WIDTHS, seed=3)
    by_hand = torch.optim.SGD(twin.parameters(), lr=0.3, momentum=momentum)
    inputs, labels = _data()
    order, losses = generator(5, "loss"), [F.cross_entropy(twin(inputs), labels).item()]
    batches: list[Tensor] = []
    for _ in range(steps):
        batches = batches or list(torch.randperm(EXAMPLES, generator=order).split(BATCH))
        chosen = batches.pop(0)
        by_hand.zero_grad()
        F.cross_entropy(twin(inputs[chosen]), labels[chosen]).backward()
        by_hand.step()
        losses.append(F.cross_entropy(twin(inputs), labels).item())

    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert outcome.curves["loss"] == losses
    assert outcome.metrics["loss"] == losses[-1]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_equal_seeds_give_equal_curves(recipe: Recipe) -> None:
    first = _run(recipe)
    torch.rand(3)  # the global random state has no say
    second = _run(recipe)
    assert first.curves.keys() == second.curves.keys()
    for name in first.curves.keys() - {"seconds"}:  # which are the machine's
        values = first.curves[name]
        assert _same(values, second.curves[name]), f"curve {name}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_a_run_leaves_the_global_random_state_alone(recipe: Recipe) -> None:
    before = torch.get_rng_state()
    _run(recipe)
    assert torch.equal(before, torch.get_rng_state())


def test_initial_weights_and_order_have_seeds_of_their_own() -> None:
    runs = {
        seeds: _run(SGD(0.1), initial=seeds[0], order=seeds[1]) for seeds in product((0, 1), (0, 1))
    }
    starts = {seeds: run.curves["loss"][0] for seeds, run in runs.items()}
    ends = {seeds: run.curves["loss"][-1] for seeds, run in runs.items()}
    assert starts[0, 0] == starts[0, 1] != starts[1, 0] == starts[1, 1]
    assert len(set(ends.values())) == 4


def test_the_meta_step_takes_its_loss_on_B_and_its_discrepancy_on_another_B() -> None:
    lr, weight = 0.5, 0.1
    model, problem = mlp(WIDTHS, seed=0, dtype=torch.float64), _problem(0, torch.float64)
    twin = mlp(WIDTHS, seed=0, dtype=torch.float64)
    recipe = APOLearningRate(lr, fsd_weight=weight)
    outcome = train(model, recipe.build(model, problem), problem, steps=1, record_every=1)

    inputs, labels = _data(torch.float64)
    first, other = (
        torch.randperm(EXAMPLES, generator=generator(0, stream))[:BATCH]
        for stream in ("loss", "discrepancy")
    )
    before = twin(inputs[other]).log_softmax(1).detach()
    F.cross_entropy(twin(inputs[first]), labels[first]).backward()
    with torch.no_grad():
        for p in twin.parameters():
            assert p.grad is not None
            p -= lr * p.grad
        loss = F.cross_entropy(twin(inputs[first]), labels[first])
        after = twin(inputs[other]).log_softmax(1)
        divergence = (after.exp() * (after - before)).sum(1).mean()
    assert_close(outcome.curves["q_loss"][-1], loss.item(), FUNCTION, size=WIDTHS[1] + BATCH)
    assert_close(
        outcome.curves["q_fsd"][-1],
        weight * divergence.item(),
        FUNCTION,
        size=WIDTHS[1] + BATCH,
        scale=weight,  # a difference of log-probabilities of order 1
    )


def test_drawing_the_other_mini_batch_does_not_change_the_first() -> None:
    # φ stands still at η = 1 = exp(0), exactly; so APO's steps are those of SGD with lr = 1
    apo = _run(APOLearningRate(1.0, fsd_weight=0.1, meta_lr=0.0, interval=2))
    sgd = _run(SGD(1.0))
    assert apo.curves["loss"] == sgd.curves["loss"]


@pytest.mark.parametrize("structure", ["EKFAC", "Diagonal", "Dense"])
def test_a_frozen_preconditioner_is_a_learning_rate(
    structure: Literal["EKFAC", "Diagonal", "Dense"],
) -> None:
    # P₀ = 0.25 I: powers of 2 and products with 0 and 1 round nothing, so no bit may differ
    apo = _run(APOPrecond(0.25, meta_lr=0.0, update_scale=1.0, structure=structure))
    sgd = _run(SGD(0.25))
    assert apo.curves["loss"] == sgd.curves["loss"]


def test_each_purpose_has_a_stream_of_its_own() -> None:
    draws = {float(torch.rand((), generator=generator(0, name))) for name in get_args(Purpose)}
    assert len(draws) == len(get_args(Purpose))


def test_an_epoch_shows_every_example_once() -> None:
    inputs = torch.arange(EXAMPLES, dtype=torch.float32)[:, None]
    train_part = (inputs, torch.zeros(EXAMPLES, dtype=torch.int64))
    problem = Supervised(train_part, train_part, "cross_entropy", batch_size=BATCH, seed=0)
    assert problem.steps_per_epoch == 4
    epochs = [
        torch.cat([problem.batch("loss")[0] for _ in range(problem.steps_per_epoch)])
        for _ in range(2)
    ]
    for epoch in epochs:
        assert torch.equal(epoch.sort(dim=0).values, inputs)
    assert not torch.equal(*epochs)


def test_the_curves_stand_at_every_interval_and_at_the_end() -> None:
    outcome = _run(RECIPES[-1], steps=10)
    assert outcome.curves["step"] == [0.0, 3.0, 6.0, 9.0, 10.0]
    assert {len(values) for values in outcome.curves.values()} == {5}
    assert outcome.metrics["steps"] == 10.0
    for name in ("q_loss", "q_fsd", "q_wsd", "meta_gradient"):
        values = outcome.curves[name]
        assert math.isnan(values[0])
        assert all(value > 0.0 for value in values[1:]), name


@pytest.mark.parametrize(
    ("fsd_weight", "trust_factor", "meta_step"),
    [(0.1, None, 7), (0.0, None, 3), (0.1, 2.0, 11), (0.0, 2.0, 5)],
)
def test_passes_are_counted_as_a_hook_counts_them(
    fsd_weight: float, trust_factor: float | None, meta_step: int
) -> None:
    model, problem = mlp(WIDTHS, seed=0), _problem(0)
    counted = {"forward": 0, "backward": 0}
    training = {"on": True}

    def count(kind: str) -> None:
        counted[kind] += training["on"]

    def hook(network: nn.Module, inputs: object, outputs: Tensor) -> None:
        count("forward")
        if outputs.requires_grad:
            outputs.register_hook(lambda gradient: count("backward"))

    model.register_forward_hook(hook)
    evaluate = problem.evaluate

    def uncounted(network: nn.Module) -> dict[str, float]:
        training["on"] = False
        values = evaluate(network)
        training["on"] = True
        return values

    problem.evaluate = uncounted  # type: ignore[method-assign]
    # steps and moves so short that none is halved
    recipe = APOSGD(1e-3, fsd_weight, meta_lr=1e-3, interval=3, trust_factor=trust_factor)
    outcome = train(model, recipe.build(model, problem), problem, steps=7, record_every=1)
    passes = outcome.curves["passes"]
    assert passes[-1] == counted["forward"] + 2 * counted["backward"]
    assert outcome.metrics["passes"] == passes[-1]
    assert set(np.diff(passes)) == {3, 3 + meta_step}


def test_the_seconds_of_a_curve_are_those_of_steps_and_meta_steps() -> None:
    outcome = _run(RECIPES[-1], steps=9)
    seconds, metrics = outcome.curves["seconds"], outcome.metrics
    assert seconds[0] == 0.0
    assert all(before < after for before, after in pairwise(seconds))
    whole = metrics["training_seconds"] + metrics["meta_seconds"]
    assert_close(seconds[-1], whole, ROUNDING, size=9)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_meter_of_memory_changes_nothing(recipe: Recipe) -> None:
    metered, alone = _run(recipe), _run(recipe, metered_steps=0)
    for name in alone.curves.keys() - {"seconds"}:
        assert _same(alone.curves[name], metered.curves[name]), name
    held = sum(p.nbytes for p in mlp(WIDTHS, seed=0).parameters())
    assert metered.metrics["peak_bytes"] > 2 * held  # parameters and gradients, and what they need
    assert alone.metrics["peak_bytes"] >= held


def test_momentum_holds_as_many_bytes_as_the_parameters() -> None:
    without, momentum = (_run(SGD(0.1, momentum=mu)).metrics["peak_bytes"] for mu in (0.0, 0.9))
    assert momentum - without == sum(p.nbytes for p in mlp(WIDTHS, seed=0).parameters())


def test_the_step_ratio_of_sgd_is_its_learning_rate() -> None:
    model, problem = mlp(WIDTHS, seed=0, dtype=torch.float64), _problem(0, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    outcome = train(model, optimizer, problem, steps=3, record_every=1)
    assert outcome.curves["learning_rate"] == [0.125] * 4
    # Δθ is a difference of parameters: its rounding is relative to ‖θ‖, not to ‖Δθ‖
    size = sum(p.numel() for p in model.parameters())
    for ratio in outcome.curves["step_ratio"][1:]:
        assert_close(ratio, 0.125, ROUNDING, size=size, condition=1e3, what="step ratio")


@pytest.mark.parametrize(("recipe", "steps"), [(SGD(1e30), 40), (SGD(1e3, momentum=0.9), 400)])
def test_a_diverged_run_says_so(recipe: Recipe, steps: int) -> None:
    source = generator(0, "task")
    inputs = torch.randn(EXAMPLES, WIDTHS[0], generator=source)
    targets = torch.randn(EXAMPLES, WIDTHS[-1], generator=source)
    part = (inputs, targets)
    problem = Supervised(part, part, "squared_error", batch_size=BATCH, seed=0)
    model = mlp(WIDTHS, seed=0)
    outcome = train(model, recipe.build(model, problem), problem, steps=steps, record_every=1)
    assert outcome.metrics["loss"] == outcome.metrics["test"] == math.inf
    assert 0 < outcome.metrics["steps"] < steps
    assert outcome.curves["step"][-1] <= outcome.metrics["steps"]


class _Unfactorizable(torch.optim.SGD):
    """An optimizer whose third step meets a matrix that it cannot factorize."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls == 3:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return super().step(closure)


def test_a_failed_factorization_is_a_diverged_run() -> None:
    model, problem = mlp(WIDTHS, seed=0), _problem(0)
    optimizer = _Unfactorizable(model.parameters(), lr=0.1)
    outcome = train(model, optimizer, problem, steps=9, record_every=1)
    assert outcome.metrics["loss"] == math.inf
    assert outcome.metrics["steps"] == 2.0


def test_the_initial_weights_are_those_of_linear_layers() -> None:
    model = mlp((400, 300, 200), seed=1)
    layers = [module for module in model if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(400, 300), (300, 200)]
    for layer in layers:
        bound = layer.in_features**-0.5
        for parameter in layer.parameters():
            assert parameter.abs().max() <= bound
            # n uniform draws stay below 0.9 of the bound with probability 0.9^n < 1e-9
            assert parameter.abs().max() > 0.9 * bound
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_rosenbrock_is_the_papers_function() -> None:
    model = Rosenbrock((1.0, -1.5))
    value = model()
    value.backward()
    assert value.item() == 625.0  # 0² + 100 (−1.5 − 1)²
    assert model.point.grad is not None
    # −2(1 − x) − 400x(y − x²), 200(y − x²)
    assert model.point.grad.tolist() == [1000.0, -500.0]


@pytest.mark.parametrize("widths", [(), (3,)])
def test_a_network_needs_input_and_output(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`widths` must hold at least input and output"):
        mlp(widths, seed=0)


def test_a_seed_is_not_negative() -> None:
    with pytest.raises(ValueError, match=r"`seed` must be non-negative, got -1"):
        generator(-1, "loss")
