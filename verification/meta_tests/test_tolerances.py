"""A tolerance lets rounding pass and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verification import tolerances
from verification.strategies import SPD, spd_matrices
from verification.tolerances import (
    BITWISE,
    CENTRAL_DIFFERENCE,
    COMPLEX_STEP,
    FUNCTION,
    MINIMIZER,
    PROPAGATED,
    PROPAGATED_COMPLEX,
    ROUNDING,
    SOLVE,
    Tolerance,
    assert_close,
    recording,
)

NAMED = [
    ROUNDING,
    FUNCTION,
    SOLVE,
    COMPLEX_STEP,
    PROPAGATED,
    PROPAGATED_COMPLEX,
    CENTRAL_DIFFERENCE,
    MINIMIZER,
]


@contextmanager
def refused(match: str) -> Iterator[None]:
    """The block must fail with this message; its error/tolerance is not this test's."""
    with recording(), pytest.raises(AssertionError, match=match):
        yield


def perturbed(seed: int, n: int, error: float) -> tuple[np.ndarray, np.ndarray]:
    """A vector, and one at the relative distance `error` from it."""
    rng = np.random.default_rng(seed)
    expected, direction = rng.standard_normal((2, n))
    step = error * np.linalg.norm(expected) / np.linalg.norm(direction)
    return expected + step * direction, expected


def test_every_named_tolerance_is_tested_here() -> None:
    found = [value for value in vars(tolerances).values() if isinstance(value, Tolerance)]
    assert {t.name for t in found} == {t.name for t in [*NAMED, BITWISE]}


@pytest.mark.parametrize("tolerance", NAMED, ids=lambda t: t.name)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 20),
    decades=st.floats(0.0, 6.0),
    iterations=st.integers(1, 50),
)
def test_ten_tolerances_fail_and_a_tenth_passes(
    tolerance: Tolerance, seed: int, n: int, decades: float, iterations: int
) -> None:
    condition = 10.0**decades
    allowed = tolerance.allowed(condition=condition, size=n, iterations=iterations)
    case = {"condition": condition, "iterations": iterations, "what": "planted"}
    if allowed > 50 * np.finfo(float).eps:  # below, rounding blurs the planted error itself
        with recording() as worst:
            assert_close(*perturbed(seed, n, 0.1 * allowed), tolerance, **case)
        assert worst.value is not None
        assert 0.05 < worst.value < 0.2
    with refused("planted: error/tolerance = "):
        assert_close(*perturbed(seed, n, 10 * allowed), tolerance, **case)


@pytest.mark.parametrize("tolerance", NAMED, ids=lambda t: t.name)
def test_float32_has_its_own_epsilon(tolerance: Tolerance) -> None:
    single, double = tolerance.at(np.float32).allowed(), tolerance.allowed()
    ratio = np.finfo(np.float32).eps / np.finfo(np.float64).eps
    assert ratio**0.49 < single / double < ratio * 1.01
    assert tolerance.at(np.float32).name == f"{tolerance.name}[float32]"


@pytest.mark.parametrize("tolerance", NAMED, ids=lambda t: t.name)
@given(n=st.integers(1, 50), decades=st.floats(0.0, 8.0), iterations=st.integers(1, 50))
def test_a_harder_quantity_is_allowed_no_smaller_error(
    tolerance: Tolerance, n: int, decades: float, iterations: int
) -> None:
    here = tolerance.allowed(condition=10**decades, size=n, iterations=iterations)
    assert tolerance.allowed(condition=10 ** (decades + 1), size=n, iterations=iterations) > here
    assert tolerance.allowed(condition=10**decades, size=n + 1, iterations=iterations) > here
    assert tolerance.allowed(condition=10**decades, size=n, iterations=iterations + 1) > here


@given(matrix=spd_matrices(max_size=8, max_condition=1e8), seed=st.integers(0, 2**16))
def test_solve_bounds_what_two_ways_of_solving_differ_by(matrix: SPD, seed: int) -> None:
    n = len(matrix.eigenvalues)
    inverse = np.linalg.inv(matrix.matrix)
    x = np.random.default_rng(seed).standard_normal(n)
    solved = np.linalg.solve(matrix.matrix, x)
    condition = np.linalg.cond(matrix.matrix)
    scale = float(np.linalg.norm(inverse, 2) * np.linalg.norm(x))
    assert_close(inverse @ x, solved, SOLVE, condition=condition, scale=scale, what="A⁻¹x")


@pytest.mark.parametrize("tolerance", [BITWISE, *NAMED], ids=lambda t: t.name)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_caught_on_either_side(tolerance: Tolerance, bad: float) -> None:
    good = np.array([1.0, 2.0])
    evil = np.array([1.0, bad])
    for pair in [(evil, good), (good, evil), (evil, evil)]:
        with refused("error/tolerance = inf"):
            assert_close(*pair, tolerance)


@pytest.mark.parametrize("tolerance", [BITWISE, *NAMED], ids=lambda t: t.name)
def test_shape_and_dtype_must_agree(tolerance: Tolerance) -> None:
    with refused(r"G: shape \(2, 1\) where \(2,\) was expected"):
        assert_close(np.ones((2, 1)), np.ones(2), tolerance, what="G")
    with refused("dtype float32 where .* is for float64"):
        assert_close(np.ones(2, np.float32), np.ones(2), tolerance)
    assert_close(np.ones(2, np.float32), np.ones(2, np.float32), tolerance.at(np.float32))


def test_bitwise_sees_the_last_bit_and_records_nothing() -> None:
    with recording() as worst:
        assert_close(1.0, 1.0, BITWISE)
        with refused("error/tolerance = inf"):
            assert_close(1.0, np.nextafter(1.0, 2.0), BITWISE)
    assert worst.value is None


def test_zero_needs_a_scale() -> None:
    with refused("scale 0"):
        assert_close(1e-17, 0.0, ROUNDING)
    assert_close(1e-17, 0.0, ROUNDING, scale=1.0)
    assert_close(0.0, 0.0, ROUNDING)


def test_the_worst_of_a_block_is_recorded_without_inner_blocks() -> None:
    eps = np.finfo(float).eps
    with recording() as outer:
        with recording() as inner:
            assert_close(1.0 + 3 * eps, 1.0, ROUNDING)
        for ulps in (0, 2, 1):
            assert_close(1.0 + ulps * eps, 1.0, ROUNDING)
    assert inner.value == pytest.approx(3 / 5)
    assert outer.value == pytest.approx(2 / 5)


def test_the_message_has_everything() -> None:
    with recording(), pytest.raises(AssertionError) as caught:
        assert_close([1.0, 2.5], [1.0, 2.0], SOLVE, condition=10.0, iterations=3, what="P*")
    for part in ("P*", "SOLVE", "condition 10", "iterations 3", "shape (2,)", "2.5", "Higham"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"condition": 0.5}, "`condition` must be at least 1, got 0.5"),
        ({"condition": float("nan")}, "`condition` must be at least 1, got nan"),
        ({"size": 0}, "`size` and `iterations` must be at least 1, got 0 and 1"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ROUNDING.allowed(**arguments)  # pyright: ignore[reportArgumentType]
