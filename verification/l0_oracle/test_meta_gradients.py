"""Every hand-derived dQ/dphi against the complex step of Q(phi) through the update rule.

What q errs by, the vector-Jacobian product passes on: the scale of a comparison is the bound of
q's rounding times the size of d theta'/d phi, beside the terms of that product themselves.
"""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reference import (
    approximate_meta_gradient,
    approximate_meta_objective,
    complex_step_jacobian,
    dense_gradient,
    diagonal_gradient,
    ekfac_gradient,
    ekfac_preconditioner,
    ekfac_product,
    fsd_hessian,
    log_lr_gradient,
    nesterov,
    per_layer_log_lr_gradient,
    preconditioned,
    proximity_matrix,
    sgd,
    sgd_per_layer,
    vec,
)
from reference.arrays import Array
from reference.update_rules import EKFACBlocks
from verification.l0_oracle.rounding import meta_gradient_error
from verification.strategies import MetaCase, meta_cases, rates, scaled_normals
from verification.tolerances import COMPLEX_STEP, PROPAGATED_COMPLEX, ROUNDING, assert_close

seeds = st.integers(0, 2**16)


def total(case: MetaCase, lookahead: Array) -> Array:
    """Q at a lookahead, (1,)."""
    return case.objective().terms(case.theta, lookahead, case.batch, case.other.inputs).total[None]


def gradient_at(case: MetaCase, lookahead: Array, e_lookahead: Array) -> tuple[Array, float]:
    """q, and the norm of its rounding bound in units of u, with theta' known to `e_lookahead`.

    The product with q adds the sums of its own, of at most 4 n terms.
    """
    args = case.batch, case.other.inputs
    objective, theta = case.objective(), case.theta
    q = objective.lookahead_gradient(theta, lookahead, *args)
    H_Q = complex_step_jacobian(lambda u: objective.lookahead_gradient(theta, u, *args), lookahead)
    error = meta_gradient_error(objective, theta, lookahead, *args)
    error += float(np.linalg.norm(np.abs(H_Q) @ (np.abs(theta) + e_lookahead)))
    return q, error + (4 * len(q) + 20) * float(np.linalg.norm(q))


@given(case=meta_cases(), eta=rates())
def test_log_learning_rate(case: MetaCase, eta: float) -> None:
    g, log_eta = case.gradient, float(np.log(eta))
    numeric = complex_step_jacobian(
        lambda phi: total(case, sgd(case.theta, g, np.exp(phi[0]))), np.array([log_eta])
    )[0, 0]
    q, error = gradient_at(
        case, sgd(case.theta, g, np.exp(log_eta)), 20 * np.exp(log_eta) * np.abs(g)
    )
    assert_close(
        np.float64(log_lr_gradient(q, g, log_eta)),
        np.float64(numeric),
        PROPAGATED_COMPLEX,
        size=1,
        scale=np.exp(log_eta) * float(np.linalg.norm(g)) * error,
        what="dQ/d log eta",
    )


@given(case=meta_cases(), eta=rates(), mu=st.floats(0.0, 0.99), seed=seeds)
def test_log_learning_rate_under_nesterov_momentum(
    case: MetaCase, eta: float, mu: float, seed: int
) -> None:
    """The same formula along the momentum's direction g + mu v (P18 eq. 19)."""
    g, log_eta = case.gradient, float(np.log(eta))
    v = np.random.default_rng(seed).standard_normal(len(g))
    numeric = complex_step_jacobian(
        lambda phi: total(case, nesterov(case.theta, g, v, np.exp(phi[0]), mu).theta),
        np.array([log_eta]),
    )[0, 0]
    direction = g + mu * (mu * v + g)
    terms = 20 * np.exp(log_eta) * (2 * np.abs(g) + np.abs(v))
    q, error = gradient_at(case, case.theta - np.exp(log_eta) * direction, terms)
    assert_close(
        np.float64(log_lr_gradient(q, direction, log_eta)),
        np.float64(numeric),
        PROPAGATED_COMPLEX,
        size=1,
        scale=np.exp(log_eta) * float(np.linalg.norm(np.abs(g) + np.abs(v))) * 2 * error,
        what="dQ/d log eta",
    )


@given(case=meta_cases(), eta=rates(), seed=seeds)
def test_log_learning_rate_of_each_layer(case: MetaCase, eta: float, seed: int) -> None:
    layers, g = case.problem.network.layers, case.gradient
    log_eta = np.log(eta) + np.random.default_rng(seed).uniform(-1.0, 1.0, size=len(layers))

    def lookahead(phi: Array) -> Array:
        return sgd_per_layer(case.theta, g, np.exp(phi), layers)

    q, error = gradient_at(case, lookahead(log_eta), 20 * np.exp(log_eta).max() * np.abs(g))
    assert_close(
        per_layer_log_lr_gradient(q, g, log_eta, layers),
        complex_step_jacobian(lambda phi: total(case, lookahead(phi)), log_eta)[0],
        PROPAGATED_COMPLEX,
        size=1,
        scale=float(np.exp(log_eta).max() * np.linalg.norm(g)) * error,
        what="dQ/d log eta",
    )


