"""P18's recipes: torch's optimizers where φ is frozen, and what they learn is what they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import apo_core as apo
from experiments.apo_recipes import (
    APOKFAC,
    APOSGD,
    Amortized,
    APORMSprop,
    FixedKFAC,
)
from experiments.models import mlp
from experiments.problems import Batch, Problem, Stream, Supervised
from experiments.recipes import SGD, Adam, Nesterov, Recipe, RMSprop, hyperparameters, recipe
from experiments.seeds import generator
from experiments.training import train
from verification.tolerances import FUNCTION, assert_close

WIDTHS = (4, 6, 3)
LAYERS = ("0", "2")
EXAMPLES, BATCH = 30, 10
RECIPES: tuple[Recipe, ...] = (
    Nesterov(0.1),
    RMSprop(1e-3),
    APOSGD(0.1, 1e-3, momentum=0.9, trust_factor=1.1),
    APOSGD(0.1, 1e-3, per_layer=True),
    APORMSprop(3e-4, 1e-5, learn="lr+rho+eps"),
    APORMSprop(3e-4, 1e-5, per_layer=True, interval=1, meta_lr=1e-3),
    APOKFAC(1e-3, 0.1),
    FixedKFAC(1e-3),
)


class _Counted(Problem):
    """A problem that counts the mini-batches of each stream."""

    loss_name = "cross_entropy"

    def __init__(self) -> None:
        source = generator(7, "task")
        inputs = torch.randn(EXAMPLES, WIDTHS[0], generator=source, dtype=torch.float64)
        data = inputs, torch.randint(0, WIDTHS[-1], (EXAMPLES,), generator=source)
        self.inner = Supervised(
            data, data, "cross_entropy", batch_size=BATCH, seed=0, curvature_size=BATCH
        )
        self.drawn: dict[str, int] = {}

    def batch(self, stream: Stream) -> Batch:
        """The next, counted."""
        self.drawn[stream] = self.drawn.get(stream, 0) + 1
        return self.inner.batch(stream)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss."""
        return self.inner.loss(model, batch)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The network's outputs."""
        return self.inner.outputs(model, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The training loss."""
        return self.inner.evaluate(model)


def _network() -> nn.Sequential:
    return mlp(WIDTHS, seed=1, dtype=torch.float64)


def _trained(one: Recipe, steps: int) -> tuple[Tensor, dict[str, float], _Counted]:
    """θ in one vector, the hyperparameters, and the problem, after some steps."""
    model, problem = _network(), _Counted()
    optimizer = one.build(model, problem)
    train(model, optimizer, problem, steps=steps, record_every=steps)
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return theta, hyperparameters(optimizer), problem


@pytest.mark.parametrize("one", RECIPES, ids=lambda one: one.slug())
def test_a_recipe_comes_back_from_its_options(one: Recipe) -> None:
    assert recipe(one.options()) == one


@pytest.mark.parametrize("one", RECIPES, ids=lambda one: one.slug())
def test_a_recipe_moves_and_repeats(one: Recipe) -> None:
    first, found, _ = _trained(one, 12)
    torch.rand(3)  # the global random state has no say
    second, again, _ = _trained(one, 12)
    start = torch.cat([p.detach().reshape(-1) for p in _network().parameters()])
    assert torch.equal(first, second)
    assert found == again
    assert not torch.equal(first, start)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (APOSGD(0.1, 0.5, meta_lr=0.0), SGD(0.1)),
        (APOSGD(0.1, 0.5, meta_lr=0.0, per_layer=True), SGD(0.1)),
        (APOSGD(0.1, 0.5, meta_lr=0.0, momentum=0.9), Nesterov(0.1)),
        (APORMSprop(1e-3, 0.5, meta_lr=0.0), RMSprop(1e-3)),
        (APORMSprop(1e-3, 0.5, meta_lr=0.0, learn="lr+rho+eps"), RMSprop(1e-3)),
    ],
    ids=lambda one: one.slug(),
)
def test_without_a_meta_learning_rate_it_is_torchs_optimizer(ours: Recipe, theirs: Recipe) -> None:
    # The rate is exp(log η). Two steps: the second gradient differs by at most ηL < 1 times what
    # the first step did, so that the errors of both at most double.
    mine, torchs = _trained(ours, 2)[0], _trained(theirs, 2)[0]
    assert_close(mine.numpy(), torchs.numpy(), FUNCTION, condition=2, size=BATCH, iterations=2)
    assert not torch.equal(mine, _trained(Adam(1e-2), 2)[0])


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (SGD(0.1), {"learning_rate": 0.1}),
        (APOSGD(0.1), {"learning_rate": 0.1}),
        (APOSGD(0.1, per_layer=True), {f"learning_rate/{name}": 0.1 for name in LAYERS}),
        (APORMSprop(0.1), {"learning_rate": 0.1}),
        (APORMSprop(0.1, learn="lr+rho"), {"learning_rate": 0.1, "rho": 0.5}),
        (
            APORMSprop(0.1, learn="lr+rho+eps"),
            {"learning_rate": 0.1, "rho": 0.5, "eps": 1e-8},
        ),
        (
            APORMSprop(0.1, learn="lr+rho", per_layer=True),
            {
                f"{name}/{layer}": value
                for name, value in (("learning_rate", 0.1), ("rho", 0.5))
                for layer in LAYERS
            },
        ),
        (APOKFAC(0.1, damping=0.01), {"learning_rate": 0.1, "damping": 0.01}),
        (APOKFAC(0.1, learn="lr"), {"learning_rate": 0.1}),
        (FixedKFAC(0.1, damping=0.01), {"learning_rate": 0.1, "damping": 0.01}),
    ],
    ids=lambda one: one.slug() if isinstance(one, Recipe) else "",
)
def test_the_hyperparameters_are_found_by_name(one: Recipe, expected: dict[str, float]) -> None:
    found = hyperparameters(one.build(_network(), _Counted()))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # exp amplifies the relative error of log ε = −18.4 by as much
        assert_close(found[name], value, FUNCTION, condition=20, what=name)


@pytest.mark.parametrize("one", [o for o in RECIPES if isinstance(o, Amortized)], ids=Recipe.slug)
def test_all_that_is_learned_moves(one: Amortized) -> None:
    before = hyperparameters(one.build(_network(), _Counted()))
    after = _trained(one, 12)[1]
    assert all(after[name] != value for name, value in before.items())


def test_the_options_reach_the_optimizer() -> None:
    one = APOSGD(0.1, 0.2, meta_lr=0.3, interval=7, trust_factor=1.5)
    built = one.build(_network(), _Counted())
    assert isinstance(built, apo.APO)
    assert built.objective.fsd_weight == 0.2
    assert built.objective.trust_factor == 1.5
    assert built.interval == 7
    assert built.meta_optimizer.param_groups[0]["lr"] == 0.3
    assert one.text() == "η₀ = 0.1, λ_FSD = 0.2, K = 7, α = 0.3, κ = 1.5"


@pytest.mark.parametrize("one", [APOKFAC(1e-3, 0.1), FixedKFAC(1e-3)], ids=Recipe.slug)
def test_kfac_sees_a_mini_batch_at_the_start_and_every_ten_steps(one: Recipe) -> None:
    for steps, seen in ((29, 1 + 2), (30, 1 + 3)):
        _, _, problem = _trained(one, steps)
        assert problem.drawn == {**problem.drawn, "loss": steps, "curvature": seen}


def test_fixed_kfac_keeps_its_learning_rate_and_damping() -> None:
    one = FixedKFAC(1e-3, 0.01)
    start = hyperparameters(one.build(_network(), _Counted()))
    assert _trained(one, 25)[1] == start
