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
from reference.losses import BinaryCrossEntropy, GaussianNLL, PoissonLoss
from verification.l0_oracle import high_precision as hp
from verification.l0_oracle.rounding import gradient_error, loss_gradient_error, pass_errors
from verification.profiles import share
from verification.strategies import (
    ALL_LOSSES,
    CONVEX_LOSSES,
    LOSSES,
    SMOOTH,
    batches,
    meta_cases,
    networks,
    parameters,
)
from verification.strategies.outputs import output_shape, outputs, targets
from verification.tolerances import (
    BITWISE,
    COMPLEX_STEP,
    FUNCTION,
    PROPAGATED,
    PROPAGATED_COMPLEX,
    ROUNDING,
    assert_close,
)

logits_seed = st.integers(0, 2**16)
spreads = st.floats(0.0, 30.0)


every_loss = pytest.mark.parametrize("name", list(ALL_LOSSES))


def draw_outputs(name: str, seed: int, spread: float) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    shape = output_shape(name, rng)
    return outputs(name, shape, spread, rng), targets(ALL_LOSSES[name], shape, rng)


def term_size(name: str, z: Array, t: Array) -> float:
    """Magnitude of the terms of L and of its derivatives.

    log p = z - logsumexp z is known to eps |z|, and p as well, relatively. An exponential is known
    relatively; the Gaussian's are 1 / sigma^2 and e^2 = (t - mu)^2 / sigma^2.
    """
    size = np.linalg.norm(1.0 + np.abs(z)) + np.linalg.norm(t)
    if name == "poisson":
        size = size + np.linalg.norm(np.exp(z)) + np.linalg.norm(t * z)
    if name == "gaussian_nll":
        mu, s = np.split(z, 2, axis=1)
        e = (t - mu) * np.exp(-s)
        size = size + np.linalg.norm((np.abs(e) + np.exp(-s)) ** 2)
    return float(size)


@every_loss
@given(seed=logits_seed, spread=spreads)
def test_gradient_is_the_complex_step_of_the_value(name: str, seed: int, spread: float) -> None:
    (z, t), loss = draw_outputs(name, seed, spread), ALL_LOSSES[name]
    numeric = complex_step_jacobian(lambda u: loss.value(u.reshape(z.shape), t), z.ravel())
    # Example n depends on its own outputs alone.
    own = numeric.reshape(len(z), *z.shape)[np.arange(len(z)), np.arange(len(z))]
    assert_close(loss.gradient(z, t), own, COMPLEX_STEP, scale=term_size(name, z, t), what="dL/dz")


@every_loss
@given(seed=logits_seed, spread=spreads)
def test_hessian_is_the_complex_step_of_the_gradient(name: str, seed: int, spread: float) -> None:
    (z, t), loss = draw_outputs(name, seed, spread), ALL_LOSSES[name]
    H = loss.hessian(z, t)
    for n, row in enumerate(z):
        numeric = complex_step_jacobian(lambda u, n=n: loss.gradient(u[None], t[n : n + 1])[0], row)
        scale = term_size(name, z[n : n + 1], t[n : n + 1])
        assert_close(H[n], numeric, COMPLEX_STEP, scale=scale, what=f"d^2 L/dz^2 of example {n}")


@every_loss
@given(seed=logits_seed, spread=spreads)
def test_value_is_minus_the_log_likelihood_in_fifty_digits(
    name: str, seed: int, spread: float
) -> None:
    """log of the probability or density, up to the constants that the losses name."""
    z, t = draw_outputs(name, seed, spread)
    with hp.context():
        exact = [
            hp.LOSSES[name](hp.numbers(row), hp.target(name, y))
            for row, y in zip(z, t, strict=True)
        ]
    scale = term_size(name, z, t) ** (2 if name == "squared_error" else 1)
    assert_close(
        ALL_LOSSES[name].value(z, t),
        np.array(exact, dtype=float),
        FUNCTION,
        scale=scale,
        what="L",
    )


@every_loss
@given(seed=logits_seed, spread=spreads)
def test_model_targets_have_the_moments_of_the_predictive_distribution(
    name: str, seed: int, spread: float
) -> None:
    """The score's mean is zero and its covariance the mean Hessian (Bartlett's identities)."""
    (z, _), loss = draw_outputs(name, seed, spread), ALL_LOSSES[name]
    model = loss.model_targets(z)
    scores = np.stack([-loss.gradient(z, y) for y in model.targets])  # (K, N, C)
    p = model.probabilities.T[:, :, None]
    C = z.shape[1]
    # p = exp(z - logsumexp z) is known to eps |z|, relatively.
    scale = float(np.linalg.norm(1.0 + np.abs(z)) * C)
    if name == "poisson":  # scores 1 = (1 + r) - r
        scale += C * float(np.exp(z).max())
    if name == "gaussian_nll":  # e comes out of mu + sigma e, to eps (1 + |mu| / sigma)
        mu, s = np.split(z, 2, axis=1)
        scale *= float(np.max((1.0 + np.abs(mu) * np.exp(-s)) * (1.0 + np.exp(-s)) ** 2))
    ones = np.ones(len(z))
    assert_close(model.probabilities.sum(axis=1), ones, FUNCTION, scale=scale, what="sum of p")
    assert_close(
        np.sum(p * scores, axis=0), np.zeros_like(z), FUNCTION, scale=scale, what="mean of scores"
    )
    covariance = np.einsum("kn,kni,knj->nij", p[..., 0], scores, scores)
    hessians = np.stack([loss.hessian(z, y) for y in model.targets])
    assert_close(
        covariance,
        np.einsum("kn,knij->nij", p[..., 0], hessians),
        FUNCTION,
        size=2 * C,
        scale=scale,
        what="covariance of scores",
    )