@given(case=meta_cases(), step=scaled_normals())
def test_dense_preconditioner(case: MetaCase, step) -> None:
    n, g = len(case.theta), case.gradient
    P = step.around(np.eye(n))
    numeric = complex_step_jacobian(
        lambda phi: total(case, preconditioned(case.theta, g, phi.reshape(n, n))), P.ravel()
    )
    terms = (n + 3) * np.abs(P) @ np.abs(g)
    q, error = gradient_at(case, preconditioned(case.theta, g, P), terms)
    assert_close(
        dense_gradient(q, g),
        numeric.reshape(n, n),
        PROPAGATED_COMPLEX,
        size=1,
        scale=float(np.linalg.norm(g)) * error,
        what="dQ/dP",
    )


@given(case=meta_cases(), step=scaled_normals())
def test_diagonal_preconditioner(case: MetaCase, step) -> None:
    g = case.gradient
    s = step.around(np.ones(len(g)))
    numeric = complex_step_jacobian(lambda phi: total(case, case.theta - phi**2 * g), s)
    q, error = gradient_at(case, case.theta - s**2 * g, 5 * s**2 * np.abs(g))
    assert_close(
        diagonal_gradient(q, g, s),
        numeric[0],
        PROPAGATED_COMPLEX,
        size=1,
        scale=2.0 * float(np.linalg.norm(s * g)) * error,
        what="dQ/ds",
    )


@given(case=meta_cases(), step=scaled_normals())
def test_ekfac_blocks(case: MetaCase, step) -> None:
    """A, B and S of each layer, through the dense eq. 9, which the formula does not use."""
    network, g = case.problem.network, case.gradient
    blocks = step.blocks(network.layers)
    scales = [None if la.bias is None else np.ones(la.shape[0]) for la in network.layers]

    def lookahead(replaced: int, block: EKFACBlocks) -> Array:
        chosen = [*blocks[:replaced], block, *blocks[replaced + 1 :]]
        P = ekfac_preconditioner(network.layers, chosen, scales)
        return preconditioned(case.theta, g, P)

    moduli = [EKFACBlocks(*map(np.abs, block)) for block in blocks]
    terms = ekfac_preconditioner(network.layers, moduli, scales) @ np.abs(g)
    q, error = gradient_at(case, lookahead(0, blocks[0]), (2 * len(g) + 12) * terms)
    for k, (layer, block) in enumerate(zip(network.layers, blocks, strict=True)):
        R, V = layer.weight_matrix(q), layer.weight_matrix(g)
        by_hand = ekfac_gradient(R, V, *block)
        for name in EKFACBlocks._fields:
            value = getattr(block, name)
            # d theta'/d(A, B, S) with every factor replaced by its modulus.
            reach = complex_step_jacobian(
                lambda phi, name=name, V=V, k=k, value=value: vec(
                    ekfac_product(
                        *moduli[k]._replace(**{name: phi.reshape(value.shape)}), np.abs(V)
                    )
                ),
                np.abs(value).ravel(),
            )
            numeric = complex_step_jacobian(
                lambda phi, name=name, k=k, block=block, value=value: total(
                    case, lookahead(k, block._replace(**{name: phi.reshape(value.shape)}))
                ),
                value.ravel(),
            )
            assert_close(
                getattr(by_hand, name),
                numeric.reshape(value.shape),
                PROPAGATED_COMPLEX,
                size=1,
                scale=float(np.linalg.norm(reach, 2)) * error,
                what=f"dQ/d{name} of layer {k}",
            )


@given(case=meta_cases(), step=scaled_normals())
def test_ekfac_gradient_is_homogeneous(case: MetaCase, step) -> None:
    """P_S is of degree 2 in each of A, B, S, so <dQ/dA, A> = <dQ/dB, B> = <dQ/dS, S> (Euler)."""
    layer = case.problem.network.layers[0]
    block = step.blocks([layer])[0]
    q = case.objective().lookahead_gradient(case.theta, case.theta, case.batch, case.other.inputs)
    R, V = layer.weight_matrix(q), layer.weight_matrix(case.gradient)
    by_hand = ekfac_gradient(R, V, *block)
    expected = np.float64(-2.0 * vec(R) @ vec(ekfac_product(block.A, block.B, block.S, V)))
    a, b, s, v, r = (np.abs(x) for x in (*block, V, R))
    scale = 2.0 * float(np.sum(r * (b @ (s**2 * (b.T @ v @ a)) @ a.T)))
    for name in EKFACBlocks._fields:
        actual = np.sum(getattr(by_hand, name) * getattr(block, name))
        assert_close(
            actual,
            expected,
            ROUNDING,
            size=2 * sum(layer.shape),
            iterations=4,
            scale=scale,
            what=name,
        )


@given(case=meta_cases(), step=scaled_normals())
def test_gradient_of_eq_43_is_the_complex_step_of_its_value(case: MetaCase, step) -> None:
    gradients = case.problem.example_gradients(case.theta, *case.batch)
    n = len(case.theta)
    P = step.around(np.eye(n))
    G = fsd_hessian(case.problem.network, case.discrepancy, case.theta, case.other.inputs)
    M = proximity_matrix(0.5 * (G + G.T), *case.weights)
    numeric = complex_step_jacobian(
        lambda phi: approximate_meta_objective(phi.reshape(n, n), gradients, M)[None], P.ravel()
    )
    magnitude = float(np.linalg.norm(np.abs(M) @ np.abs(P) + np.eye(n)) * np.mean(gradients**2) * n)
    assert_close(
        approximate_meta_gradient(P, gradients, M),
        numeric.reshape(n, n),
        COMPLEX_STEP,
        size=2 * n + len(gradients),
        scale=magnitude,
        what="dQ-hat/dP",
    )
