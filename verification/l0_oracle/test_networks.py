"""Outputs, Jacobians and layer quantities of the networks."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import MLP, FixedHead, Linear, Network, complex_step_jacobian
from reference.analytic import ACTIVATIONS
from reference.arrays import Array
from verification.l0_oracle import high_precision as hp
from verification.l0_oracle.rounding import pass_errors
from verification.strategies import FORMS, SMOOTH, networks, parameters
from verification.strategies.batches import inputs_of
from verification.tolerances import (
    BITWISE,
    COMPLEX_STEP,
    FUNCTION,
    PROPAGATED,
    PROPAGATED_COMPLEX,
    assert_close,
)

inputs_seed = st.integers(0, 2**16)


def draw_pass(data: st.DataObject, **options: Any) -> tuple[Network, Array, Array]:
    network = data.draw(networks(max_width=12, max_hidden=4, **options), label="network")
    theta = data.draw(parameters(network), label="theta")
    rows = data.draw(st.integers(1, 4), label="examples")
    rng = np.random.default_rng(data.draw(inputs_seed, label="inputs seed"))
    form = data.draw(st.sampled_from(FORMS), label="form of the inputs")
    return network, theta, inputs_of(form, rows, network.input_size, rng)


@given(st.data())
def test_jacobian_is_the_complex_step_of_the_outputs(data: st.DataObject) -> None:
    network, theta, X = draw_pass(data)
    numeric = complex_step_jacobian(lambda u: network.outputs(u, X).ravel(), theta)
    errors = pass_errors(network, theta, X)
    assert_close(
        network.jacobian(theta, X),
        numeric.reshape(errors.J.shape),
        PROPAGATED_COMPLEX,
        size=1,
        scale=float(np.linalg.norm(errors.e_J)),
        what="J",
    )


@given(st.data())
def test_outputs_equal_a_loop_in_fifty_digits(data: st.DataObject) -> None:
    network, theta, X = draw_pass(data, kinds=["mlp"], activations=SMOOTH)
    assert isinstance(network, MLP)
    bias = network.layers[0].bias is not None
    with hp.context():
        rows = [
            hp.mlp(hp.numbers(theta), hp.numbers(x), network.widths, network.activation, bias)
            for x in X
        ]
    errors = pass_errors(network, theta, X)
    assert_close(
        errors.z,
        np.array(rows, dtype=float),
        PROPAGATED,
        size=1,
        scale=float(np.linalg.norm(errors.e_z)),
        what="z",
    )


@given(st.data())
def test_layers_tile_theta(data: st.DataObject) -> None:
    network, _, _ = draw_pass(data)
    places = np.zeros(network.size, dtype=int)
    for layer in network.layers:
        places[layer.weight] += 1
        assert layer.weight.stop - layer.weight.start == layer.shape[0] * layer.shape[1]
        if layer.bias is not None:
            places[layer.bias] += 1
            assert layer.bias.stop - layer.bias.start == layer.shape[0]
    assert (places == 1).all(), places


@given(st.data())
def test_backprop_is_the_response_to_a_shift_of_the_pre_activations(data: st.DataObject) -> None:
    """dz/ds_l is what the bias sees, where there is one: J's bias columns."""
    network, theta, X = draw_pass(data, kinds=["mlp", "linear"])
    J = network.jacobian(theta, X)
    for layer, D in zip(network.layers, network.output_backprop(theta, X), strict=True):
        if layer.bias is not None:
            assert_close(J[:, :, layer.bias], D, BITWISE, what="dz/db")


@given(st.data())
def test_an_mlp_without_hidden_layers_is_linear(data: st.DataObject) -> None:
    linear, theta, X = draw_pass(data, kinds=["linear"])
    bias = linear.layers[0].bias is not None
    mlp = MLP([linear.input_size, linear.output_size], bias=bias)
    assert_close(mlp.outputs(theta, X), linear.outputs(theta, X), BITWISE, what="z")
    assert_close(mlp.jacobian(theta, X), linear.jacobian(theta, X), BITWISE, what="J")


