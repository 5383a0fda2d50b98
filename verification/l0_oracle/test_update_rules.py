"""Update rules, and the structured preconditioner of P22 eq. 9 and 10."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import (
    EKFACBlocks,
    ekfac_matrix,
    ekfac_preconditioner,
    ekfac_product,
    heavy_ball,
    nesterov,
    preconditioned,
    sgd,
    sgd_per_layer,
    unvec,
    vec,
)
from verification.strategies import ekfac_blocks, networks, rates, scaled_normals
from verification.tolerances import BITWISE, ROUNDING, assert_close

seeds = st.integers(0, 2**16)


def product_magnitude(blocks: EKFACBlocks, V: np.ndarray) -> float:
    A, B, S, V = (np.abs(x) for x in (*blocks, V))
    return float(np.linalg.norm(B @ (S**2 * (B.T @ V @ A)) @ A.T))


@given(blocks=ekfac_blocks(), seed=seeds)
def test_eq_10_is_eq_9_times_vec(blocks: EKFACBlocks, seed: int) -> None:
    V = np.random.default_rng(seed).standard_normal(blocks.S.shape)
    assert_close(
        vec(ekfac_product(*blocks, V)),
        ekfac_matrix(*blocks) @ vec(V),
        ROUNDING,
        size=sum(V.shape),
        iterations=4,
        scale=product_magnitude(blocks, V),
        what="P_S vec(V)",
    )


@given(blocks=ekfac_blocks())
def test_eq_9_is_a_product_of_indexed_sums(blocks: EKFACBlocks) -> None:
    """P_S[(o,i), (q,j)] = sum_{p,k} A_ik B_op S_pk^2 B_qp A_jk, by indices."""
    A, B, S = blocks
    out, in_ = S.shape
    tensor = np.einsum("ik,op,pk,qp,jk->iojq", A, B, S**2, B, A)
    magnitude = np.einsum("ik,op,pk,qp,jk->iojq", *map(np.abs, (A, B, S**2, B, A)))
    assert_close(
        ekfac_matrix(A, B, S),
        tensor.reshape(in_ * out, in_ * out),
        ROUNDING,
        size=in_ * out + 4,
        scale=float(np.linalg.norm(magnitude)),
        what="P_S",
    )


@given(blocks=ekfac_blocks(max_scale=3.0))
def test_eq_9_is_positive_semidefinite(blocks: EKFACBlocks) -> None:
    P = ekfac_matrix(*blocks)
    magnitude = float(np.linalg.norm(ekfac_matrix(*map(np.abs, blocks))))
    allowed = ROUNDING.allowed(size=len(P)) * magnitude
    assert np.abs(P - P.T).max() <= allowed
    lowest = np.linalg.eigvalsh(0.5 * (P + P.T))[0]
    assert lowest >= -allowed, f"smallest eigenvalue {lowest}, allowed {-allowed}"


@given(out=st.integers(1, 6), in_=st.integers(1, 6))
def test_eq_9_takes_the_stated_number_of_parameters(out: int, in_: int) -> None:
    """m_i^2 + m_{i+1}^2 + m_i m_{i+1} instead of m_i^2 m_{i+1}^2, which pays from 2 by 2 ... on."""
    blocks = EKFACBlocks(np.eye(in_), np.eye(out), np.ones((out, in_)))
    assert sum(block.size for block in blocks) == out**2 + in_**2 + out * in_
    assert ekfac_matrix(*blocks).size == out**2 * in_**2


@given(st.data())
def test_the_whole_preconditioner_acts_layer_by_layer(data: st.DataObject) -> None:
    network = data.draw(networks(), label="network")
    recipe = data.draw(scaled_normals(), label="phi")
    g = np.random.default_rng(data.draw(seeds, label="seed")).standard_normal(network.size)
    blocks = recipe.blocks(network.layers)
    scales = [
        None if layer.bias is None else recipe.around(np.ones(layer.shape[0]))
        for layer in network.layers
    ]
    step = ekfac_preconditioner(network.layers, blocks, scales) @ g
    for layer, block, s in zip(network.layers, blocks, scales, strict=True):
        V = layer.weight_matrix(g)
        assert_close(
            unvec(step[layer.weight], layer.shape),
            ekfac_product(*block, V),
            ROUNDING,
            size=network.size + sum(layer.shape),
            iterations=4,
            scale=product_magnitude(block, V),
            what="step of W",
        )
        if layer.bias is not None and s is not None:
            assert_close(step[layer.bias], s**2 * g[layer.bias], ROUNDING, what="step of b")


@given(st.data())
def test_learning_rates_are_special_preconditioners(data: st.DataObject) -> None:
    network = data.draw(networks(), label="network")
    rng = np.random.default_rng(data.draw(seeds, label="seed"))
    theta, g = rng.standard_normal((2, network.size))
    eta = data.draw(rates(), label="eta")
    etas = eta * rng.uniform(0.5, 2.0, size=len(network.layers))
    P = eta * np.eye(network.size)  # whose products with zeros are exact
    assert_close(sgd(theta, g, eta), preconditioned(theta, g, P), BITWISE)
    each = sgd_per_layer(theta, g, etas, network.layers)
    for layer, rate in zip(network.layers, etas, strict=True):
        part = layer.parameters
        assert_close(each[part], sgd(theta[part], g[part], rate), BITWISE)


@given(seed=seeds, eta=rates(), mu=st.floats(0.0, 0.99), steps=st.integers(1, 5))
def test_momentum_is_a_geometric_sum_of_gradients(
    seed: int, eta: float, mu: float, steps: int
) -> None:
    """v_t = sum_k mu^(t-k) g_k; heavy ball steps along v_t, Nesterov along g_t + mu v_t."""
    g = np.random.default_rng(seed).standard_normal((steps, 3))
    start = np.zeros(3)
    ball = look = (start, start)
    for row in g:
        ball = heavy_ball(ball[0], row, ball[1], eta, mu)
        look = nesterov(look[0], row, look[1], eta, mu)
    v = [sum(mu ** (t - k) * g[k] for k in range(t + 1)) for t in range(steps)]
    magnitude = float(sum(np.linalg.norm(x) for x in g)) * steps
    for what, actual, expected in (
        ("velocity", ball[1], v[-1]),
        ("heavy ball", ball[0], -eta * np.sum(v, axis=0)),
        ("Nesterov", look[0], -eta * np.sum([g[t] + mu * v[t] for t in range(steps)], axis=0)),
    ):
        scale = magnitude if what == "velocity" else 2 * eta * magnitude
        assert_close(actual, expected, ROUNDING, size=steps, iterations=2, scale=scale, what=what)


@given(seed=seeds, eta=rates())
def test_momentum_zero_is_sgd(seed: int, eta: float) -> None:
    theta, g, v = np.random.default_rng(seed).standard_normal((3, 4))
    plain = sgd(theta, g, eta)
    assert_close(heavy_ball(theta, g, v, eta, 0.0).theta, plain, BITWISE, what="heavy ball")
    assert_close(nesterov(theta, g, v, eta, 0.0).theta, plain, BITWISE, what="Nesterov")


def test_blocks_are_checked() -> None:
    A, B, S = np.eye(3), np.eye(2), np.ones((2, 3))
    with pytest.raises(ValueError, match=r"`A` must have shape \(3, 3\), got \(2, 2\)"):
        ekfac_matrix(B, A, S)
    with pytest.raises(ValueError, match=r"`V` must have shape \(2, 3\), got \(3, 2\)"):
        ekfac_product(A, B, S, S.T)
