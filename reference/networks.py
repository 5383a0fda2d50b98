"""Networks z = f(x, theta) with outputs, per-example Jacobians, and what KFAC reads at each layer.

| symbol | meaning | shape |
|---|---|---|
| theta | for each layer vec(W_l) (columns stacked), then b_l if it has a bias | (n,) |
| X | inputs, one example a row | (N, d) |
| z | outputs | (N, C) |
| W_l | weight of layer l, s_l = W_l a_{l-1} + b_l (P22 eq. 51) | (out_l, in_l) |
| a_{l-1} | what layer l reads (P22 eq. 52) | (N, in_l) |
| dz/ds_l | outputs by pre-activations: (dz/ds_l)^T Dz = Ds_l (P22 eq. 53-54) | (N, C, out_l) |
| J | dz/dtheta | (N, C, n) |
| T | positions at which a layer applies the same weight, for a convolution: a_{l-1} is then | |
| | (N, T, in_l) and dz/ds_l is (N, C, T, out_l) | |
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np

from reference.analytic import ACTIVATIONS
from reference.arrays import Array, finite_array, one_of, unvec


class Layer(NamedTuple):
    """Where one layer's weight and bias lie in theta."""

    weight: slice
    bias: slice | None
    shape: tuple[int, int]  # (out, in)

    @property
    def parameters(self) -> slice:
        """The layer's part of theta: vec(W), then b."""
        return slice(self.weight.start, (self.bias or self.weight).stop)

    def weight_matrix(self, vector: Array) -> Array:
        """This layer's W, or any theta-like vector's part at its place, (out, in)."""
        return unvec(vector[self.weight], self.shape)


class Trace(NamedTuple):
    """One forward pass and the backward passes of every output."""

    outputs: Array  # z, (N, C)
    layer_inputs: list[Array]  # a_{l-1}, (N, in_l) or (N, T, in_l)
    output_backprop: list[Array]  # dz/ds_l, (N, C, out_l) or (N, C, T, out_l)

    @property
    def positions(self) -> list[tuple[Array, Array]]:
        """a_{l-1}, (N, T, in_l), and dz/ds_l, (N, C, T, out_l), of each layer; T = 1 if dense."""
        return [
            (a[:, None, :], D[:, :, None, :]) if a.ndim == 2 else (a, D)
            for a, D in zip(self.layer_inputs, self.output_backprop, strict=True)
        ]


class Network(ABC):
    """An abstract map z = f(x, theta) made of layers s = W a + b.

    A subclass gives `_trace`; everything else follows from it. `theta` may be complex: every
    method is analytic in it (ReLU: away from its kinks).

    Attributes:
        input_size: d.
        output_size: C.
        layers: where each layer lies in theta.
    """

    input_size: int
    output_size: int
    layers: tuple[Layer, ...]

    @property
    def size(self) -> int:
        """n, the number of parameters."""
        return self.layers[-1].parameters.stop

    @abstractmethod
    def _trace(self, theta: Array, X: Array) -> Trace:
        """The passes through the network, of checked arguments."""

    def trace(self, theta: Any, X: Any) -> Trace:
        """z, a_{l-1} and dz/ds_l of every layer, for theta (n,) and X (N, d).

        Raises:
            ValueError: a shape is wrong or an entry is not finite.
        """
        theta = finite_array("theta", theta, (self.size,))
        return self._trace(theta, finite_array("X", X, ("N", self.input_size)))

    def outputs(self, theta: Any, X: Any) -> Array:
        """z = f(x, theta), (N, C)."""
        return self.trace(theta, X).outputs

    def output_backprop(self, theta: Any, X: Any) -> list[Array]:
        """dz/ds_l of every layer, each (N, C, out_l), or (N, C, T, out_l)."""
        return self.trace(theta, X).output_backprop

    def jacobian(self, theta: Any, X: Any) -> Array:
        """J = dz/dtheta, (N, C, n): dz/dvec(W_l) = a_{l-1}^T kron dz/ds_l and dz/db_l = dz/ds_l.

        Where a layer applies its weight at T positions, both are sums over them.

        Source: P22 eq. 55, one row for each output.
        """
        blocks = []
        for layer, (a, D) in zip(self.layers, self.trace(theta, X).positions, strict=True):
            dW = np.einsum("nti,ncto->ncio", a, D)  # vec's order
            blocks.append(dW.reshape(*D.shape[:2], -1))
            if layer.bias is not None:
                blocks.append(np.sum(D, axis=2))
        return np.concatenate(blocks, axis=2)


