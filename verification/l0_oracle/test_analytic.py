"""The analytic functions against SciPy's, along the last axis of arrays of any dimension."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from reference import analytic
from verification.tolerances import FUNCTION, assert_close

PAIRS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "logsumexp": (analytic.logsumexp, lambda z: special.logsumexp(z, axis=-1)),
    "log_softmax": (analytic.log_softmax, lambda z: special.log_softmax(z, axis=-1)),
    "softmax": (analytic.softmax, lambda z: special.softmax(z, axis=-1)),
    "sigmoid": (analytic.sigmoid, special.expit),
    "softplus": (analytic.softplus, lambda z: np.logaddexp(0.0, z)),
}


@pytest.mark.parametrize("name", PAIRS)
@given(
    seed=st.integers(0, 2**16),
    before=st.lists(st.integers(1, 3), max_size=2),
    size=st.sampled_from([0.1, 10.0, 1000.0]),
)
def test_an_analytic_function_is_scipys(
    name: str, seed: int, before: list[int], size: float
) -> None:
    """Also where a naive exponential overflows."""
    z = size * np.random.default_rng(seed).standard_normal((*before, 4))
    ours, theirs = PAIRS[name]
    # A difference of logarithms errs by the rounding of what is subtracted, that is of z; tanh and
    # the sigmoid made of it by that of 1.
    scale = {"sigmoid": float(np.sqrt(z.size))}.get(name, float(np.linalg.norm(z)))
    if name == "softmax":
        scale = float(np.sqrt(z.size)) * max(1.0, size)
    assert_close(ours(z), theirs(z), FUNCTION, size=8, scale=scale, what=name)
