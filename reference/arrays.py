"""Arrays of float64 (complex128 under a complex step), vec, and the checks of what comes in.

| paper | here | shape |
|---|---|---|
| vec(M) | `vec(M)` | columns stacked: (rows, columns) -> (rows * columns,) |
| theta | `theta` | (n,): for each layer vec(W), then b if the layer has a bias |
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def vec(matrix: Array) -> Array:
    """vec(M): the columns of M stacked, so that vec(B X A^T) = (A kron B) vec(X)."""
    return np.asarray(matrix).reshape(-1, order="F")


def unvec(vector: Array, shape: tuple[int, int]) -> Array:
    """The matrix M of `shape` with vec(M) = `vector`."""
    return np.asarray(vector).reshape(shape, order="F")


def finite_array(name: str, value: Any, shape: Sequence[int | str] | None = None) -> Array:
    """`value` as a finite float64 or complex128 array of `shape`.

    Args:
        name: what to call the value in an error.
        value: anything that NumPy makes an array of.
        shape: the shape required; a letter stands for any length of at least 1, the same letter
            for the same length.

    Raises:
        TypeError: the value is not numeric.
        ValueError: the shape is another one, or an entry is not finite.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "biufc":
        raise TypeError(
            f"`{name}` must be numeric, got dtype {array.dtype}; convert it to float64."
        )
    array = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64, copy=False)
    if shape is not None and not _fits(array.shape, shape):
        wanted = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"`{name}` must have shape {wanted}, got {array.shape}; reshape it.")
    if not np.isfinite(array).all():
        count = int(np.count_nonzero(~np.isfinite(array)))
        raise ValueError(
            f"`{name}` must be finite, got {count} NaN or infinite of {array.size} entries; "
            "remove them first."
        )
    return array


def non_negative(name: str, value: float) -> float:
    """`value` as a finite float >= 0.

    Raises:
        ValueError: it is negative, infinite or NaN.
    """
    if not (np.isfinite(value) and value >= 0.0):
        raise ValueError(
            f"`{name}` must be non-negative and finite, got {value}; use 0.0 to drop its term."
        )
    return float(value)


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    """`value`, which is one of `choices`.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {sorted(choices)}, got {value!r}; choose one.")
    return value


def _fits(actual: tuple[int, ...], wanted: Sequence[int | str]) -> bool:
    lengths: dict[str, int] = {}
    return len(actual) == len(wanted) and all(
        length == (want if isinstance(want, int) else lengths.setdefault(want, length))
        and (isinstance(want, int) or length > 0)
        for length, want in zip(actual, wanted, strict=True)
    )
