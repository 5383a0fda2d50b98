"""Algorithm 1 whole: θ goes where the oracle's loop takes it, over meta-steps and steps."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reference.arrays import Array
from reference.problem import Batch
from verification import bridge
from verification.l1_values.twins import MODES, engine, rule_twin
from verification.strategies import MetaCase, ScaledNormal, meta_cases, scaled_normals
from verification.tolerances import FUNCTION, assert_close

RULES = ("sgd", "sgd-per-layer", "diagonal", "dense", "ekfac")
META_LR = 1e-3
STEPS = 4
AWAY = 1e3  # times as large as it was: a linear Q without a λ has no minimum, and may run away


def fresh(case: MetaCase, batch: Batch, seed: int) -> Batch:
    """Other inputs of the same shape, with the same targets."""
    inputs = np.random.default_rng(seed).standard_normal(batch.inputs.shape)
    return batch._replace(inputs=inputs)


def oracle_loop(
    name: str, case: MetaCase, recipe: ScaledNormal, mode: tuple[str, str], seeds: list[int]
) -> Array:
    """θ after `STEPS` steps with a meta-step by gradient descent before every second one."""
    phi = rule_twin(name, case, recipe).phi
    bound = AWAY * (1.0 + np.linalg.norm(case.theta))
    for number, seed in enumerate(seeds):
        batch, other = fresh(case, case.batch, seed), fresh(case, case.other, seed + 1)
        case = replace(case, batch=batch, other=other)
        twin = rule_twin(name, case, recipe)
        if number % 2 == 0:
            phi = phi - META_LR * complex_gradient(case, twin.lookahead, phi, mode)
        case = replace(case, theta=twin.lookahead(phi))
        assume(np.linalg.norm(case.theta) < bound)  # some steps later nothing would be finite
    return case.theta


def complex_gradient(
    case: MetaCase, lookahead: Callable[[Array], Array], phi: Array, mode: tuple[str, str]
) -> Array:
    """dQ/dφ of the oracle, (k,): q times the complex-step Jacobian of u alone."""
    q = case.objective(*mode).lookahead_gradient(
        case.theta, lookahead(phi), case.batch, case.other.inputs
    )
    return np.array([np.imag(lookahead(phi + 1e-20j * e)) @ q / 1e-20 for e in np.eye(len(phi))])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("mode", MODES, ids="-".join)
@given(case=meta_cases(smooth=True), recipe=scaled_normals(max_scale=0.3), data=st.data())
def test_algorithm_1(
    name: str, mode: tuple[str, str], case: MetaCase, recipe: ScaledNormal, data: st.DataObject
) -> None:
    """The condition number is measured: what the oracle's own loop makes of a nudge of θ."""
    weights = case.weights._replace(fsd=min(case.weights.fsd, 1.0), wsd=min(case.weights.wsd, 1.0))
    case = replace(case, weights=weights)
    seeds = data.draw(
        st.lists(st.integers(0, 2**16), min_size=STEPS, max_size=STEPS), label="batch seeds"
    )
    theta = oracle_loop(name, case, recipe, mode, seeds)

    twin, network = rule_twin(name, case, recipe), case.problem.network
    optimizer = engine(case, twin.build, *mode)
    optimizer.interval = 2
    optimizer.meta_optimizer.param_groups[0]["lr"] = META_LR
    twin.start(optimizer, case)
    for seed in seeds:
        batch, other = fresh(case, case.batch, seed), fresh(case, case.other, seed + 1)
        loss = bridge.loss_closure(case.problem, optimizer.model, batch)
        optimizer.zero_grad()
        loss().backward()
        if optimizer.meta_due:
            outputs = bridge.outputs_closure(optimizer.model, other.inputs)
            optimizer.meta_step(loss=loss, outputs=outputs)
        optimizer.step()

    assert (optimizer.steps, optimizer.meta_steps) == (STEPS, STEPS // 2)
    nudge = 1e-7 * np.random.default_rng(seeds[0]).choice([-1.0, 1.0], size=network.size)
    nudged = replace(case, theta=case.theta + nudge * (1.0 + np.abs(case.theta)))
    moved = oracle_loop(name, nudged, recipe, mode, seeds)
    growth = float(np.linalg.norm(moved - theta) / np.linalg.norm(nudge))
    assert_close(
        bridge.parameters_of(optimizer.model, network),
        theta,
        FUNCTION,
        condition=1.0 + growth,
        iterations=STEPS,
        size=network.size,
        scale=float(np.sqrt(network.size) + np.linalg.norm(theta)),
        what="θ",
    )
