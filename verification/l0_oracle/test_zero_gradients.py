"""Where no mini-batch has a gradient, every preconditioner is best, and the shortest is zero."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import optimal_preconditioners
from reference.optimal_preconditioners import LinearOptimum


@pytest.mark.parametrize(
    "structure",
    [
        optimal_preconditioners.scalar,
        optimal_preconditioners.diagonal,
        optimal_preconditioners.dense,
    ],
)
@given(m=st.integers(1, 3), n=st.integers(1, 4))
def test_without_gradients_the_optimum_is_zero(
    structure: Callable[..., LinearOptimum], m: int, n: int
) -> None:
    """H = 0 and b = 0: the minimizer with the shortest phi, of rank 0, and no 0/0."""
    found = structure(np.zeros((m, n)), np.eye(n))
    assert not found.P.any()
    assert not found.phi.any()
    assert found.rank == 0
