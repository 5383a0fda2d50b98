"""RMSprop, Adam and AdamW: against the oracle, its complex steps, and `torch.optim`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import apo_core as apo
from apo_core.testing import check_update_rule
from reference import update_rules
from reference.arrays import Array
from verification import bridge
from verification.l1_values.twins import engine
from verification.profiles import share
from verification.strategies import MetaCase, meta_cases
from verification.tolerances import FUNCTION, PROPAGATED_COMPLEX, assert_close

STEPS = 4
BETAS = (0.8, 0.95)
GAMMA = 0.9
seeds = st.integers(0, 2**16)
decades = st.integers(-3, 0)

Build = Callable[[nn.Module], Any]
RULES: dict[str, Build] = {
    "rmsprop": lambda m: apo.rules.RMSprop(m, 0.02, GAMMA, 0.5, 1e-3, ("lr", "rho", "eps")),
    "rmsprop-other-power": lambda m: apo.rules.RMSprop(
        m, 0.02, GAMMA, 0.35, 0.1, ("lr", "rho", "eps")
    ),
    "adam": lambda m: apo.rules.Adam(m, 0.02, BETAS, 1e-3, 0.0, ("lr", "eps")),
    "adamw": lambda m: apo.rules.Adam(m, 0.02, BETAS, 1e-3, 0.1, ("lr", "eps")),
}
TORCH: dict[str, Build] = {
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), 0.02, alpha=GAMMA, eps=1e-3),
    "adam": lambda m: torch.optim.Adam(m.parameters(), 0.02, BETAS, eps=1e-3),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), 0.02, BETAS, eps=1e-3, weight_decay=0.1),
}


def gradients(size: int, seed: int, decade: int) -> Array:
    """g of each step, (STEPS, n)."""
    return 10.0**decade * np.random.default_rng(seed).standard_normal((STEPS, size))


def follow(name: str, theta: Array, g: Array, phi: Array) -> Array:
    """The oracle's theta after the last step, whose phi (log eta, [log rho,] log eps) alone varies.

    The steps before it use the rule's own phi, and the state that they leave is fixed for phi.
    """
    own = np.log([0.02, 0.35 if "other" in name else 0.5, 0.1 if "other" in name else 1e-3])
    own = own if "rmsprop" in name else own[[0, 2]]
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, gradient in enumerate(g, start=1):
        values = np.exp(phi if t == len(g) else own)
        if "rmsprop" in name:
            eta, rho, eps = values
            theta, v = update_rules.rmsprop(theta, gradient, v, eta, rho, eps, GAMMA)
        else:
            decay = 0.1 if name == "adamw" else 0.0
            eta, eps = values
            theta, m, v = update_rules.adam(theta, gradient, m, v, t, eta, eps, BETAS, decay)
    return theta


def phi_of(rule: apo.UpdateRule) -> Array:
    """The learned phi, (k,), in the oracle's order."""
    return np.array([float(p.detach()) for p in rule.parameters()])


@pytest.mark.parametrize("name", RULES)
@given(case=meta_cases(), seed=seeds, decade=decades)
def test_it_takes_the_oracles_steps(name: str, case: MetaCase, seed: int, decade: int) -> None:
    network = case.problem.network
    g = gradients(network.size, seed, decade)
    optimizer = engine(case, RULES[name])
    for gradient in g:
        bridge.set_gradients(optimizer.model, gradient, network)
        optimizer.step()
    # A step is at most eta / sqrt(1 - gamma) or eta / (1 - beta_1) long in each coordinate; for
    # other powers than 1/2 at most eta / eps times the gradient.
    travelled = np.abs(case.theta) * 2.0 + 0.02 * STEPS * (10.0 + 10.0 * np.abs(g).max(0))
    assert_close(
        bridge.parameters_of(optimizer.model, network),
        follow(name, case.theta, g, phi_of(optimizer.rule)),
        FUNCTION,
        iterations=STEPS,
        size=8,
        scale=float(np.linalg.norm(travelled)),
        what="θ after the last step",
    )


@pytest.mark.parametrize("name", TORCH)
@given(case=meta_cases(), seed=seeds, decade=decades)
def test_with_phi_frozen_it_is_torchs(name: str, case: MetaCase, seed: int, decade: int) -> None:
    network = case.problem.network
    optimizer, theirs = engine(case, RULES[name]), bridge.twin(network, case.theta)
    base = TORCH[name](theirs)
    for number, gradient in enumerate(gradients(network.size, seed, decade)):
        for model in (optimizer.model, theirs):
            bridge.set_gradients(model, gradient, network)
        optimizer.step()
        base.step()
        assert_close(
            bridge.parameters_of(optimizer.model, network),
            bridge.parameters_of(theirs, network),
            FUNCTION,
            iterations=number + 1,
            size=8,
            scale=float(np.linalg.norm(case.theta) * 2.0 + (number + 1.0) * np.sqrt(network.size)),
            what=f"θ after step {number + 1}",
        )