@final
class MLP(Network):
    """A multi-layer perceptron: a_l = sigma(W_l a_{l-1} + b_l), the last layer linear.

    Args:
        widths: (d, hidden..., C); two entries make a linear or softmax model.
        activation: "tanh", "sigmoid", "relu", "softplus" or "identity" (a deep linear network).
        bias: whether every layer has a bias.

    Source: P22 eq. 51-55.
    """

    def __init__(self, widths: Sequence[int], activation: str = "tanh", bias: bool = True) -> None:
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(
                f"`widths` must list two or more positive sizes, got {list(widths)}; "
                "give the input size first and the output size last."
            )
        self.widths = tuple(int(width) for width in widths)
        self.activation = one_of("activation", activation, list(ACTIVATIONS))
        self.input_size, self.output_size = self.widths[0], self.widths[-1]
        shapes = list(zip(self.widths[1:], self.widths[:-1], strict=True))
        self.layers = lay_out(shapes, bias)

    def _trace(self, theta: Array, X: Array) -> Trace:
        sigma = ACTIVATIONS[self.activation]
        last = len(self.layers) - 1
        inputs, pre_activations, a = [], [], X
        for index, layer in enumerate(self.layers):
            inputs.append(a)
            s = affine(layer, theta, a)
            pre_activations.append(s)
            a = s if index == last else sigma.function(s)
        D = np.broadcast_to(np.eye(self.output_size), (len(X), self.output_size, self.output_size))
        backprop = [D]
        for index in range(last, 0, -1):
            Da = D @ self.layers[index].weight_matrix(theta)  # eq. 53, (N, C, in)
            D = Da * sigma.slope(pre_activations[index - 1])[:, None, :]  # eq. 54
            backprop.insert(0, D)
        return Trace(a, inputs, backprop)


@final
class Linear(Network):
    """z = W x + b: with squared error a linear regression, with cross-entropy a softmax model."""

    def __init__(self, input_size: int, output_size: int, bias: bool = True) -> None:
        if min(input_size, output_size) < 1:
            raise ValueError(
                f"`input_size` and `output_size` must be positive, got {input_size} and "
                f"{output_size}; give the lengths of x and z."
            )
        self.input_size, self.output_size = int(input_size), int(output_size)
        self.layers = lay_out([(self.output_size, self.input_size)], bias)

    def _trace(self, theta: Array, X: Array) -> Trace:
        shape = (len(X), self.output_size, self.output_size)
        identity = np.broadcast_to(np.eye(self.output_size), shape)
        return Trace(affine(self.layers[0], theta, X), [X], [identity])


@final
class FixedHead(Network):
    """z = sum_l C_l W_l x_l + offset: parallel layers, each with its own slice x_l of the input.

    dz/ds_l = C_l is the same for every example, so the KFAC assumptions hold exactly wherever
    H_rho is constant and the cross blocks E[x_k x_l^T] kron C_k^T H_rho C_l vanish:
    * squared error with `side_by_side` heads (C_k^T C_l = 0), for any inputs;
    * KL with theta = 0 (then p = softmax(offset) for every x) and E[x_k x_l^T] = 0. There B_l is
      non-singular for a generic C_l with out_l <= C - 1.

    Args:
        heads: C_l, each (C, out_l), fixed.
        input_sizes: in_l, the lengths of the slices x_l.
        offset: (C,), fixed; zero if None.
    """

    def __init__(
        self, heads: Sequence[Any], input_sizes: Sequence[int], offset: Any = None
    ) -> None:
        self.heads = [finite_array("heads", head, ("C", "out")) for head in heads]
        rows = {len(head) for head in self.heads}
        if len(rows) != 1 or len(input_sizes) != len(self.heads) or min(input_sizes) < 1:
            raise ValueError(
                "`heads` must be matrices with the same number of rows, one for each of "
                f"`input_sizes` >= 1, got shapes {[head.shape for head in self.heads]} and sizes "
                f"{list(input_sizes)}; pad them with `FixedHead.side_by_side`."
            )
        self.output_size = rows.pop()
        self.input_sizes = tuple(int(size) for size in input_sizes)
        self.input_size = sum(self.input_sizes)
        offset = np.zeros(self.output_size) if offset is None else offset
        self.offset = finite_array("offset", offset, (self.output_size,))
        shapes = [
            (head.shape[1], size) for head, size in zip(self.heads, self.input_sizes, strict=True)
        ]
        self.layers = lay_out(shapes, bias=False)

    @staticmethod
    def side_by_side(blocks: Sequence[Any]) -> list[Array]:
        """Heads that write the products C_l W_l x_l one below the other instead of summing them."""
        blocks = [finite_array("blocks", block, ("C", "out")) for block in blocks]
        ends = np.cumsum([len(block) for block in blocks])
        heads = []
        for block, end in zip(blocks, ends, strict=True):
            head = np.zeros((int(ends[-1]), block.shape[1]))
            head[end - len(block) : end] = block
            heads.append(head)
        return heads

    def _trace(self, theta: Array, X: Array) -> Trace:
        inputs = np.split(X, np.cumsum(self.input_sizes)[:-1], axis=1)
        z = self.offset + sum(
            a @ layer.weight_matrix(theta).T @ head.T
            for layer, a, head in zip(self.layers, inputs, self.heads, strict=True)
        )
        backprop = [np.broadcast_to(head, (len(X), *head.shape)) for head in self.heads]
        return Trace(z, inputs, backprop)


def lay_out(shapes: Sequence[tuple[int, int]], bias: bool) -> tuple[Layer, ...]:
    """Place vec(W_l), then b_l, of every layer one after the other."""
    layers, start = [], 0
    for out, in_ in shapes:
        end = start + out * in_
        layers.append(Layer(slice(start, end), slice(end, end + out) if bias else None, (out, in_)))
        start = end + out * bias
    return tuple(layers)


def affine(layer: Layer, theta: Array, a: Array) -> Array:
    """S = a W^T + b for rows a, (..., in) -> (..., out)."""
    s = a @ layer.weight_matrix(theta).T
    return s if layer.bias is None else s + theta[layer.bias]