@given(st.data())
def test_the_identity_makes_a_deep_linear_network(data: st.DataObject) -> None:
    """z = W_L ... W_1 x, and what the biases add."""
    network, theta, X = draw_pass(data, kinds=["mlp"], activations=["identity"])
    product, absolute = np.eye(network.input_size), np.eye(network.input_size)
    shift = absolute_shift = np.zeros(network.input_size)
    for layer in network.layers:
        W = layer.weight_matrix(theta)
        bias = 0.0 if layer.bias is None else theta[layer.bias]
        product, absolute = W @ product, np.abs(W) @ absolute
        shift, absolute_shift = W @ shift + bias, np.abs(W) @ absolute_shift + np.abs(bias)
    errors = pass_errors(network, theta, X)
    # The one side errs by e_z; the other by the sums of all layers, one after the other.
    sums = sum(layer.shape[1] + 2 for layer in network.layers) + network.input_size
    other = sums * (np.abs(X) @ absolute.T + absolute_shift)
    scale = float(np.linalg.norm(np.maximum(errors.e_z, other)))
    expected = X @ product.T + shift
    assert_close(errors.z, expected, PROPAGATED, size=1, scale=scale, what="z")


@given(st.data())
def test_fixed_heads_side_by_side_do_not_mix(data: st.DataObject) -> None:
    """Each block of outputs is its own C_l W_l x_l, computed example by example."""
    count = data.draw(st.integers(1, 3), label="layers")
    rng = np.random.default_rng(data.draw(inputs_seed, label="seed"))
    sizes = [tuple(rng.integers(1, 4, size=3)) for _ in range(count)]  # (C_l, out_l, in_l)
    blocks = [rng.standard_normal((c, out)) for c, out, _ in sizes]
    network = FixedHead(FixedHead.side_by_side(blocks), [int(in_) for _, _, in_ in sizes])
    theta, x = rng.standard_normal(network.size), rng.standard_normal(network.input_size)
    slices = np.split(x, np.cumsum([in_ for _, _, in_ in sizes])[:-1])
    expected = [
        block @ (layer.weight_matrix(theta) @ part)
        for block, layer, part in zip(blocks, network.layers, slices, strict=True)
    ]
    errors = pass_errors(network, theta, x[None])
    assert_close(
        errors.z[0],
        np.concatenate(expected),
        PROPAGATED,
        size=1,
        scale=float(np.linalg.norm(errors.e_z)),
        what="z",
    )


@pytest.mark.parametrize("name", list(ACTIVATIONS))
@given(s=st.floats(-700.0, 700.0))
def test_activation_slopes_are_complex_steps(name: str, s: float) -> None:
    sigma = ACTIVATIONS[name]
    numeric = complex_step_jacobian(lambda u: sigma.function(u), np.array([s]))[0]
    # A slope is at most 1 and a difference of numbers of at most 1.
    assert_close(sigma.slope(np.array([s])), numeric, COMPLEX_STEP, scale=1.0, what=f"{name}'({s})")


@pytest.mark.parametrize("name", [*SMOOTH, "identity"])
@given(s=st.floats(-50.0, 50.0))
def test_activations_have_the_values_of_mpmath(name: str, s: float) -> None:
    with hp.context():
        one = hp.numbers([1.0])
        expected = float(hp.mlp([*one, *one], hp.numbers([s]), (1, 1, 1), name, bias=False)[0])
    assert_close(
        ACTIVATIONS[name].function(np.array([s]))[0],
        np.float64(expected),
        FUNCTION,
        scale=1.0,
        what=f"{name}({s})",
    )


def test_networks_check_their_sizes() -> None:
    with pytest.raises(ValueError, match=r"`widths` must list two or more positive sizes, got \[3"):
        MLP([3])
    with pytest.raises(ValueError, match=r"`activation` must be one of .* got 'gelu'; choose one"):
        MLP([1, 1], "gelu")
    with pytest.raises(ValueError, match="`input_size` and `output_size` must be positive, got 0"):
        Linear(0, 1)
    with pytest.raises(ValueError, match="`heads` must be matrices with the same number of rows"):
        FixedHead([np.eye(2), np.eye(3)], [1, 1])
