"""The torch twin of an oracle network is the same function, and the bridge loses nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verification import bridge
from verification.l0_oracle.rounding import gradient_error, loss_gradient_error, pass_errors
from verification.strategies import MetaCase, meta_cases
from verification.tolerances import BITWISE, PROPAGATED, ROUNDING, assert_close


@given(case=meta_cases(broad=True))
def test_outputs(case: MetaCase) -> None:
    network = case.problem.network
    passes = pass_errors(network, case.theta, case.other.inputs)
    z = bridge.outputs_closure(bridge.twin(network, case.theta), case.other.inputs)()
    assert_close(
        bridge.array(z),
        passes.z,
        PROPAGATED,
        size=1,
        scale=float(np.linalg.norm(passes.e_z)),
        what="z",
    )


@given(case=meta_cases(broad=True))
def test_loss_gradient(case: MetaCase) -> None:
    network = case.problem.network
    model = bridge.twin(network, case.theta)
    bridge.loss_closure(case.problem, model, case.batch)().backward()
    passes = pass_errors(network, case.theta, case.batch.inputs)
    dL = case.problem.loss.gradient(passes.z, case.batch.targets)
    assert_close(
        bridge.gradients_of(model, network),
        case.gradient,
        PROPAGATED,
        size=1,
        scale=gradient_error(passes, dL, loss_gradient_error(passes, dL)),
        what="g",
    )


@given(case=meta_cases(broad=True))
def test_vectors_come_back(case: MetaCase) -> None:
    network = case.problem.network
    tensors = bridge.to_tensors(case.theta, network)
    assert_close(bridge.to_vector(tensors, network), case.theta, BITWISE)
    model = bridge.twin(network, case.theta)
    assert_close(bridge.parameters_of(model, network), case.theta, BITWISE)
    assert [tuple(p.shape) for p in model.parameters()] == [tuple(t.shape) for t in tensors]
    flat = torch.cat([t.reshape(-1) for t in tensors]).numpy()
    assert_close(flat, case.theta[bridge.row_major(network)], BITWISE)


@given(case=meta_cases(), seed=st.integers(0, 2**16))
def test_matrices_come_back_and_act_alike(case: MetaCase, seed: int) -> None:
    """M v on one side is M v on the other."""
    network = case.problem.network
    rng = np.random.default_rng(seed)
    M, v = rng.standard_normal((network.size, network.size)), rng.standard_normal(network.size)
    there = bridge.to_engine_matrix(M, network)
    assert_close(bridge.to_oracle_matrix(there, network), M, BITWISE)
    index = bridge.row_major(network)
    assert_close(
        bridge.array(there @ bridge.tensor(v[index])),
        (M @ v)[index],
        ROUNDING,
        scale=float(np.linalg.norm(np.abs(M) @ np.abs(v))),
        what="M v",
    )


@given(case=meta_cases(broad=True))
def test_gradients_must_be_there(case: MetaCase) -> None:
    model = bridge.twin(case.problem.network, case.theta)
    with pytest.raises(ValueError, match="every parameter must have a gradient"):
        bridge.gradients_of(model, case.problem.network)
