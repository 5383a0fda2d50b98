"""A family's schedule begins and ends where its parameters say."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import schedules
from verification.tolerances import FUNCTION, assert_close


@pytest.mark.parametrize(
    ("family", "middle"),
    [
        (schedules.exponential, lambda first, last: np.sqrt(first * last)),
        (schedules.linear, lambda first, last: 0.5 * (first + last)),
    ],
    ids=["exponential", "linear"],
)
@given(psi=st.tuples(st.floats(-5, 1), st.floats(-5, 1)), half=st.integers(1, 15))
def test_the_ends_are_the_exponentials_of_psi_and_the_middle_is_their_mean(
    family: Callable[..., Any], middle: Callable[..., Any], psi: tuple[float, float], half: int
) -> None:
    values, _ = family(np.array(psi), 2 * half + 1)
    first, last = np.exp(psi)
    # The condition of exp at an argument of at most 5 is 5.
    expected = np.array([first, middle(first, last), last])
    assert_close(values[[0, half, -1]], expected, FUNCTION, condition=5.0, what="schedule")
