"""dQ/dφ of every rule: against the derivation by hand, a complex step, and a finite difference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.arrays import Array
from verification.l1_values.scales import lookahead_gradient_error, term_errors
from verification.l1_values.twins import MODES, RULES, RuleTwin, engine, meta_backward, rule_twin
from verification.profiles import share
from verification.strategies import MetaCase, ScaledNormal, meta_cases, scaled_normals
from verification.tolerances import CENTRAL_DIFFERENCE, PROPAGATED, PROPAGATED_COMPLEX, assert_close

pytestmark = [
    pytest.mark.parametrize("name", RULES),
    pytest.mark.parametrize(("loss", "fsd"), MODES),
]


def meta_gradient(case: MetaCase, twin: RuleTwin, loss: str, fsd: str, scale: float = 1.0) -> Array:
    """The engine's dQ/dφ, (k,), in the oracle's coordinates."""
    optimizer = engine(case, twin.build, loss, fsd)
    twin.start(optimizer, case)
    meta_backward(optimizer, case, scale)
    return twin.gradient_of(optimizer.rule)


def value(case: MetaCase, twin: RuleTwin, loss: str, fsd: str, phi: Array) -> float:
    """The engine's Q at φ."""
    optimizer = engine(case, twin.build, loss, fsd)
    twin.start(optimizer, case)
    twin.set_phi(optimizer.rule, phi)
    return float(meta_backward(optimizer, case).total)


def gradient_error(case: MetaCase, twin: RuleTwin, loss: str, fsd: str) -> float:
    """Bound for dQ/dφ = (∂u/∂φ)ᵀ q: the error of q that gets through, and the product's own."""
    objective, lookahead = case.objective(loss, fsd), twin.lookahead(twin.phi)
    q = objective.lookahead_gradient(case.theta, lookahead, case.batch, case.other.inputs)
    e_q = lookahead_gradient_error(case, objective, lookahead, twin.e_lookahead)
    return twin.reach * (e_q + (4 * len(q) + 20) * float(np.linalg.norm(q)))


@given(case=meta_cases(), recipe=scaled_normals())
@share(0.5)
def test_hand_derived(name: str, loss: str, fsd: str, case: MetaCase, recipe: ScaledNormal) -> None:
    twin = rule_twin(name, case, recipe)
    q = case.objective(loss, fsd).lookahead_gradient(
        case.theta, twin.lookahead(twin.phi), case.batch, case.other.inputs
    )
    assert_close(
        meta_gradient(case, twin, loss, fsd),
        twin.hand_derived(q),
        PROPAGATED,
        size=1,
        scale=gradient_error(case, twin, loss, fsd),
        what="dQ/dφ",
    )


@given(case=meta_cases(), recipe=scaled_normals(), seed=st.integers(0, 2**16))
@share(0.5)
def test_complex_step_of_the_oracle(
    name: str, loss: str, fsd: str, case: MetaCase, recipe: ScaledNormal, seed: int
) -> None:
    """Im Q(φ + ihv) / h needs neither q nor the derivation by hand; in two directions v."""
    twin = rule_twin(name, case, recipe)
    objective = case.objective(loss, fsd)
    gradient = meta_gradient(case, twin, loss, fsd)
    scale = gradient_error(case, twin, loss, fsd)
    for v in np.random.default_rng(seed).standard_normal((2, len(twin.phi))):
        ahead = twin.lookahead(twin.phi + 1e-20j * v)
        Q = objective.terms(case.theta, ahead, case.batch, case.other.inputs).total
        assert_close(
            gradient @ v,
            np.imag(Q) / 1e-20,
            PROPAGATED_COMPLEX,
            size=1,
            scale=scale * float(np.linalg.norm(v)),
            what="dQ/dφ · v",
        )


@given(
    case=meta_cases(smooth=True), recipe=scaled_normals(max_scale=0.5), seed=st.integers(0, 2**16)
)
@share(0.25)
def test_finite_difference_of_the_engine(
    name: str, loss: str, fsd: str, case: MetaCase, recipe: ScaledNormal, seed: int
) -> None:
    """The engine's dQ/dφ is the slope of the engine's Q along a unit direction v.

    The truncation needs |Q'''| along v: the second difference of the oracle's exact slope.
    """
    twin = rule_twin(name, case, recipe)
    objective = case.objective(loss, fsd)
    v = np.random.default_rng(seed).standard_normal(len(twin.phi))
    v /= np.linalg.norm(v)
    h = np.finfo(float).eps ** (1 / 3)

    def slope(t: float) -> float:
        ahead = twin.lookahead(twin.phi + (t + 1e-20j) * v)
        Q = objective.terms(case.theta, ahead, case.batch, case.other.inputs).total
        return float(np.imag(Q)) / 1e-20

    rise = [value(case, twin, loss, fsd, twin.phi + t * v) for t in (-h, h)]
    ahead = twin.lookahead(twin.phi)
    rounding = sum(term_errors(case, objective, ahead, twin.e_lookahead))
    third = max(abs(slope(t + 1e-3) - 2 * slope(t) + slope(t - 1e-3)) / 1e-6 for t in (-h, 0, h))
    assert_close(
        meta_gradient(case, twin, loss, fsd) @ v,
        (rise[1] - rise[0]) / (2 * h),
        CENTRAL_DIFFERENCE,
        size=1,
        scale=rounding + third,
        what="dQ/dφ · v",
    )


@given(case=meta_cases(), recipe=scaled_normals(), scale=st.floats(0.1, 10.0))
@share(0.25)
def test_meta_backward_accumulates_scaled_gradients(
    name: str, loss: str, fsd: str, case: MetaCase, recipe: ScaledNormal, scale: float
) -> None:
    """Two calls leave the sum, each with its factor."""
    twin = rule_twin(name, case, recipe)
    once = meta_gradient(case, twin, loss, fsd)
    optimizer = engine(case, twin.build, loss, fsd)
    twin.start(optimizer, case)
    meta_backward(optimizer, case)
    meta_backward(optimizer, case, scale)
    assert_close(
        twin.gradient_of(optimizer.rule),
        (1 + scale) * once,
        PROPAGATED,
        size=1,
        scale=(1 + scale) * gradient_error(case, twin, loss, fsd),
        what="accumulated dQ/dφ",
    )
