"""Convolutional networks: the forward pass, Jacobians, and the factors of KFAC at T positions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import correlate

from reference import (
    MLP,
    CategoricalKL,
    Discrepancy,
    KFACFactors,
    SquaredEuclidean,
    complex_step_jacobian,
    ekfac_basis,
    ekfac_eigenvalues,
    fsd_hessian,
    kfac_factors,
)
from reference.analytic import ACTIVATIONS
from reference.arrays import Array
from reference.convolution import ConvNet, Image, patch_selection
from verification.l0_oracle.rounding import pass_errors
from verification.strategies import conv_nets, parameters
from verification.strategies.spd import rotation
from verification.tolerances import (
    BITWISE,
    FUNCTION,
    PROPAGATED,
    PROPAGATED_COMPLEX,
    ROUNDING,
    assert_close,
)

seeds = st.integers(0, 2**16)


def draw_pass(data: st.DataObject, **options) -> tuple[ConvNet, Array, Array]:
    network = data.draw(conv_nets(**options), label="network")
    theta = data.draw(parameters(network), label="theta")
    rows = data.draw(st.integers(1, 3), label="examples")
    rng = np.random.default_rng(data.draw(seeds, label="inputs seed"))
    return network, theta, rng.standard_normal((rows, network.input_size))


def geometry(network: ConvNet) -> tuple[int, int, int]:
    """(kernel, stride, padding), recovered from the first layer's positions in one channel."""
    channels, height, width = network.images[0]
    kernel = round((network.layers[0].shape[1] / channels) ** 0.5)
    for stride in (1, 2):
        for padding in (0, 1):
            R = patch_selection(network.images[0], kernel, stride, padding)[0]
            if R.shape == network.selections[0].shape and (R == network.selections[0]).all():
                return kernel, stride, padding
    raise AssertionError(f"no kernel fits {height} x {width}")


@given(st.data())
def test_outputs_are_those_of_scipy_correlate(data: st.DataObject) -> None:
    """One channel at a time over a padded image, then every stride-th position."""
    network, theta, X = draw_pass(data)
    kernel, stride, padding = geometry(network)
    sigma = ACTIVATIONS[network.activation].function
    rows = []
    for x in X:
        image = x.reshape(network.images[0])
        for layer in network.layers[:-1]:
            padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
            bias = np.zeros(layer.shape[0]) if layer.bias is None else theta[layer.bias]
            maps = []
            for weight, b in zip(layer.weight_matrix(theta), bias, strict=True):
                filters = weight.reshape(len(image), kernel, kernel)
                whole = correlate(padded, filters, mode="valid", method="direct")[0]
                maps.append(sigma(whole[::stride, ::stride] + b))
            image = np.stack(maps)
        last = network.layers[-1]
        bias = 0.0 if last.bias is None else theta[last.bias]
        rows.append(last.weight_matrix(theta) @ image.ravel() + bias)
    errors = pass_errors(network, theta, X)
    scale = float(np.linalg.norm(errors.e_z))
    assert_close(errors.z, np.stack(rows), PROPAGATED, size=1, scale=scale, what="z")


@given(st.data())
def test_jacobian_is_the_complex_step_of_the_outputs(data: st.DataObject) -> None:
    network, theta, X = draw_pass(data)
    numeric = complex_step_jacobian(lambda u: network.outputs(u, X).ravel(), theta)
    errors = pass_errors(network, theta, X)
    scale = float(np.linalg.norm(errors.e_J))
    expected = numeric.reshape(errors.J.shape)
    assert_close(errors.J, expected, PROPAGATED_COMPLEX, size=1, scale=scale, what="J")


@given(st.data())
def test_one_position_is_a_dense_layer(data: st.DataObject) -> None:
    """A kernel as large as the image: T = 1, and everything is that of a perceptron."""
    side = data.draw(st.integers(1, 3), label="side")
    in_, out, C = (data.draw(st.integers(1, 2), label=name) for name in ("in", "out", "C"))
    activation = data.draw(st.sampled_from(["tanh", "identity"]), label="activation")
    bias = data.draw(st.booleans(), label="bias")
    conv = ConvNet((in_, side, side), [out], C, side, activation=activation, bias=bias)
    dense = MLP([in_ * side**2, out, C], activation, bias)
    theta = data.draw(parameters(dense), label="theta")
    X = np.random.default_rng(data.draw(seeds, label="seed")).standard_normal((3, conv.input_size))
    errors, rho = pass_errors(dense, theta, X), SquaredEuclidean()
    scale = float(np.linalg.norm(errors.e_J))
    assert_close(conv.jacobian(theta, X), errors.J, PROPAGATED, size=1, scale=scale, what="J")
    # B's terms are products of two derivatives, and A's of two activations.
    products = scale * (1.0 + float(np.linalg.norm(errors.J)))
    products += float(np.sum(np.abs(dense.trace(theta, X).layer_inputs[1]) ** 2))
    for ours, theirs in zip(
        kfac_factors(conv, rho, theta, X), kfac_factors(dense, rho, theta, X), strict=True
    ):
        for name, a, b in zip("AB", ours, theirs, strict=True):
            assert_close(a, b, FUNCTION, size=conv.input_size, scale=products, what=name)


