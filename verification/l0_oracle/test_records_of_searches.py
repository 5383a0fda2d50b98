"""What the oracle's searches keep beside their results: iterates, and halves of sweeps."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from reference import MLP, KFACFactors
from reference.classical_methods import hessian_free
from reference.problem import symmetric_part
from reference.structured_optima import StructuredOptimum, best_ekfac, best_kronecker
from verification.profiles import share
from verification.tolerances import BITWISE, ROUNDING, SOLVE, assert_close

seeds = st.integers(0, 2**16)


@given(seed=seeds, n=st.integers(1, 4))
def test_a_krylov_search_keeps_its_start_and_one_iterate_of_every_product(
    seed: int, n: int
) -> None:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((n, n))
    M, theta = root @ root.T + np.eye(n), rng.standard_normal(n)
    products = 0

    def product(v: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        return M @ v

    step = hessian_free(theta, rng.standard_normal(n), product)
    assert len(step.iterates) == products + 1
    assert_close(step.iterates[0], theta, BITWISE)
    assert_close(step.iterates[-1], step.theta, BITWISE)


@given(seed=seeds, n=st.integers(1, 4))
def test_the_symmetric_part_has_the_same_quadratic_form_and_is_its_own_transpose(
    seed: int, n: int
) -> None:
    rng = np.random.default_rng(seed)
    M, v = rng.standard_normal((n, n)), rng.standard_normal(n)
    S = symmetric_part(M)
    assert_close(S, S.T, BITWISE)
    scale = float(np.abs(v) @ np.abs(M) @ np.abs(v))
    assert_close(v @ S @ v, v @ M @ v, ROUNDING, size=2 * n, scale=scale)


@share(0.5)
@given(seed=seeds)
def test_the_first_half_sweep_of_the_best_ekfac_is_the_best_non_negative_spectrum(
    seed: int,
) -> None:
    """For the A and B it starts from: Q-hat is a least squares problem in D >= 0, here by NNLS."""
    rng = np.random.default_rng(seed)
    network = MLP([2, 2], "tanh", bias=False)
    n = network.size
    g, root = rng.standard_normal((6, n)), rng.standard_normal((n, n))
    M = root @ root.T / n + np.eye(n)
    A, B = rng.standard_normal((2, 2)), rng.standard_normal((2, 2))
    found = best_ekfac(g, M, network.layers, [[KFACFactors(A, B)]], sweeps=1)

    R = np.linalg.cholesky(M).T
    columns = np.kron(A, B)  # k of eq. 9: P = sum_k D_k k k^T
    root_g = g.T / np.sqrt(len(g))
    design = np.stack([(R @ np.outer(k, k) @ root_g).ravel() for k in columns.T], axis=1)
    target = np.linalg.solve(R.T, root_g).ravel()
    left = nnls(design, target)[1]
    gain = 0.5 * target @ target
    condition = float(np.linalg.cond(design)) ** 2 + float(np.linalg.cond(M))
    # It starts from D = 1, which is kept where it is no worse.
    P = columns @ columns.T
    before = 0.5 * np.sum((R @ P @ root_g - np.linalg.solve(R.T, root_g)) ** 2) - gain
    expected = min(0.5 * left**2 - gain, before)
    error = SOLVE.allowed(size=n, condition=condition) * gain
    assert abs(found.history[1] - expected) <= error


def test_a_start_with_a_column_of_zeros_is_one_direction_less() -> None:
    """Its unit column does not exist: the column stays 0, and the search goes on from there."""
    rng = np.random.default_rng(0)
    network = MLP([2, 2], "tanh", bias=False)
    g, start = rng.standard_normal((6, 4)), KFACFactors(np.diag([1.0, 0.0]), np.eye(2))
    found = best_ekfac(g, np.eye(4), network.layers, [[start]], sweeps=1)
    assert np.isfinite(found.P).all()
    assert found.value < found.history[0]


@pytest.mark.parametrize("search", [best_kronecker, best_ekfac])
@pytest.mark.parametrize("sweeps", [0, 1, 2])
def test_a_search_makes_no_more_sweeps_than_it_may(
    search: Callable[..., StructuredOptimum], sweeps: int
) -> None:
    """Its history has the start and two halves a sweep; two sweeps are too few to stop before."""
    rng = np.random.default_rng(0)
    network = MLP([2, 2], "tanh", bias=False)
    start = KFACFactors(rng.standard_normal((2, 2)), rng.standard_normal((2, 2)))
    found = search(rng.standard_normal((6, 4)), np.eye(4), network.layers, [[start]], sweeps)
    assert len(found.history) == 1 + 2 * sweeps
