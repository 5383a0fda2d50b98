"""The amortization gap, against the oracle's minima of Q̂ over every form that is linear in φ."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import apo_core as apo
from reference.arrays import Array
from reference.curvature import fsd_hessian
from reference.discrepancies import SquaredEuclidean
from reference.losses import SquaredError
from reference.meta_objective import approximate_meta_objective, proximity_matrix
from reference.networks import MLP
from reference.optimal_preconditioners import dense, diagonal, per_layer, scalar
from reference.problem import Problem
from verification import bridge
from verification.engine.scenes import Quadratic, scene
from verification.l2_optima.solving import nearly_white_gradient_sets
from verification.profiles import share
from verification.tolerances import FUNCTION, ROUNDING, assert_close

PROBLEM = Problem(MLP([2, 2, 1], "tanh"), SquaredError())
SIZE = PROBLEM.network.size
EPS = float(np.finfo(float).eps)

RULES: dict[str, Callable[[nn.Module], apo.UpdateRule]] = {
    "scalar": lambda model: apo.rules.SGD(model, 0.3),
    "any optimizer": lambda model: apo.rules.LearningRate(
        model, torch.optim.SGD(model.parameters(), lr=0.3)
    ),
    "per layer": lambda model: apo.rules.SGD(model, 0.3, per_layer=True),
    "diagonal": lambda model: apo.rules.Preconditioned(model, apo.Diagonal, 0.5),
    "dense": lambda model: apo.rules.Preconditioned(model, apo.Dense, 0.5),
}


def optimum_of(name: str, gradients: Array, M: Array) -> Array:
    """The oracle's P*, (n, n)."""
    if name in ("scalar", "any optimizer"):
        return scalar(gradients, M).P
    if name == "per layer":
        return per_layer(gradients, M, PROBLEM.network.layers).P
    return diagonal(gradients, M).P if name == "diagonal" else dense(gradients, M).P


class Setting:
    """A network at θ with mini-batches of the given gradients, a common B', and an APO."""

    def __init__(self, rule: str, seed: int, fsd_weight: float, gradients: Array) -> None:
        rng = np.random.default_rng(seed)
        theta, inputs = rng.standard_normal(SIZE), rng.standard_normal((4, 2))
        self.model = bridge.twin(PROBLEM.network, theta)
        G = fsd_hessian(PROBLEM.network, SquaredEuclidean(), theta, inputs)
        self.gradients, self.M = gradients, proximity_matrix(G, fsd_weight, 1.0)
        self.P = optimum_of(rule, gradients, self.M)
        built = RULES[rule](self.model)
        objective = apo.ProximalObjective("squared_error", fsd_weight, 1.0)
        meta_optimizer = torch.optim.SGD(built.parameters(), lr=0.1)
        self.optimizer = apo.APO(self.model, built, objective, meta_optimizer)
        outputs = bridge.outputs_closure(self.model, inputs)
        self.batches = [(self.loss(g), outputs) for g in gradients]

    def loss(self, g: Array) -> Callable[[], Tensor]:
        """⟨g, θ⟩, of which g is the gradient everywhere."""
        slopes = bridge.to_tensors(g, PROBLEM.network)
        params = list(self.model.parameters())
        return lambda: torch.stack(
            [(s * p).sum() for s, p in zip(slopes, params, strict=True)]
        ).sum()

    def expected(self, P: Array) -> float:
        """Q̂ at P by the oracle."""
        return float(approximate_meta_objective(P, self.gradients, self.M))

    def magnitude(self, P: Array) -> float:
        """What Q̂ at P adds up, in absolute terms."""
        g = np.abs(self.gradients)
        steps = g @ np.abs(P).T
        return float(np.mean(np.sum(g * steps, 1) + np.sum(steps * (steps @ np.abs(self.M)), 1)))