@pytest.mark.parametrize("name", list(CONVEX_LOSSES))
@given(seed=logits_seed, spread=spreads)
def test_convex_losses_have_a_hessian_without_the_target(
    name: str, seed: int, spread: float
) -> None:
    (z, t), loss = draw_outputs(name, seed, spread), ALL_LOSSES[name]
    other = targets(loss, (len(z), z.shape[1]), np.random.default_rng(seed + 1))
    H = np.array(loss.hessian(z, t))
    assert_close(H, np.array(loss.hessian(z, other)), BITWISE, what="d^2 L/dz^2")
    lowest = np.linalg.eigvalsh(H).min()
    # Probabilities add up to 1 but for the rounding of the logits in the exponent.
    scale = max(1.0, np.abs(H).max()) + np.abs(z).max()
    assert lowest >= -FUNCTION.allowed(size=z.shape[1]) * scale, lowest


@given(seed=logits_seed, spread=spreads)
def test_gaussian_likelihood_is_not_convex_off_its_mean(seed: int, spread: float) -> None:
    """Each pair's Hessian has determinant 2 e^2 / sigma^2 - 4 e^2 / sigma^2 < 0 where t != mu."""
    z, t = draw_outputs("gaussian_nll", seed, spread)
    H = GaussianNLL().hessian(z, t)
    mu, s = np.split(z, 2, axis=1)
    D = mu.shape[1]
    pairs = np.arange(D)
    determinant = H[:, pairs, pairs] * H[:, D + pairs, D + pairs] - H[:, pairs, D + pairs] ** 2
    expected = -2.0 * (t - mu) ** 2 * np.exp(-4.0 * s)
    assert_close(
        determinant, expected, FUNCTION, iterations=4, scale=3.0 * float(np.linalg.norm(expected))
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
    assert_close(g, numeric, PROPAGATED_COMPLEX, size=1, scale=scale, what="g")


@given(case=meta_cases())
def test_cost_gradient_is_the_mean_of_the_examples(case) -> None:
    X, T = case.batch
    alone = [case.problem.gradient(case.theta, X[n : n + 1], T[n : n + 1]) for n in range(len(X))]
    each = case.problem.example_gradients(case.theta, X, T)
    passes = pass_errors(case.problem.network, case.theta, X)
    dL = case.problem.loss.gradient(passes.z, T)
    scale = gradient_error(passes, dL, loss_gradient_error(passes, dL))
    assert_close(
        each, np.stack(alone), PROPAGATED, size=1, scale=scale * len(X), what="example gradients"
    )
    assert_close(
        case.gradient, np.mean(alone, axis=0), PROPAGATED, size=1, scale=scale, what="gradient"
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
            total += hp.LOSSES[name](z, hp.target(name, t))
        return total / len(batch.inputs)

    point = hp.numbers(theta)
    with hp.context():
        value = np.float64(cost(point))
    passes = pass_errors(network, theta, batch.inputs)
    dL = problem.loss.gradient(passes.z, batch.targets)
    scale = gradient_error(passes, dL, loss_gradient_error(passes, dL))
    error_of_value = float(np.sum((np.abs(dL) + 1.0) * (passes.e_z + np.abs(passes.z) + 8.0)))
    assert_close(
        problem.value(theta, *batch), value, PROPAGATED, size=1, scale=error_of_value, what="J_B"
    )
    assert_close(
        problem.gradient(theta, *batch),
        hp.gradient(cost, point),
        PROPAGATED,
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
    assert_close(SquaredError().value(z, z), np.zeros(len(z)), BITWISE, what="L(z, z)")


def test_losses_check_their_targets() -> None:
    z = np.zeros((1, 2))
    with pytest.raises(ValueError, match=r"`targets` must be 0 or 1, got 0.0\.\.2.0; give bits"):
        BinaryCrossEntropy().value(z, [[0.0, 2.0]])
    with pytest.raises(ValueError, match=r"`targets` must be non-negative, got -1.0; give counts"):
        PoissonLoss().gradient(z, [[-1.0, 0.0]])
    with pytest.raises(ValueError, match=r"`targets` must have shape \(1, 1\), got \(1, 2\)"):
        GaussianNLL().value(z, z)
    with pytest.raises(ValueError, match=r"`z` must hold means, then as many log sigmas, got 3"):
        GaussianNLL().value(np.zeros((1, 3)), z)
