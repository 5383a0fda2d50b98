"""The best A kron B and A, B, S in another unit of the gradients, and without any gradient."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import MLP, KFACFactors
from reference.arrays import Array
from reference.optimal_preconditioners import LinearOptimum, dense, diagonal, scalar
from reference.structured_optima import StructuredOptimum, best_ekfac, best_kronecker
from verification.profiles import share
from verification.tolerances import BITWISE, assert_close

Search = Callable[..., StructuredOptimum]
searches = pytest.mark.parametrize("search", [best_kronecker, best_ekfac])
IDENTITY = [[KFACFactors(np.eye(2), np.eye(2)), KFACFactors(np.eye(2), np.eye(1))]]


def two_layers(seed: int) -> tuple[MLP, Array, Array]:
    """A network, mini-batch gradients, and a positive definite M."""
    rng = np.random.default_rng(seed)
    network = MLP([2, 2, 1], "tanh", bias=False)
    root = rng.standard_normal((network.size, network.size))
    M = root @ root.T / network.size + np.eye(network.size)
    return network, rng.standard_normal((5, network.size)), M


@searches
@share(0.1)
@given(seed=st.integers(0, 2**16), exponent=st.sampled_from([-20, 20]))
def test_gradients_of_another_unit_take_the_same_sweeps_to_the_same_preconditioner(
    search: Search, seed: int, exponent: int
) -> None:
    """Q-hat is quadratic in g; a power of two changes no digit of any step."""
    network, gradients, M = two_layers(seed)
    plain = search(gradients, M, network.layers, IDENTITY)
    scaled = search(2.0**exponent * gradients, M, network.layers, IDENTITY)
    assert len(scaled.history) == len(plain.history)
    units = 4.0**exponent * np.array(plain.history)
    assert_close(np.array(scaled.history), units, BITWISE, what="history")
    assert_close(scaled.P, plain.P, BITWISE, what="P")


@searches
def test_without_gradients_every_value_is_zero_and_no_sweep_gains(search: Search) -> None:
    """Every P is best: the start stays."""
    network, gradients, M = two_layers(0)
    found = search(np.zeros_like(gradients), M, network.layers, IDENTITY)
    assert found.value == 0.0
    assert found.gradient_norm == 0.0
    assert not np.any(found.history)
    assert len(found.history) <= 5


@pytest.mark.parametrize("exponent", [-40, 40])
@pytest.mark.parametrize("structure", [scalar, diagonal, dense])
def test_gradients_of_another_unit_have_the_same_linear_optimum(
    structure: Callable[..., LinearOptimum], exponent: int
) -> None:
    """H and b grow by the same power of two, and so does what counts as curvature."""
    _, gradients, M = two_layers(0)
    plain, scaled = (structure(unit * gradients[:, :3], M[:3, :3]) for unit in (1.0, 2.0**exponent))
    assert scaled.rank == plain.rank
    assert_close(scaled.P, plain.P, BITWISE)