@pytest.mark.parametrize("rho", [SquaredEuclidean(), CategoricalKL()], ids=["squared", "kl"])
@given(st.data())
def test_factors_are_sums_and_means_over_positions(rho: Discrepancy, data: st.DataObject) -> None:
    """A = E sum_t a_t a_t^T and B = 1/T E sum_t D_t^T H_rho D_t, by loops over everything."""
    network, theta, X = draw_pass(data)
    trace, N = network.trace(theta, X), len(X)
    H = rho.output_hessian(trace.outputs)
    factors = kfac_factors(network, rho, theta, X)
    for (A, B), (a, D) in zip(factors, trace.positions, strict=True):
        T = a.shape[1]
        places = [(n, t) for n in range(N) for t in range(T)]
        expected_A = sum(np.outer(a[n, t], a[n, t]) for n, t in places) / N
        expected_B = sum(D[n, :, t].T @ H[n] @ D[n, :, t] for n, t in places) / (N * T)
        size, magnitude = N * T + 2 * D.shape[1], float(np.sum(np.abs(D)) ** 2)
        assert_close(A, expected_A, ROUNDING, size=N * T, scale=float(np.sum(a**2)), what="A")
        assert_close(B, expected_B, ROUNDING, size=size, scale=magnitude, what="B")


def first_block(network: ConvNet, theta: Array, X: Array) -> Array:
    """The first convolution's block of G, with squared error."""
    weight = network.layers[0].weight
    return fsd_hessian(network, SquaredEuclidean(), theta, X)[weight, weight]


def with_head(network: ConvNet, head: Array, seed: int) -> Array:
    """Normal theta with `head`, (C, T, out), for the dense layer's weight."""
    theta = np.random.default_rng(seed).standard_normal(network.size)
    flat = head.swapaxes(1, 2).reshape(len(head), -1)  # channels first
    theta[network.layers[-1].weight] = flat.ravel(order="F")
    return theta


@given(seed=seeds, out=st.integers(1, 2), side=st.integers(2, 3))
def test_g_is_kfac_where_derivatives_of_two_positions_do_not_correlate(
    seed: int, out: int, side: int
) -> None:
    """A linear convolution under a head with orthonormal columns: D_t^T D_s = 1 (t = s) I.

    Patches overlap and their second moments differ, but B is the same at every position.
    """
    T = (side - 1) ** 2
    network = ConvNet((1, side, side), [out], out * T, 2, activation="identity", bias=False)
    theta = with_head(network, rotation(out * T, seed).reshape(out * T, T, out), seed)
    X = np.random.default_rng(seed + 1).standard_normal((4, side**2))
    factors = kfac_factors(network, SquaredEuclidean(), theta, X)[0]
    size = 4 * (T + out * T)
    G, scale = first_block(network, theta, X), float(np.sum(X**2)) * out * T
    assert_close(G, np.kron(*factors), ROUNDING, size=size, scale=scale, what="G of the layer")
    assert_close(factors.B, np.eye(out), ROUNDING, size=size, scale=float(out * T), what="B")


def test_g_is_not_kfac_where_every_position_has_the_same_derivative() -> None:
    """Necessity: under average pooling G holds all pairs of positions, KFAC the equal ones alone.

    On a constant image every a_t is the same, and G = T A kron B.
    """
    network = ConvNet((1, 3, 3), [1], 1, 2, activation="identity", bias=False)
    theta, X = with_head(network, np.ones((1, 4, 1)) / 4.0, 0), np.ones((1, 9))
    factors = kfac_factors(network, SquaredEuclidean(), theta, X)[0]
    G = first_block(network, theta, X)
    assert_close(G, 4.0 * np.kron(*factors), ROUNDING, what="G")
    assert_close(factors.A, 4.0 * np.ones((4, 4)), ROUNDING, what="A")
    assert_close(factors.B, np.ones((1, 1)) / 16.0, ROUNDING, what="B")


@given(st.data())
def test_ekfac_corrects_the_eigenvalues_at_positions_too(data: st.DataObject) -> None:
    """In KFC's eigenbasis no diagonal is nearer to G_l: neither KFC's own nor a random one."""
    network, theta, X = draw_pass(data, max_layers=1)
    factors = kfac_factors(network, SquaredEuclidean(), theta, X)[0]
    G, basis = first_block(network, theta, X), ekfac_basis(KFACFactors(*factors))
    best, U = ekfac_eigenvalues(G, basis), np.kron(basis.U_A, basis.U_B)

    def distance(values: Array) -> float:
        return float(np.linalg.norm(G - U * values.ravel(order="F") @ U.T))

    kfc = np.outer(basis.beta, basis.alpha)
    noise = np.random.default_rng(0).standard_normal(best.shape) * np.linalg.norm(best)
    slack = ROUNDING.allowed(size=len(G), iterations=6) * float(np.linalg.norm(G))
    assert distance(best) <= min(distance(kfc), distance(best + noise)) + slack


def test_selection_copies_patches() -> None:
    """Two channels of 2 x 3 pixels, kernel 2, no padding: two patches, channel by channel."""
    R, grid = patch_selection(Image(2, 2, 3), 2)
    x = np.arange(12.0)
    assert grid == (1, 2)
    expected = np.array([[0, 1, 3, 4, 6, 7, 9, 10], [1, 2, 4, 5, 7, 8, 10, 11]], dtype=float)
    assert_close(R @ x, expected, BITWISE, what="patches")


def test_convolutions_check_their_sizes() -> None:
    with pytest.raises(ValueError, match=r"must be positive, got \[1, 3\], \[1\], 1, 2 and 1"):
        ConvNet((1, 3), [1], 1)
    with pytest.raises(ValueError, match=r"must be positive, got \[1, 3, 3\], \[\], 1, 2 and 1"):
        ConvNet((1, 3, 3), [], 1)
    with pytest.raises(ValueError, match=r"`kernel` must fit into the image .* kernel of 4, padd"):
        ConvNet((1, 3, 3), [1], 1, kernel=4)
    with pytest.raises(ValueError, match=r"`activation` must be one of .* got 'gelu'; choose one"):
        ConvNet((1, 3, 3), [1], 1, activation="gelu")
