"""torch.compile of the model and of the rule's update: the same numbers, and no recompilation.

By the backend "aot_eager", which traces, guards and differentiates as the default one does, and
runs the graphs without the minute that a C++ compiler takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import apo_core as apo
from verification.engine.scenes import RULES, values
from verification.tolerances import ROUNDING, assert_close

STEPS = 6
COMPILED = ["nesterov", "rmsprop", "adamw", "dense", "ekfac"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graphs of another test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def network() -> nn.Sequential:
    """A classifier with BatchNorm."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


def train(rule: str, compiled: bool) -> list[Tensor]:
    """θ, φ and the buffers after six steps; compiled, from the fourth on with all graphs there.

    Two meta-steps, and a step without one, come before: a graph with φ's derivatives, and one
    without.
    """
    model = network()
    built = RULES[rule](model)
    forward: nn.Module = model
    if compiled:
        forward = torch.compile(model, backend="aot_eager")  # pyright: ignore[reportAssignmentType]
        built.compile(backend="aot_eager")
    optimizer = apo.APO(
        forward,
        built,
        apo.ProximalObjective("kl", 0.3, 0.1),
        torch.optim.SGD(built.parameters(), lr=0.01),
        interval=2,
    )
    generator = torch.Generator().manual_seed(1)
    x, other = torch.randn(2, STEPS, 8, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (STEPS, 8), generator=generator)
    for t in range(STEPS):

        def loss(t: int = t) -> Tensor:
            return cross_entropy(forward(x[t]), y[t])

        with torch.compiler.set_stance("fail_on_recompile" if t > 2 else "default"):
            optimizer.zero_grad()
            loss().backward()
            if optimizer.meta_due:
                optimizer.meta_step(loss=loss, outputs=lambda t=t: forward(other[t]))
            optimizer.step()
    return [*values(model), *values(built), *(b.double() for b in model.buffers())]


@pytest.mark.parametrize("rule", COMPILED)
def test_a_compiled_run_is_the_run_and_compiles_no_more_after_two_meta_steps(rule: str) -> None:
    together, alone = (
        torch.cat([t.flatten() for t in train(rule, compiled)]) for compiled in (True, False)
    )
    # Fused kernels round in another order; each step carries that on by a factor near 1.
    assert_close(together.numpy(), alone.numpy(), ROUNDING, iterations=STEPS, size=40, what="run")


@pytest.mark.parametrize("mode", [{"loss": "quadratic"}, {"fsd": "quadratic"}])
def test_what_needs_a_second_derivative_is_right_or_refused(mode: dict[str, str]) -> None:
    """AOTAutograd has one derivative: torch says so, or (2.11) differentiates the eager graph."""
    terms = []
    for compiled in (False, True):
        model = network().eval()
        forward: Any = torch.compile(model, backend="aot_eager") if compiled else model
        rule = apo.rules.SGD(model, 0.1)
        objective = apo.ProximalObjective("kl", 0.3, 0.1, **mode)  # pyright: ignore[reportArgumentType]
        optimizer = apo.APO(model, rule, objective, torch.optim.SGD(rule.parameters(), lr=0.1))
        x = torch.linspace(-1.0, 1.0, 24, dtype=torch.float64).reshape(6, 4)

        def loss(forward: Any = forward, x: Tensor = x) -> Tensor:
            return cross_entropy(forward(x), torch.arange(6) % 3)

        loss().backward()
        try:
            found = optimizer.meta_step(loss=loss, outputs=lambda f=forward, x=x: f(-x))
        except RuntimeError as error:
            assert compiled
            refusal = str(error)  # by torch, in one of two ways
            assert "double backward" in refusal or "create_graph" in refusal
            return
        assert rule.log_lr.grad is not None
        terms.append(torch.stack([*found, rule.log_lr.grad]))
    assert_close(terms[1].numpy(), terms[0].numpy(), ROUNDING, size=60, iterations=4, what="Q")


def test_K_FAC_observes_a_compiled_model() -> None:
    """Its hooks are put on inside the block, and must not be overlooked by a graph without them."""
    factors = []
    for compiled in (False, True):
        model = network().eval()
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        rule = apo.rules.KFAC(model)
        x = torch.linspace(-1.0, 1.0, 24, dtype=torch.float64).reshape(6, 4)
        cross_entropy(forward(x), torch.arange(6) % 3).backward()  # a graph without hooks
        with rule.observe(model):
            cross_entropy(forward(x), torch.arange(6) % 3).backward()
        factors.append(torch.cat([b.double().flatten() for b in rule.buffers()]))
    assert_close(factors[1].numpy(), factors[0].numpy(), ROUNDING, size=60, iterations=2, what="A")
