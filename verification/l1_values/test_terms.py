"""Q and its three addends, and q = ∇_θ' Q, at any lookahead, in every mode, on B and B'."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from reference.meta_objective import MetaTerms
from reference.problem import Batch
from verification import bridge
from verification.l1_values.scales import lookahead_gradient_error, term_errors
from verification.l1_values.twins import MODES, Shift, engine, meta_backward
from verification.profiles import share
from verification.strategies import MetaCase, ScaledNormal, meta_cases, scaled_normals
from verification.tolerances import BITWISE, PROPAGATED, assert_close

ALL_MODES = (*MODES, ("quadratic", "exact"), ("quadratic", "quadratic"))

pytestmark = pytest.mark.parametrize(("loss", "fsd"), ALL_MODES)


def at_shift(
    case: MetaCase, shift: ScaledNormal, loss: str, fsd: str
) -> tuple[MetaTerms, np.ndarray, np.ndarray]:
    """The engine's terms and q at θ + shift, and the lookahead."""
    step = shift.around(np.zeros_like(case.theta))
    network = case.problem.network
    optimizer = engine(case, lambda _: Shift(bridge.to_tensors(step, network)), loss, fsd)
    optimizer.objective.loss = loss
    terms = meta_backward(optimizer, case)
    grads = [bridge.tensor(bridge.phi_gradient(p)) for p in optimizer.rule.parameters()]
    values = MetaTerms(*(float(term) for term in terms))
    assert_close(float(terms.total), values.total, BITWISE, what="Q")
    return values, bridge.to_vector(grads, network), case.theta + step


@given(case=st.one_of(meta_cases(), meta_cases(broad=True)), shift=scaled_normals())
@share(0.5)
def test_terms(loss: str, fsd: str, case: MetaCase, shift: ScaledNormal) -> None:
    terms, _, lookahead = at_shift(case, shift, loss, fsd)
    objective = case.objective(loss, fsd)
    expected = objective.terms(case.theta, lookahead, case.batch, case.other.inputs)
    if loss == "linear":  # the engine leaves the constant J_B(θ) out
        expected = expected._replace(loss=case.gradient @ (lookahead - case.theta))
    if loss == "quadratic":
        constant = case.problem.value(case.theta, *case.batch)
        expected = expected._replace(loss=expected.loss - constant)
    scales = term_errors(case, objective, lookahead, np.zeros_like(lookahead))
    for name in MetaTerms._fields:
        assert_close(
            getattr(terms, name),
            getattr(expected, name),
            PROPAGATED,
            size=1,
            scale=getattr(scales, name),
            what=f"{name} term",
        )


@given(case=meta_cases(), shift=scaled_normals())
def test_lookahead_gradient(loss: str, fsd: str, case: MetaCase, shift: ScaledNormal) -> None:
    _, q, lookahead = at_shift(case, shift, loss, fsd)
    objective = case.objective(loss, fsd)
    assert_close(
        q,
        objective.lookahead_gradient(case.theta, lookahead, case.batch, case.other.inputs),
        PROPAGATED,
        size=1,
        scale=lookahead_gradient_error(case, objective, lookahead, np.zeros_like(lookahead)),
        what="q",
    )


@given(case=meta_cases(), seed=st.integers(1, 2**16))
def test_the_loss_term_ignores_the_other_batch_and_the_fsd_ignores_this_one(
    loss: str, fsd: str, case: MetaCase, seed: int
) -> None:
    """Exchanging B leaves the FSD and WSD bit for bit; exchanging B' leaves the loss and WSD."""
    shift = ScaledNormal(0.5, seed)
    terms, _, _ = at_shift(case, shift, loss, fsd)
    rng = np.random.default_rng(seed)

    def redrawn(inputs: np.ndarray) -> np.ndarray:
        return rng.standard_normal(inputs.shape)

    batch = case.batch._replace(inputs=redrawn(case.batch.inputs))
    other = case.other._replace(inputs=redrawn(case.other.inputs))
    with_batch, _, _ = at_shift(replace(case, batch=batch), shift, loss, fsd)
    with_other, _, _ = at_shift(replace(case, other=other), shift, loss, fsd)
    assert (with_batch.fsd, with_batch.wsd) == (terms.fsd, terms.wsd)
    assert (with_other.loss, with_other.wsd) == (terms.loss, terms.wsd)


@given(case=meta_cases(kinds=("linear", "mlp")), shift=scaled_normals())
def test_float32(loss: str, fsd: str, case: MetaCase, shift: ScaledNormal) -> None:
    """q in single precision, from single-precision numbers, at its own tolerance."""

    def single(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32).astype(float) if values.dtype.kind == "f" else values

    case = replace(
        case,
        theta=single(case.theta),
        batch=Batch(single(case.batch.inputs), single(np.asarray(case.batch.targets))),
        other=case.other._replace(inputs=single(case.other.inputs)),
    )
    step, network = single(shift.around(np.zeros_like(case.theta))), case.problem.network
    steps = [s.float() for s in bridge.to_tensors(step, network)]

    def rule(model: nn.Module) -> Shift:
        model.float()
        return Shift(steps)

    optimizer, objective = engine(case, rule, loss, fsd), case.objective(loss, fsd)
    optimizer.objective.loss = loss
    model = optimizer.model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    x, x_other = (bridge.tensor(b.inputs).float() for b in (case.batch, case.other))
    targets = bridge.tensor(np.asarray(case.batch.targets))
    targets = targets.float() if targets.is_floating_point() else targets
    for p, g in zip(model.parameters(), bridge.to_tensors(case.gradient, network), strict=True):
        p.grad = g.float()
    optimizer.meta_backward(
        loss=lambda: bridge.loss_of(case.problem.loss, model(x), targets),
        outputs=lambda: model(x_other),
    )
    grads = [bridge.tensor(bridge.phi_gradient(p)) for p in optimizer.rule.parameters()]
    lookahead = case.theta + step
    scale = lookahead_gradient_error(case, objective, lookahead, np.abs(step))
    expected = objective.lookahead_gradient(case.theta, lookahead, case.batch, case.other.inputs)
    assert_close(
        bridge.to_vector(grads, network),
        expected.astype(np.float32),
        PROPAGATED.at(np.float32),
        size=1,
        scale=scale,
        what="q",
    )
