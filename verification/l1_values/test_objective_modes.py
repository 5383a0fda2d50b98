"""The objective's other forms: the quadratic loss, scheduled weights, and P22 eq. 13 and eq. 14."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

import apo_core as apo
from reference import meta_gradients
from verification import bridge
from verification.engine.scenes import Scene, scene, values
from verification.l1_values.scales import lookahead_gradient_error
from verification.l1_values.twins import engine
from verification.profiles import share
from verification.strategies import MetaCase, meta_cases
from verification.tolerances import FUNCTION, PROPAGATED, assert_close

LOSSES = ("exact", "linear", "quadratic")
FSDS = ("exact", "quadratic")


def objective(
    loss: Any, fsd: Any = "exact", fsd_weight: float = 0.3, wsd_weight: float = 0.1
) -> apo.ProximalObjective:
    """KL with weights, in the given modes."""
    return apo.ProximalObjective("kl", fsd_weight, wsd_weight, loss, fsd)


def dense_hessian(s: Scene) -> Tensor:
    """∇²J_B at θ, (n, n), by autograd on a functional copy, at the present random state."""
    params = dict(s.model.named_parameters())
    shapes = [p.shape for p in params.values()]
    sizes = [p.numel() for p in params.values()]
    state = torch.get_rng_state()

    def loss(theta: Tensor) -> Tensor:
        torch.set_rng_state(state)
        pieces = [t.view(shape) for t, shape in zip(theta.split(sizes), shapes, strict=True)]
        moved = dict(zip(params, pieces, strict=True))
        return cross_entropy(torch.func.functional_call(s.model, moved, (s.x,)), s.y)

    flat = torch.cat([p.detach().reshape(-1) for p in params.values()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    torch.set_rng_state(state)
    assert isinstance(hessian, Tensor)
    return hessian


@given(seed=st.integers(0, 2**16))
@share(0.1)
def test_the_quadratic_loss_has_the_dense_hessian_of_a_network_with_batchnorm_and_dropout(
    seed: int,
) -> None:
    """gᵀΔ + ½ΔᵀHΔ, and dQ/d(log η) = Δᵀ(g + HΔ) for Δ = −η g."""
    s = scene(seed=seed, objective=apo.ProximalObjective(loss="quadratic"))
    s.backward()
    g = torch.cat([p.grad.reshape(-1) for p in s.model.parameters() if p.grad is not None])
    step, H = -s.lr.detach() * g, dense_hessian(s)
    terms = s.optimizer.meta_backward(loss=s.loss)
    (log_lr,) = s.optimizer.rule.parameters()
    magnitudes = step.abs() @ (g.abs() + H.abs() @ step.abs())
    for got, expected, what in (
        (terms.loss, step @ g + 0.5 * step @ H @ step, "loss term"),
        (log_lr.grad, step @ g + step @ H @ step, "dQ/d(log η)"),
    ):
        assert got is not None
        assert_close(
            float(got),
            float(expected),
            FUNCTION,
            size=len(g),
            iterations=3 * len(s.model),  # layers: forward, backward, and once more
            scale=float(magnitudes),
            what=what,
        )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("fsd", FSDS)
def test_the_loss_term_has_one_dropout_mask_with_or_without_an_fsd(loss: str, fsd: str) -> None:
    """Every pass starts from the same random state, whatever ran before it."""
    terms = []
    for fsd_weight in (0.0, 0.3):
        s = scene(objective=objective(loss, fsd, fsd_weight))
        s.backward()
        terms.append(s.meta_step())
    assert terms[0].loss == terms[1].loss


def test_the_quadratic_loss_of_a_linear_loss_is_the_linear_one() -> None:
    """H = 0, of which autograd keeps no graph."""
    model = torch.nn.Linear(2, 1, dtype=torch.float64)
    x = torch.ones(3, 2, dtype=torch.float64)
    terms = []
    for loss in ("linear", "quadratic"):
        rule = apo.rules.SGD(model, lr=0.1)
        optimizer = apo.APO(
            model, rule, objective(loss, fsd_weight=0.0), torch.optim.SGD(rule.parameters(), lr=0.1)
        )
        optimizer.zero_grad()
        model(x).mean().backward()
        terms.append(optimizer.meta_step(loss=lambda: model(x).mean()))
    assert terms[0] == terms[1]


@pytest.mark.parametrize(("loss", "expected"), [("linear", []), ("quadratic", ["θ"])])
def test_an_expanded_loss_makes_no_pass_at_the_lookahead(loss: str, expected: list[str]) -> None:
    s = scene(objective=objective(loss, fsd_weight=0.0))
    s.backward()
    theta, seen = values(s.model), []

    def counted() -> Tensor:
        there = all(map(torch.equal, theta, s.model.parameters()))
        seen.append("θ" if there else "θ'")
        return s.loss()

    s.optimizer.meta_step(loss=counted)
    assert seen == expected


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("fsd", FSDS)
def test_no_graph_outlives_a_meta_step(loss: str, fsd: str) -> None:
    """What the closures returned is freed at once, by reference counts alone."""
    s = scene(objective=objective(loss, fsd))
    s.backward()
    returned: list[weakref.ref[Tensor]] = []

    def watched(value: Tensor) -> Tensor:
        returned.append(weakref.ref(value))
        return value

    s.optimizer.meta_step(loss=lambda: watched(s.loss()), outputs=lambda: watched(s.outputs()))
    assert returned
    assert all(ref() is None for ref in returned)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("fsd", FSDS)
@given(
    seed=st.integers(0, 2**16),
    weights=st.tuples(st.floats(0.0, 3.0), st.floats(0.0, 3.0)),
)
@share(0.25)
def test_a_weight_that_was_set_is_that_of_a_new_objective(
    loss: str, fsd: str, seed: int, weights: tuple[float, float]
) -> None:
    scheduled, built = objective(loss, fsd), objective(loss, fsd, *weights)
    scheduled.fsd_weight, scheduled.wsd_weight = weights
    terms, rates = [], []
    for Q in (scheduled, built):
        s = scene(seed=seed, objective=Q)
        s.backward()
        terms.append(s.meta_step())
        rates.append(s.lr.detach())
    assert terms[0] == terms[1]
    assert torch.equal(*rates)


@pytest.mark.parametrize("name", ["fsd_weight", "wsd_weight"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_bad_weight_is_refused_when_it_is_set(name: str, value: float) -> None:
    built = objective("exact")
    before = getattr(built, name)
    with pytest.raises(ValueError, match=f"`{name}` must be non-negative and finite, got {value}"):
        setattr(built, name, value)
    assert getattr(built, name) == before


def test_a_weight_set_to_zero_saves_the_passes() -> None:
    s = scene(objective=objective("exact"))
    s.optimizer.objective.fsd_weight = 0.0
    s.backward()
    assert s.optimizer.meta_step(loss=s.loss).fsd == 0.0


@pytest.mark.parametrize("equation", ["eq. 12", "eq. 13", "eq. 14"])
@given(case=meta_cases())
@share(0.5)
def test_the_mini_batches_of_each_equation_are_those_of_the_closures(
    equation: str, case: MetaCase
) -> None:
    """P22 appendix D: g is of B; eq. 13 takes the loss on B', eq. 14 the outputs on B."""
    ours = replace(
        case,
        batch=case.other if equation == "eq. 13" else case.batch,
        other=case.batch if equation == "eq. 14" else case.other,
    )
    g, eta = case.gradient, 0.1
    optimizer = engine(case, lambda model: apo.rules.SGD(model, lr=eta))
    optimizer.meta_backward(
        loss=bridge.loss_closure(case.problem, optimizer.model, ours.batch),
        outputs=bridge.outputs_closure(optimizer.model, ours.other.inputs),
    )
    lookahead, oracle = case.theta - eta * g, ours.objective()
    q = oracle.lookahead_gradient(case.theta, lookahead, ours.batch, ours.other.inputs)
    e_lookahead = np.abs(case.theta) + 20.0 * eta * np.abs(g)  # η = exp(log η)
    e_q = lookahead_gradient_error(ours, oracle, lookahead, e_lookahead)
    (log_lr,) = optimizer.rule.parameters()
    assert_close(
        float(bridge.phi_gradient(log_lr)),
        meta_gradients.log_lr_gradient(q, g, math.log(eta)),
        PROPAGATED,
        size=1,
        scale=eta * float(np.linalg.norm(g) * e_q + (len(g) + 20) * np.abs(g) @ np.abs(q)),
        what="dQ/d(log η)",
    )