@pytest.mark.parametrize("rule", RULES)
@given(
    data=st.data(), seed=st.integers(0, 2**16), fsd_weight=st.floats(0.0, 3.0), few=st.booleans()
)
@share(0.05)
def test_the_gap_is_to_the_oracles_minimum(
    rule: str, data: st.DataObject, seed: int, fsd_weight: float, few: bool
) -> None:
    """Also of few mini-batches, where many P attain the minimum."""
    gradients = data.draw(nearly_white_gradient_sets(SIZE), label="gradients")
    if few and rule not in ("diagonal", "per layer"):  # whose optimum may then be negative
        gradients = gradients[:2]
    s = Setting(rule, seed, fsd_weight, gradients)
    found = apo.amortization_gap(s.optimizer, s.batches)
    start = 0.25 if rule in ("diagonal", "dense") else 0.3
    P = start * np.eye(SIZE)
    assert found.converged
    # A round of L-BFGS stops where nothing lower is seen: √n of the rounding of Q̂ above the
    # minimum, beside n on either side.
    for got, expected, matrix, what in (
        (found.q, s.expected(P), P, "Q̂"),
        (found.best, s.expected(s.P), s.P, "min Q̂"),
        (found.gap, s.expected(P) - s.expected(s.P), P, "gap"),
    ):
        scale = s.magnitude(matrix) + s.magnitude(s.P)
        assert_close(got, expected, FUNCTION, size=SIZE, iterations=3, scale=scale, what=what)


@given(data=st.data(), seed=st.integers(0, 2**16), t=st.floats(0.1, 3.0))
@share(0.1)
def test_the_gap_of_a_scaled_rate_is_a_parabola(data: st.DataObject, seed: int, t: float) -> None:
    """Q̂(tη*) − Q̂* = (t − 1)² |Q̂*|."""
    gradients = data.draw(nearly_white_gradient_sets(SIZE), label="gradients")[:3]
    s = Setting("scalar", seed, 1.0, gradients)
    (log_lr,) = s.optimizer.rule.parameters()
    with torch.no_grad():
        log_lr.fill_(math.log(t * s.P[0, 0]))
    found = apo.amortization_gap(s.optimizer, s.batches)
    assert_close(
        found.gap,
        (t - 1) ** 2 * abs(s.expected(s.P)),
        FUNCTION,
        size=SIZE,
        iterations=3,
        scale=(1 + t) ** 2 * s.magnitude(s.P),
        what="gap",
    )


@pytest.mark.parametrize("rule", RULES)
def test_there_is_no_gap_at_the_optimum(rule: str) -> None:
    gradients = math.sqrt(SIZE) * np.eye(SIZE)
    s = Setting(rule, 1, 1.0, gradients)
    first = apo.amortization_gap(s.optimizer, s.batches)
    s.optimizer.rule.load_state_dict(first.phi, strict=False)
    second = apo.amortization_gap(s.optimizer, s.batches)
    assert first.gap > 0.0
    assert second.q == first.best
    assert 0.0 <= second.gap <= 3 * (SIZE + 8) * EPS * s.magnitude(s.P)


@pytest.mark.parametrize("rule", ["sgd", "heavy ball ahead", "adamw", "any optimizer", "ekfac"])
@pytest.mark.parametrize("exact", [False, True])
def test_measuring_leaves_no_trace(rule: str, exact: bool) -> None:
    """Neither in θ, `.grad`, buffers, φ, the rule's memory, nor the random state."""
    s = scene(rule)
    s.run(2)
    s.backward()
    optimizer = s.optimizer

    def trace() -> list[Tensor]:
        held = [t for ts in optimizer.rule_state.values() for t in ts]
        held += [*s.model.buffers(), *optimizer.rule.parameters(), *s.model.parameters()]
        held += [
            p.grad
            for p in [*s.model.parameters(), *optimizer.rule.parameters()]
            if p.grad is not None
        ]
        return [*(t.detach().clone() for t in held), torch.get_rng_state()]

    before, grads = trace(), [p.grad for p in s.model.parameters()]
    counters = (optimizer.meta_steps, optimizer.skipped_meta_steps)
    objective = optimizer.objective if exact else None
    found = apo.amortization_gap(optimizer, [(s.loss, s.outputs)] * 2, steps=5, objective=objective)
    assert found.gap > 0.0
    assert all(map(torch.equal, before, trace()))
    assert all(p.grad is g for p, g in zip(s.model.parameters(), grads, strict=True))
    assert counters == (optimizer.meta_steps, optimizer.skipped_meta_steps)


@pytest.mark.parametrize("exact", [False, True])
def test_q_is_what_a_meta_step_reports(exact: bool) -> None:
    """With dropout: every pass starts from the random state that a meta-step would start from."""
    mode: tuple[Any, Any] = ("exact", "exact") if exact else ("linear", "quadratic")
    s = scene("adamw", objective=apo.ProximalObjective("kl", 0.3, 0.1, *mode))
    s.run(1)
    state = torch.get_rng_state()
    s.backward()
    torch.set_rng_state(state)
    terms = s.optimizer.meta_backward(loss=s.loss, outputs=s.outputs)
    objective = s.optimizer.objective if exact else None
    found = apo.amortization_gap(s.optimizer, [(s.loss, s.outputs)], steps=1, objective=objective)
    assert_close(found.q, float(terms.total), ROUNDING, size=6, scale=1.0, what="Q")


