"""vec, and the checks of what comes in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import MLP, CrossEntropy, Problem, SquaredError, unvec, vec
from reference.arrays import finite_array, non_negative, one_of
from verification.tolerances import BITWISE, ROUNDING, assert_close

shapes = st.tuples(st.integers(1, 4), st.integers(1, 4))
seeds = st.integers(0, 2**16)


@given(shape=shapes, seed=seeds)
def test_vec_stacks_columns_and_unvec_undoes_it(shape: tuple[int, int], seed: int) -> None:
    M = np.random.default_rng(seed).standard_normal(shape)
    stacked = np.concatenate([M[:, k] for k in range(shape[1])])
    assert_close(vec(M), stacked, BITWISE, what="vec")
    assert_close(unvec(vec(M), shape), M, BITWISE, what="unvec(vec)")


@given(shape=shapes, seed=seeds)
def test_kron_times_vec_is_a_two_sided_product(shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    out, in_ = shape
    A, B = rng.standard_normal((in_, in_)), rng.standard_normal((out, out))
    X = rng.standard_normal(shape)
    magnitude = float(np.linalg.norm(np.abs(B) @ np.abs(X) @ np.abs(A).T))
    assert_close(
        np.kron(A, B) @ vec(X),
        vec(B @ X @ A.T),
        ROUNDING,
        size=out * in_,
        scale=magnitude,
        what="(A kron B) vec(X)",
    )


@pytest.mark.parametrize(
    ("value", "shape", "error", "message"),
    [
        ([1.0, np.nan], (2,), ValueError, "`x` must be finite, got 1 NaN or infinite of 2 entries"),
        ([[1.0]], (1,), ValueError, r"`x` must have shape \(1,\), got \(1, 1\); reshape it"),
        ([[1.0, 2.0]], ("n", "n"), ValueError, r"`x` must have shape \(n, n\), got \(1, 2\)"),
        (np.zeros((0, 2)), ("N", 2), ValueError, r"`x` must have shape \(N, 2\), got \(0, 2\)"),
        (["a"], (1,), TypeError, "`x` must be numeric, got dtype"),
    ],
)
def test_arrays_are_checked(
    value: object, shape: tuple[int | str, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        finite_array("x", value, shape)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_weights_are_checked(value: float) -> None:
    with pytest.raises(ValueError, match="`fsd_weight` must be non-negative and finite, got"):
        non_negative("fsd_weight", value)


def test_choices_are_checked() -> None:
    with pytest.raises(ValueError, match=r"`order` must be one of \['a', 'b'\], got 'c'; choose"):
        one_of("order", "c", ["b", "a"])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (np.array([0.0, 1.0]), "`targets` must be 2 integer labels, got dtype float64"),
        (np.array([0]), r"`targets` must be 2 integer labels, got dtype int64 and shape \(1,\)"),
        (np.array([0, 3]), r"`targets` must be labels in \[0, 3\), got 0..3; renumber"),
        (np.array([-1, 0]), r"`targets` must be labels in \[0, 3\), got -1..0; renumber"),
    ],
)
def test_labels_are_checked(targets: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossEntropy().value(np.zeros((2, 3)), targets)


def test_problems_check_parameters_inputs_and_targets() -> None:
    problem = Problem(MLP([2, 3]), SquaredError())
    theta, X, T = np.zeros(9), np.zeros((4, 2)), np.zeros((4, 3))
    with pytest.raises(ValueError, match=r"`theta` must have shape \(9,\), got \(8,\)"):
        problem.gradient(theta[:-1], X, T)
    with pytest.raises(ValueError, match=r"`X` must have shape \(N, 2\), got \(4, 3\)"):
        problem.gradient(theta, T, T)
    with pytest.raises(ValueError, match=r"`targets` must have shape \(4, 3\), got \(3, 3\)"):
        problem.gradient(theta, X, T[:-1])
