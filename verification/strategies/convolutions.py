"""Small convolutional networks."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from reference.convolution import ConvNet


@st.composite
def conv_nets(
    draw: st.DrawFn,
    *,
    activations: Sequence[str] = ("tanh", "sigmoid", "softplus", "identity"),
    max_layers: int = 2,
    max_outputs: int = 2,
) -> ConvNet:
    """Kernels of 1 or 2, strides of 1 or 2, padding 0 or 1 on images of up to 3 by 3 pixels.

    Args:
        draw: given by Hypothesis.
        activations: to choose from.
        max_layers: the most convolutions.
        max_outputs: the most outputs C.
    """
    padding = draw(st.integers(0, 1), label="padding")
    layers = draw(st.integers(1, max_layers), label="convolutions")
    kernel = draw(st.integers(1, 2), label="kernel")
    # Without padding every convolution may leave half of the pixels, rounded down.
    least = kernel if padding else max(kernel, 1 + (kernel - 1) * layers)
    stride = draw(st.integers(1, 2 if padding or layers == 1 else 1), label="stride")
    sides = st.integers(least, max(least, 3))
    channels = draw(st.lists(st.integers(1, 2), min_size=layers, max_size=layers), label="channels")
    return ConvNet(
        (
            draw(st.integers(1, 2), label="input channels"),
            draw(sides, label="height"),
            draw(sides, label="width"),
        ),
        channels,
        draw(st.integers(1, max_outputs), label="outputs"),
        kernel,
        stride,
        padding,
        draw(st.sampled_from(list(activations)), label="activation"),
        draw(st.booleans(), label="bias"),
    )