def test_a_few_steps_do_not_converge_and_do_not_lie() -> None:
    gradients = math.sqrt(SIZE) * np.eye(SIZE)[:4]
    s = Setting("dense", 2, 3.0, gradients)
    some = apo.amortization_gap(s.optimizer, s.batches, steps=2)
    all_of_it = apo.amortization_gap(s.optimizer, s.batches)
    assert not some.converged
    assert all_of_it.converged
    assert 0.0 < some.gap < all_of_it.gap


def test_a_parameter_that_a_mini_batch_does_not_reach_stays() -> None:
    """As in a step: no weight decay either. Q̂ is that of the other parameter alone."""
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in "ab"}).double()
    rule = apo.rules.Adam(model, 0.1, weight_decay=0.5)
    objective = apo.ProximalObjective(wsd_weight=1.0)
    optimizer = apo.APO(model, rule, objective, torch.optim.SGD(rule.parameters(), lr=0.1))
    found = apo.amortization_gap(optimizer, [(lambda: model["a"].sum(), None)], steps=1)
    step = -0.1 * (1.0 / (1.0 + 1e-8) + 0.5)  # Adam's first: ∓η, and the decay, twice
    assert_close(found.q, 2 * (step + 0.5 * step**2), FUNCTION, iterations=3, what="Q̂")


def test_bad_arguments() -> None:
    s = scene()
    pairs = [(s.loss, s.outputs)]
    message = "`optimizer` must be an apo_core.APO, got SGD"
    with pytest.raises(TypeError, match=message):
        apo.amortization_gap(torch.optim.SGD(s.model.parameters(), lr=0.1), pairs)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="`batches` must hold at least one pair of closures, got"):
        apo.amortization_gap(s.optimizer, [])
    with pytest.raises(ValueError, match="`steps` must be an integer of at least 1, got 0"):
        apo.amortization_gap(s.optimizer, pairs, steps=0)
    s.x_other[0, 0, 0, 0] = math.nan
    message = "`batches` must give a finite objective at the present φ, got inf; check the mini-"
    with pytest.raises(ValueError, match=message):
        apo.amortization_gap(s.optimizer, pairs)


def test_a_sharded_model_is_refused() -> None:
    s = scene()
    weight = s.model.get_parameter("0.weight")
    setattr(weight, "full_tensor", lambda: weight)  # noqa: B010, what tells a DTensor
    with pytest.raises(RuntimeError, match=r"`optimizer.model` must not be sharded, got DTensor"):
        apo.amortization_gap(s.optimizer, [(s.loss, s.outputs)])


def test_an_objective_that_diverges_on_the_way_is_measured_all_the_same() -> None:
    """A rate whose first trial overflows: no warning, and never above where it began."""
    model = Quadratic([1e150, 1.0])
    rule = apo.rules.SGD(model, lr=1e-160)
    optimizer = apo.APO(
        model, rule, apo.ProximalObjective(), torch.optim.SGD(rule.parameters(), lr=0.1)
    )
    found = apo.amortization_gap(
        optimizer, [(model.loss, None)], objective=optimizer.objective, steps=100
    )
    assert math.isfinite(found.best)
    assert found.gap >= 0.0


def test_a_search_that_ends_at_a_wall_has_not_converged() -> None:
    """Q falls towards θ' = 0.4 and is infinite below: every trial of the search meets the wall."""
    model = Quadratic([1.0])
    with torch.no_grad():
        model.theta.fill_(0.9)

    def loss() -> Tensor:
        square = 100.0 * model.theta.square().sum()
        return torch.where(model.theta.sum() > 0.4, square, torch.inf)

    rule = apo.rules.SGD(model, (0.5 - 1e-9) / 180.0)  # θ' = θ − η·180
    optimizer = apo.APO(
        model, rule, apo.ProximalObjective(), torch.optim.SGD(rule.parameters(), lr=0.1)
    )
    found = apo.amortization_gap(optimizer, [(loss, None)], objective=optimizer.objective)
    assert found.gap == pytest.approx(0.0, abs=1e-6)
    assert not found.converged
