"""How the oracle's objects read in a falsifying example: as the call that builds them."""

from __future__ import annotations

import numpy as np

SEEDS_UP_TO = 2**16
"""Seeds are small integers, so that a printed case can be typed in again."""


def show(value: object) -> str:
    """`ClassName(attribute=value, ...)` of an object's public scalar attributes; arrays in full."""
    if isinstance(value, np.ndarray):
        return np.array2string(value, precision=17, separator=", ", threshold=100)
    if isinstance(value, str | int | float | tuple | list | dict | type(None)):
        return repr(value)
    scalars = {
        name: attribute
        for name, attribute in vars(value).items()
        if not name.startswith("_") and isinstance(attribute, str | int | float | tuple)
    }
    scalars.pop("layers", None)  # follows from the widths
    return f"{type(value).__name__}({', '.join(f'{k}={v!r}' for k, v in scalars.items())})"