@pytest.mark.parametrize("name", RULES)
@share(0.5)
@given(case=meta_cases(), seed=seeds, decade=decades)
def test_the_meta_gradient_is_the_oracles_complex_step(
    name: str, case: MetaCase, seed: int, decade: int
) -> None:
    """dQ/dφ of the last step, with the state that the steps before it left; Q is ½ ‖θ' − θ‖²."""
    network = case.problem.network
    g = gradients(network.size, seed, decade)
    optimizer = engine(case, RULES[name])
    optimizer.objective = apo.ProximalObjective(fsd_weight=0.0, wsd_weight=1.0, loss="linear")
    for gradient in g[:-1]:
        bridge.set_gradients(optimizer.model, gradient, network)
        optimizer.step()
    theta = bridge.parameters_of(optimizer.model, network)
    bridge.set_gradients(optimizer.model, g[-1], network)
    optimizer.meta_backward(loss=lambda: torch.zeros(()))
    got = np.array([float(p.grad) for p in optimizer.rule.parameters() if p.grad is not None])
    phi = phi_of(optimizer.rule)
    ahead = follow(name, case.theta, g, phi)
    q = g[-1] + (ahead - theta)
    slopes, unsigned = (
        np.stack(
            [
                np.imag(follow(name, case.theta, gradients, phi + 1e-30j * e)) / 1e-30
                for e in np.eye(len(phi))
            ]
        )
        for gradients in (g, np.abs(g))  # of these no moment cancels
    )  # (k, n)
    # q errs by the rounding of θ, to which it adds the step; a slope by some ten functions.
    passed_on = 2.0 * np.linalg.norm(case.theta) + (len(q) + 100) * np.linalg.norm(q)
    assert_close(
        got,
        slopes @ q,
        PROPAGATED_COMPLEX,
        size=1,
        scale=float(np.linalg.norm(unsigned) * passed_on),
        what="dQ/dφ",
    )


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("per_layer", [False, True])
def test_it_passes_the_conformance_kit(name: str, per_layer: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    rule: apo.UpdateRule = (
        apo.rules.RMSprop(model, eps=1e-2, learn=("lr", "rho", "eps"), per_layer=per_layer)
        if "rmsprop" in name
        else apo.rules.Adam(
            model,
            eps=1e-2,
            weight_decay=0.1 * (name == "adamw"),
            learn=("lr", "eps"),
            per_layer=per_layer,
        )
    )
    check_update_rule(rule, model)


@pytest.mark.parametrize("rule", [apo.rules.RMSprop, apo.rules.Adam])
def test_it_passes_the_conformance_kit_with_a_part_of_phi_learned(rule: Any) -> None:
    model = nn.Linear(3, 2, dtype=torch.float64)
    check_update_rule(rule(model, eps=1e-2, learn=("eps",)), model)


@pytest.mark.parametrize("name", RULES)
def test_a_gradient_that_was_always_zero_gives_no_nan(name: str) -> None:
    """A dead unit has s = 0: s^ρ log s has the limit 0 and √v̂ the slope of 0/0."""
    model = nn.Linear(2, 2, dtype=torch.float64)
    rule = RULES[name](model)
    grads = [torch.zeros_like(p) for p in model.parameters()]
    updates, _ = rule([p.detach() for p in model.parameters()], grads, {})
    torch.autograd.backward([u.sum() for u in updates])
    assert all(bool(u.isfinite().all()) for u in updates)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in rule.parameters())


@pytest.mark.parametrize("rule", [apo.rules.RMSprop, apo.rules.Adam])
def test_only_what_is_to_be_learned_is_learned(rule: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    built = rule(model, learn=("eps",), per_layer=True)
    assert [name for name, p in built.named_parameters() if p.requires_grad] == ["log_eps"]
    assert built.layers == ("0", "1")
    assert built.lr.shape == (2,)
    assert built.eps.tolist() == pytest.approx([1e-8, 1e-8], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "`lr` must be positive and finite, got 0"),
        ({"eps": -1.0}, "`eps` must be positive and finite, got -1"),
        ({"learn": ()}, r"`learn` must name one or more of .*, got \(\)"),
        ({"learn": ("beta",)}, "`learn` must name one or more"),
    ],
)
@pytest.mark.parametrize("rule", [apo.rules.RMSprop, apo.rules.Adam])
def test_bad_arguments_are_refused(rule: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(nn.Linear(2, 2), **arguments)


def test_arguments_of_one_rule_alone_are_checked() -> None:
    with pytest.raises(ValueError, match=r"`smoothing` must lie in \[0, 1\), got 1"):
        apo.rules.RMSprop(nn.Linear(2, 2), smoothing=1.0)
    with pytest.raises(ValueError, match="`rho` must be positive"):
        apo.rules.RMSprop(nn.Linear(2, 2), rho=0.0)
    with pytest.raises(ValueError, match=r"`betas` must lie in \[0, 1\)"):
        apo.rules.Adam(nn.Linear(2, 2), betas=(1.0, 0.9))
    with pytest.raises(ValueError, match="`weight_decay` must be non-negative"):
        apo.rules.Adam(nn.Linear(2, 2), weight_decay=-0.1)
