"""What the oracle's searches keep beside their results: iterates, and halves of sweeps."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from reference import MLP, KFACFactors
from reference.arrays import Array
from reference.classical_methods import hessian_free
from reference.noisy_quadratic import NoisyQuadratic
from reference.problem import symmetric_part
from reference.schedules import Family, optimize
from reference.structured_optima import StructuredOptimum, best_ekfac, best_kronecker
from verification.profiles import share
from verification.tolerances import BITWISE, FUNCTION, ROUNDING, SOLVE, assert_close

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


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_start_with_a_column_of_zeros_is_one_direction_less(factor: str) -> None:
    """Its unit column does not exist: the column stays 0, and the search goes on from there."""
    rng = np.random.default_rng(0)
    network = MLP([2, 2], "tanh", bias=False)
    flat = np.diag([1.0, 0.0])
    start = KFACFactors(*((flat, np.eye(2)) if factor == "A" else (np.eye(2), flat)))
    g = rng.standard_normal((6, 4))
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


def test_the_slope_of_an_optimum_is_the_largest_that_is_left() -> None:
    """At a kink, where a search must end, one slope stays; of a parameter without effect none is.

    With eta = exp|psi_0| and h = v = E x^2 = 1 the loss is (1 - eta)^2 + eta^2, halved, which
    rises from eta = 1/2 on.
    """

    def schedule(psi: Array, steps: int) -> tuple[Array, Array]:
        s = np.full(steps, np.exp(np.abs(psi[0])))
        return s, np.stack([s * np.sign(psi[0]), 0.0 * s], axis=1)

    family = Family("rate", schedule, lambda steps: [np.array([0.3, 0.2])])
    best = optimize(NoisyQuadratic([1.0], [1.0]), [1.0], 1, family)
    eta = np.exp(np.abs(best.psi[0]))
    slope = eta * (4.0 * eta - 2.0) / ((1.0 - eta) ** 2 + eta**2)
    assert_close(np.array(best.slope), np.array(slope), FUNCTION, size=4)
    assert best.slope >= 2.0


@given(seed=seeds)
def test_a_direction_that_no_gradient_has_gets_no_eigenvalue(seed: int) -> None:
    """All gradients lie along two columns of A kron B; their parts along the others are rounding.

    With M = 4 I the best P on the two is I / 4; what rounding would make of the others is not 0.
    """
    rng = np.random.default_rng(seed)
    network = MLP([2, 2], "tanh", bias=False)
    A, B = (np.linalg.qr(rng.standard_normal((2, 2)))[0] for _ in "AB")
    seen = np.kron(A, B)[:, :2]  # of the first column of A
    found = best_ekfac(
        [[3.0, 0.0], [0.0, 1.0]] @ seen.T, 4.0 * np.eye(4), network.layers, [[KFACFactors(A, B)]], 1
    )
    assert not found.blocks[0].S[:, 1].any()
    assert_close(found.P, 0.25 * seen @ seen.T, SOLVE, size=4, condition=9.0)
