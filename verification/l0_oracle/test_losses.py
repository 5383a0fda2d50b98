"""Losses of the outputs, and the cost function of the parameters."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import (
    MLP,
    CrossEntropy,
    Problem,
    SquaredError,
    complex_step_jacobian,
)
from reference.arrays import Array
from verification.l0_oracle import high_precision as hp
from verification.l0_oracle.rounding import gradient_error, loss_gradient_error, pass_errors
from verification.profiles import share
from verification.strategies import LOSSES, SMOOTH, batches, meta_cases, networks, parameters
from verification.tolerances import COMPLEX_STEP, FUNCTION, ROUNDING, assert_close

logits_seed = st.integers(0, 2**16)
spreads = st.floats(0.0, 30.0)


def draw_outputs(name: str, seed: int, spread: float) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 5)), int(rng.integers(1, 5)))
    z = spread * rng.standard_normal(shape)
    t = rng.integers(shape[1], size=shape[0]) if name == "cross_entropy" else rng.normal(size=shape)
    return z, t


@pytest.mark.parametrize("name", list(LOSSES))
@given(seed=logits_seed, spread=spreads)
def test_gradient_is_the_complex_step_of_the_value(name: str, seed: int, spread: float) -> None:
    (z, t), loss = draw_outputs(name, seed, spread), LOSSES[name]
    numeric = complex_step_jacobian(lambda u: loss.value(u.reshape(z.shape), t), z.ravel())
    # Example n depends on its own outputs alone.
    own = numeric.reshape(len(z), *z.shape)[np.arange(len(z)), np.arange(len(z))]
    # log p = z - logsumexp z is known to eps |z|, and p as well, relatively.
    scale = float(np.linalg.norm(1.0 + np.abs(z)) + np.linalg.norm(t))
    assert_close(loss.gradient(z, t), own, COMPLEX_STEP, scale=scale, what="dL/dz")


@pytest.mark.parametrize("name", list(LOSSES))
@given(seed=logits_seed, spread=spreads)
def test_hessian_is_the_complex_step_of_the_gradient(name: str, seed: int, spread: float) -> None:
    (z, t), loss = draw_outputs(name, seed, spread), LOSSES[name]
    H = loss.hessian(z, t)
    for n, row in enumerate(z):
        numeric = complex_step_jacobian(lambda u, n=n: loss.gradient(u[None], t[n : n + 1])[0], row)
        scale = float(np.linalg.norm(1.0 + np.abs(row)))
        assert_close(H[n], numeric, COMPLEX_STEP, scale=scale, what=f"d^2 L/dz^2 of example {n}")


@given(seed=logits_seed, spread=spreads)
def test_cross_entropy_is_minus_the_log_probability_in_fifty_digits(
    seed: int, spread: float
) -> None:
    z, t = draw_outputs("cross_entropy", seed, spread)
    with hp.context():
        exact = [hp.cross_entropy(hp.numbers(row), int(k)) for row, k in zip(z, t, strict=True)]
    assert_close(
        CrossEntropy().value(z, t),
        np.array(exact, dtype=float),
        FUNCTION,
        scale=float(np.linalg.norm(1.0 + np.abs(z))),
        what="L",
    )


@pytest.mark.parametrize("name", list(LOSSES))
@given(seed=logits_seed, spread=spreads)
def test_model_targets_have_the_moments_of_the_predictive_distribution(
    name: str, seed: int, spread: float
) -> None:
    """The score's mean is zero and its covariance is the loss's Hessian (Bartlett's identities)."""
    (z, _), loss = draw_outputs(name, seed, spread), LOSSES[name]
    model = loss.model_targets(z)
    scores = np.stack([-loss.gradient(z, y) for y in model.targets])  # (K, N, C)
    p = model.probabilities.T[:, :, None]
    C = z.shape[1]
    # p = exp(z - logsumexp z) is known to eps |z|, relatively.
    scale = float(np.linalg.norm(1.0 + np.abs(z)) * C)
    ones = np.ones(len(z))
    assert_close(model.probabilities.sum(axis=1), ones, FUNCTION, scale=scale, what="sum of p")
    assert_close(
        np.sum(p * scores, axis=0), np.zeros_like(z), FUNCTION, scale=scale, what="mean of scores"
    )
    covariance = np.einsum("kn,kni,knj->nij", p[..., 0], scores, scores)
    assert_close(
        covariance,
        np.array(loss.hessian(z, model.targets[0])),
        FUNCTION,
        size=2 * C,
        scale=scale,
        what="covariance of scores",
    )


@given(seed=logits_seed, shift=st.floats(-1e3, 1e3))
def test_cross_entropy_does_not_see_a_shift_of_all_logits(seed: int, shift: float) -> None:
    z, t = draw_outputs("cross_entropy", seed, 1.0)
    loss = CrossEntropy()
    scale = float(np.linalg.norm(1.0 + np.abs(z) + abs(shift)))
    assert_close(loss.value(z + shift, t), loss.value(z, t), FUNCTION, scale=scale, what="L")
    assert_close(loss.gradient(z + shift, t), loss.gradient(z, t), FUNCTION, scale=scale, what="dL")


def test_cross_entropy_is_finite_at_huge_logits() -> None:
    z = np.array([[1e4, -1e4, 0.0]])
    assert_close(CrossEntropy().value(z, np.array([1])), np.array([2e4]), ROUNDING, what="L")


@given(case=meta_cases())
def test_cost_gradient_is_the_complex_step_of_the_cost(case) -> None:
    problem, theta, batch = case.problem, case.theta, case.batch
    numeric = complex_step_jacobian(lambda u: problem.value(u, *batch)[None], theta)[0]
    passes = pass_errors(problem.network, theta, batch.inputs)
    dL = problem.loss.gradient(passes.z, batch.targets)
    scale = gradient_error(passes, dL, loss_gradient_error(passes, dL))
    g = problem.gradient(theta, *batch)
    assert_close(g, numeric, COMPLEX_STEP, size=1, scale=scale, what="g")


@given(case=meta_cases())
def test_cost_gradient_is_the_mean_of_the_examples(case) -> None:
    X, T = case.batch
    alone = [case.problem.gradient(case.theta, X[n : n + 1], T[n : n + 1]) for n in range(len(X))]
    each = case.problem.example_gradients(case.theta, X, T)
    passes = pass_errors(case.problem.network, case.theta, X)
    dL = case.problem.loss.gradient(passes.z, T)
    scale = gradient_error(passes, dL, loss_gradient_error(passes, dL))
    assert_close(
        each, np.stack(alone), ROUNDING, size=1, scale=scale * len(X), what="example gradients"
    )
    assert_close(
        case.gradient, np.mean(alone, axis=0), ROUNDING, size=1, scale=scale, what="gradient"
    )


@pytest.mark.parametrize("name", list(LOSSES))
@share(0.25)
@given(st.data())
def test_cost_derivatives_equal_differences_in_fifty_digits(name: str, data: st.DataObject) -> None:
    """Value, gradient and Hessian of J_B against a scalar mpmath twin that shares no code."""
    network = data.draw(
        networks(kinds=["mlp"], activations=SMOOTH, max_width=2, max_hidden=1), label="network"
    )
    assert isinstance(network, MLP)
    theta = data.draw(parameters(network), label="theta")
    batch = data.draw(batches(network, LOSSES[name], max_size=3), label="batch")
    problem = Problem(network, LOSSES[name])
    bias = network.layers[0].bias is not None

    def cost(u: hp.Vector) -> Any:
        total = hp.numbers([0.0])[0]
        for x, t in zip(*batch, strict=True):
            z = hp.mlp(u, hp.numbers(x), network.widths, network.activation, bias)
            total += (
                hp.squared_error(z, hp.numbers(t))
                if name == "squared_error"
                else hp.cross_entropy(z, int(t))
            )
        return total / len(batch.inputs)

    point = hp.numbers(theta)
    with hp.context():
        value = np.float64(cost(point))
    passes = pass_errors(network, theta, batch.inputs)
    dL = problem.loss.gradient(passes.z, batch.targets)
    scale = gradient_error(passes, dL, loss_gradient_error(passes, dL))
    error_of_value = float(np.sum((np.abs(dL) + 1.0) * (passes.e_z + np.abs(passes.z) + 8.0)))
    assert_close(
        problem.value(theta, *batch), value, FUNCTION, size=1, scale=error_of_value, what="J_B"
    )
    assert_close(
        problem.gradient(theta, *batch),
        hp.gradient(cost, point),
        FUNCTION,
        size=1,
        scale=scale,
        what="g",
    )
    # One derivative more: every term is differentiated, by a weight or by an activation, whose
    # derivatives are at most 1; each layer has at most as many paths as it has weights.
    paths = float(
        np.prod([1.0 + np.linalg.norm(theta[layer.parameters]) for layer in network.layers])
    )
    assert_close(
        problem.hessian(theta, *batch),
        hp.hessian(cost, point),
        COMPLEX_STEP,
        size=network.size,
        scale=scale * paths * float(1.0 + np.abs(batch.inputs).max()),
        what="H",
    )


@given(seed=logits_seed)
def test_squared_error_of_a_perfect_fit_is_zero(seed: int) -> None:
    z, _ = draw_outputs("squared_error", seed, 1.0)
    assert_close(SquaredError().value(z, z), np.zeros(len(z)), ROUNDING, what="L(z, z)")
