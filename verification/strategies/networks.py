"""Small networks, and parameters for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from reference.arrays import Array
from reference.networks import MLP, FixedHead, Linear, Network
from verification.strategies.readable import SEEDS_UP_TO

SMOOTH = ("tanh", "sigmoid", "softplus")
"""Activations with every derivative; ReLU has kinks, where no derivative is defined."""

NETWORK_KINDS = ("linear", "mlp", "fixed-head")


@st.composite
def networks(
    draw: st.DrawFn,
    *,
    kinds: Sequence[str] = NETWORK_KINDS,
    activations: Sequence[str] = (*SMOOTH, "relu"),
    min_outputs: int = 1,
    max_width: int = 3,
    max_hidden: int = 2,
    even: bool = False,
) -> Network:
    """A linear model, a multi-layer perceptron or parallel layers with fixed heads.

    Args:
        draw: given by Hypothesis.
        kinds: of `NETWORK_KINDS`.
        activations: of the hidden layers.
        min_outputs: the fewest outputs C (2 for a softmax that is not constant).
        max_width: the widest layer.
        max_hidden: the most hidden layers.
        even: two outputs: a mean and a log sigma.
    """
    kind = draw(st.sampled_from(list(kinds)), label="network")
    widths = st.integers(1, max_width)
    C = st.just(2) if even else st.integers(min_outputs, max(min_outputs, max_width))
    outputs = draw(C, label="outputs")
    if kind == "fixed-head":
        shapes = draw(st.lists(st.tuples(widths, widths), min_size=1, max_size=2), label="shapes")
        seed = draw(st.integers(0, SEEDS_UP_TO), label="head seed")
        rng = np.random.default_rng(seed)
        heads = [rng.standard_normal((outputs, out)) for out, _ in shapes]
        return FixedHead(heads, [in_ for _, in_ in shapes], rng.standard_normal(outputs))
    inputs = draw(widths, label="inputs")
    bias = draw(st.booleans(), label="bias")
    if kind == "linear":
        return Linear(inputs, outputs, bias)
    hidden = draw(st.lists(widths, min_size=1, max_size=max_hidden), label="hidden widths")
    activation = draw(st.sampled_from(list(activations)), label="activation")
    return MLP([inputs, *hidden, outputs], activation, bias)


@st.composite
def parameters(draw: st.DrawFn, network: Network, *, max_scale: float = 1.5) -> Array:
    """θ = scale · normal(seed), (n,); scale 0 gives θ = 0."""
    scale = draw(st.floats(0.0, max_scale), label="θ scale")
    seed = draw(st.integers(0, SEEDS_UP_TO), label="θ seed")
    return scale * np.random.default_rng(seed).standard_normal(network.size)
