"""Convolutional networks: layers whose weight is applied at every position of an image.

| symbol | meaning | shape |
|---|---|---|
| X | images, one a row: channel by channel, each row by row | (N, channels height width) |
| T | positions of the kernel | |
| a_{l-1} | patches that layer l reads, a patch channel by channel | (N, T, channels k k) |
| W_l | kernels, one a row | (out, channels k k) |
| s_l | pre-activations, channels last; the next image is stored channels first | (N, T, out) |
| R | selection: patches[t, i] = sum_d R[t, i, d] x[d], with entries 0 and 1 | (T, in, d) |

With T = 1 a convolution is a dense layer on the whole image.
"""

from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np

from reference.analytic import ACTIVATIONS
from reference.arrays import Array, one_of
from reference.networks import Network, Trace, affine, lay_out


class Image(NamedTuple):
    """The size of an image."""

    channels: int
    height: int
    width: int

    @property
    def size(self) -> int:
        """Its number of pixels times channels."""
        return self.channels * self.height * self.width


@final
class ConvNet(Network):
    """Convolutions with square kernels, each followed by sigma, and one dense layer at the end.

    A convolution is the cross-correlation s_t = W a_t + b, as everywhere in deep learning.

    Args:
        image: (channels, height, width) of the input.
        channels: of each convolution's output; at least one.
        outputs: C.
        kernel: k, the kernels' height and width.
        stride: steps between two positions, in both directions.
        padding: zeros around the image, on every side.
        activation: as of `MLP`.
        bias: whether every layer has a bias.

    Raises:
        ValueError: a size is not positive, or a kernel is larger than its padded image.

    Source: Grosse and Martens 2016, section 2.
    """

    def __init__(
        self,
        image: Sequence[int],
        channels: Sequence[int],
        outputs: int,
        kernel: int = 2,
        stride: int = 1,
        padding: int = 0,
        activation: str = "tanh",
        bias: bool = True,
    ) -> None:
        if len(image) != 3 or not channels or min(*image, *channels, outputs, kernel, stride) < 1:
            raise ValueError(
                "`image`, `channels`, `outputs`, `kernel` and `stride` must be positive, got "
                f"{list(image)}, {list(channels)}, {outputs}, {kernel} and {stride}; give "
                "(channels, height, width), and at least one convolution."
            )
        self.activation = one_of("activation", activation, list(ACTIVATIONS))
        self.images = [Image(*image)]
        self.selections: list[Array] = []
        for out in channels:
            R, grid = patch_selection(self.images[-1], kernel, stride, padding)
            self.selections.append(R)
            self.images.append(Image(out, *grid))
        self.input_size, self.output_size = self.images[0].size, int(outputs)
        shapes = [(out, R.shape[1]) for out, R in zip(channels, self.selections, strict=True)]
        self.layers = lay_out([*shapes, (self.output_size, self.images[-1].size)], bias)

    def _trace(self, theta: Array, X: Array) -> Trace:
        sigma = ACTIVATIONS[self.activation]
        inputs, pre_activations, x = [], [], X
        for layer, R in zip(self.layers[:-1], self.selections, strict=True):
            inputs.append(np.einsum("tid,nd->nti", R, x))
            s = affine(layer, theta, inputs[-1])  # (N, T, out)
            pre_activations.append(s)
            x = _channels_first(sigma.function(s))
        inputs.append(x)
        z = affine(self.layers[-1], theta, x)
        D = np.broadcast_to(np.eye(self.output_size), (len(X), self.output_size, self.output_size))
        backprop = [D]
        Dx = D @ self.layers[-1].weight_matrix(theta)  # (N, C, out T)
        for index in range(len(self.selections) - 1, -1, -1):
            s, layer, R = pre_activations[index], self.layers[index], self.selections[index]
            Da = _channels_last(Dx, s.shape[2])  # (N, C, T, out)
            D = Da * sigma.slope(s)[:, None]
            backprop.insert(0, D)
            Dx = np.einsum("tid,ncti->ncd", R, D @ layer.weight_matrix(theta))
        return Trace(z, inputs, backprop)


def patch_selection(
    image: Image, kernel: int, stride: int = 1, padding: int = 0
) -> tuple[Array, tuple[int, int]]:
    """R, (T, channels k k, d), and the grid (rows, columns) of its T positions.

    Raises:
        ValueError: the kernel does not fit into the padded image, or the padding is negative.
    """
    rows, columns = (
        (length + 2 * padding - kernel) // stride + 1 for length in (image.height, image.width)
    )
    if padding < 0 or min(rows, columns) < 1:
        raise ValueError(
            f"`kernel` must fit into the image with `padding` >= 0, got a kernel of {kernel}, "
            f"padding {padding} and {image}; take a smaller kernel."
        )
    R = np.zeros((rows, columns, image.channels, kernel, kernel, *image))
    for r, c, dr, dc in np.ndindex(rows, columns, kernel, kernel):
        y, x = r * stride + dr - padding, c * stride + dc - padding
        if 0 <= y < image.height and 0 <= x < image.width:  # else a zero of the padding
            for channel in range(image.channels):
                R[r, c, channel, dr, dc, channel, y, x] = 1.0
    return R.reshape(rows * columns, image.channels * kernel**2, image.size), (rows, columns)


def _channels_first(a: Array) -> Array:
    """(N, T, out) -> (N, out T), the order in which images are stored."""
    return a.swapaxes(1, 2).reshape(len(a), -1)


def _channels_last(D: Array, channels: int) -> Array:
    """(N, C, out T) -> (N, C, T, out)."""
    return D.reshape(*D.shape[:2], channels, -1).swapaxes(2, 3)
