"""θ' = u(θ, φ, g): every rule against the oracle, and against `torch.optim` with φ frozen."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import apo_core as apo
from reference import update_rules
from verification import bridge
from verification.l1_values.twins import RULES, engine, rule_twin
from verification.strategies import MetaCase, ScaledNormal, meta_cases, rates, scaled_normals
from verification.tolerances import BITWISE, PROPAGATED, ROUNDING, assert_close


@pytest.mark.parametrize("name", [rule for rule in RULES if rule != "momentum-without-history"])
@given(case=meta_cases(broad=True), recipe=scaled_normals())
def test_one_step(name: str, case: MetaCase, recipe: ScaledNormal) -> None:
    twin = rule_twin(name, case, recipe)
    optimizer = engine(case, twin.build)
    twin.start(optimizer, case)
    optimizer.step()
    assert_close(
        bridge.parameters_of(optimizer.model, case.problem.network),
        twin.lookahead(twin.phi),
        PROPAGATED,
        size=1,
        scale=float(np.linalg.norm(twin.e_lookahead)),
        what=f"θ' of {name}",
    )


@pytest.mark.parametrize("nesterov", [False, True], ids=["heavy-ball", "nesterov"])
@given(
    case=meta_cases(broad=True), eta=rates(), mu=st.floats(0.01, 0.99), seed=st.integers(0, 2**16)
)
def test_momentum_over_several_steps(
    nesterov: bool, case: MetaCase, eta: float, mu: float, seed: int
) -> None:
    """v accumulates as in P18 eq. 18, and θ moves as in eq. 19, along any sequence of gradients."""
    network = case.problem.network
    optimizer = engine(
        case, lambda model: apo.rules.SGD(model, lr=eta, momentum=mu, nesterov=nesterov)
    )
    theta, v = case.theta, np.zeros_like(case.theta)
    step = update_rules.nesterov if nesterov else update_rules.heavy_ball
    gradients = np.random.default_rng(seed).standard_normal((6, network.size))
    travelled = np.abs(theta) + eta * len(gradients) * 2 * np.abs(gradients).sum(0)
    for g in gradients:
        bridge.set_gradients(optimizer.model, g, network)
        optimizer.step()
        theta, v = step(theta, g, v, eta, mu)
    assert_close(
        bridge.parameters_of(optimizer.model, network),
        theta,
        ROUNDING,
        iterations=len(gradients),
        size=len(gradients),
        scale=float(np.linalg.norm(travelled)),
        what="θ after six steps",
    )


@pytest.mark.parametrize("name", ["sgd", "heavy-ball", "nesterov"])
@given(
    case=meta_cases(broad=True), eta=rates(), mu=st.floats(0.01, 0.99), seed=st.integers(0, 2**16)
)
def test_torch_sgd_takes_the_same_steps(
    name: str, case: MetaCase, eta: float, mu: float, seed: int
) -> None:
    """With φ frozen the rule is torch.optim.SGD, at every one of six steps."""
    network = case.problem.network
    momentum, nesterov = (0.0 if name == "sgd" else mu), name == "nesterov"
    optimizer = engine(case, lambda model: apo.rules.SGD(model, eta, momentum, nesterov))
    theirs = bridge.twin(network, case.theta)
    sgd = torch.optim.SGD(theirs.parameters(), lr=eta, momentum=momentum, nesterov=nesterov)
    travelled = float(np.linalg.norm(case.theta))
    for number, g in enumerate(np.random.default_rng(seed).standard_normal((6, network.size))):
        for model in (optimizer.model, theirs):
            bridge.set_gradients(model, g, network)
        optimizer.step()
        sgd.step()
        travelled += eta * (number + 2) * float(np.linalg.norm(g))
        assert_close(
            bridge.parameters_of(optimizer.model, network),
            bridge.parameters_of(theirs, network),
            ROUNDING,
            iterations=number + 1,
            size=number + 2,
            scale=travelled,
            what=f"θ after step {number + 1}",
        )


@pytest.mark.parametrize("structure", [apo.Dense, apo.Diagonal, apo.EKFAC])
@given(case=meta_cases(), scale=rates(min_decade=-3, max_decade=1))
def test_every_structure_starts_as_sgd_of_rate_s_squared(
    structure: type[apo.Preconditioner], case: MetaCase, scale: float
) -> None:
    """P = s² I at the start, whatever the structure: products with 0 and 1 are exact."""
    optimizer = engine(
        case, lambda model: apo.rules.Preconditioned(model, structure, initial_scale=scale)
    )
    rule = optimizer.rule
    assert isinstance(rule, apo.rules.Preconditioned)
    P = bridge.array(rule.dense())
    assert_close(P, scale**2 * np.eye(len(P)), BITWISE, what="P at the start")
    optimizer.step()
    g = case.gradient
    assert_close(
        bridge.parameters_of(optimizer.model, case.problem.network),
        case.theta - scale**2 * g,
        BITWISE,
        what="θ'",
    )


@pytest.mark.parametrize("name", RULES)
@given(case=meta_cases(), recipe=scaled_normals(), scale=st.floats(0.1, 1.9))
def test_the_update_scale_scales_the_step_and_not_the_lookahead(
    name: str, case: MetaCase, recipe: ScaledNormal, scale: float
) -> None:
    """θ moves by update_scale · Δ; Q is looked at at θ + Δ, and so does not depend on it."""
    twin = rule_twin(name, case, recipe)
    pair = [engine(case, twin.build), engine(case, twin.build)]
    pair[1].update_scale = scale
    terms = []
    for optimizer in pair:
        twin.start(optimizer, case)
        terms.append(
            optimizer.meta_backward(
                loss=bridge.loss_closure(case.problem, optimizer.model, case.batch),
                outputs=bridge.outputs_closure(optimizer.model, case.other.inputs),
            )
        )
        optimizer.step()
    for name_, one, other in zip(("loss", "fsd", "wsd"), *terms, strict=True):
        assert_close(float(other), float(one), BITWISE, what=f"{name_} term")
    whole, part = (bridge.parameters_of(o.model, case.problem.network) for o in pair)
    assert_close(
        part - case.theta,
        scale * (whole - case.theta),
        ROUNDING,
        size=1,
        scale=float(np.linalg.norm(np.abs(whole) + 2 * np.abs(case.theta))),
        what="the step taken",
    )
