"""Named tolerances, each derived from how its kind of quantity is computed, and `assert_close`.

A comparison is normwise: error = ||actual - expected|| / max(||expected||, scale). It may reach

    allowed = bound(eps, condition, size, iterations)

which is a bound of rounding-error analysis and no constant chosen until a test was green.

| symbol     | meaning                                                                          |
|------------|----------------------------------------------------------------------------------|
| eps        | spacing of the dtype at 1 (float64: 2.2e-16); the unit roundoff is u = eps / 2   |
| condition  | how much the quantity amplifies a relative error of its input                    |
| size n     | terms of the longest sum behind one entry; the largest dimension unless given    |
| iterations | operations of this kind that are chained                                         |
| scale      | magnitude of the terms that were added, where they may cancel in the result      |

The worst error/tolerance of a test is recorded: near 1 is tight, below 1e-3 is blind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import final

import numpy as np
from numpy.typing import ArrayLike, DTypeLike


@final
@dataclass(frozen=True)
class Tolerance:
    """The error that one kind of quantity may have in one dtype.

    Attributes:
        name: what error messages call it.
        reason: why the bound is what it is.
        bound: (eps, condition, size, iterations) -> allowed normwise relative error.
        dtype: the floating point type that the quantity is computed in.
    """

    name: str
    reason: str
    bound: Callable[[float, float, int, int], float]
    dtype: DTypeLike = np.float64

    def allowed(self, *, condition: float = 1.0, size: int = 1, iterations: int = 1) -> float:
        """Largest normwise relative error that rounding explains.

        Raises:
            ValueError: a condition number below 1 or a size or iteration count below 1.
        """
        if not condition >= 1.0:
            raise ValueError(f"`condition` must be at least 1, got {condition!r}.")
        if size < 1 or iterations < 1:
            raise ValueError(
                f"`size` and `iterations` must be at least 1, got {size!r} and {iterations!r}."
            )
        return self.bound(float(np.finfo(self.dtype).eps), float(condition), size, iterations)

    def at(self, dtype: DTypeLike) -> Tolerance:
        """The same tolerance for a quantity that is computed in another dtype."""
        return replace(self, name=f"{self.name}[{np.dtype(dtype).name}]", dtype=dtype)


BITWISE = Tolerance(
    "BITWISE",
    "Nothing was computed (a copy, a round trip, a restored value), so no bit may differ.",
    lambda eps, condition, size, iterations: 0.0,
)

ROUNDING = Tolerance(
    "ROUNDING",
    "Sums, products and matrix products: each side errs by gamma_n = n u / (1 - n u) per product "
    "relative to the absolute values that it adds (Higham 2002, eq. 3.5), so both together by "
    "n eps; 4 eps more for the scalar factors around it. Errors of chained products add.",
    lambda eps, condition, size, iterations: iterations * (size + 4) * eps * condition,
)

FUNCTION = Tolerance(
    "FUNCTION",
    "Values that pass through exp, log, tanh or a root: NumPy's and torch's vectorized functions "
    "each keep 4 ulp, so 8 eps together, beside the n eps of the sums around them.",
    lambda eps, condition, size, iterations: iterations * (size + 8) * eps * condition,
)

SOLVE = Tolerance(
    "SOLVE",
    "Solutions and inverses of SPD systems: a Cholesky solve has the backward error gamma_(3n+1) "
    "|R'||R| (Higham 2002, theorem 10.4) of Frobenius norm at most sqrt(n) ||A||_F; the condition "
    "number turns it into a forward error, and both sides err.",
    lambda eps, condition, size, iterations: (
        iterations * math.sqrt(size) * (3 * size + 1) * eps * condition
    ),
)

COMPLEX_STEP = Tolerance(
    "COMPLEX_STEP",
    "Im f(x + ih) / h with h = 1e-20: the truncation h^2 |f'''| / 6 is far below eps and nothing "
    "cancels, so only the rounding of evaluating f on complex numbers remains: a complex product "
    "costs sqrt(5) u instead of u (Brent, Percival, Zimmermann 2007), 8 ulp a function.",
    lambda eps, condition, size, iterations: (
        iterations * (math.sqrt(5.0) * size + 16) * eps * condition
    ),
)

PROPAGATED = Tolerance(
    "PROPAGATED",
    "`scale` is itself the error of one side to first order, in units of u, carried through "
    "operation by operation (verification/l0_oracle/rounding.py); both sides err: 2 u = eps.",
    lambda eps, condition, size, iterations: iterations * size * eps * condition,
)

PROPAGATED_COMPLEX = Tolerance(
    "PROPAGATED_COMPLEX",
    "PROPAGATED where one side is a complex step: there a product costs sqrt(5) u instead of u "
    "and a function 8 ulp instead of 4, so that side errs by at most sqrt(5) u times `scale`.",
    lambda eps, condition, size, iterations: (
        iterations * size * (1.0 + math.sqrt(5.0)) / 2.0 * eps * condition
    ),
)

CENTRAL_DIFFERENCE = Tolerance(
    "CENTRAL_DIFFERENCE",
    "(f(x + h) - f(x - h)) / 2h with h = eps^(1/3): truncation h^2 / 6 |f'''| and rounding "
    "n eps |f| / h are both of order eps^(2/3); `condition` carries the larger of |f'''| and |f| "
    "relative to `scale`.",
    lambda eps, condition, size, iterations: (
        iterations * (size + 1 / 6) * eps ** (2 / 3) * condition
    ),
)

MINIMIZER = Tolerance(
    "MINIMIZER",
    "A line search cannot see a decrease of f below its rounding n eps |f*|, and f rises by "
    "sigma_min / 2 r^2 at a distance r from its minimizer, so the minimizer is known to "
    "r = sqrt(2 n eps |f*| / sigma_min); `condition` carries |f*| / (sigma_min ||x*||^2).",
    lambda eps, condition, size, iterations: math.sqrt(2.0 * iterations * size * eps * condition),
)


@final
@dataclass(eq=False)
class WorstRatio:
    """The worst error/tolerance of the comparisons in one block, or None where none was made.

    Attributes:
        value: the worst.
        comparisons: how many there were, without those that allow no error at all.
    """

    value: float | None = None
    comparisons: int = 0

    def note(self, ratio: float) -> None:
        """Count a comparison, and keep its `ratio` if it is the worst so far."""
        self.comparisons += 1
        self.value = float(ratio if self.value is None else max(self.value, ratio))


_recorders: list[WorstRatio] = []


@contextmanager
def recording() -> Iterator[WorstRatio]:
    """Record the worst error/tolerance of the comparisons in the block, inner blocks left out."""
    worst = WorstRatio()
    _recorders.append(worst)
    try:
        yield worst
    finally:
        _recorders.remove(worst)


def assert_close(
    actual: ArrayLike,
    expected: ArrayLike,
    tolerance: Tolerance,
    *,
    condition: float = 1.0,
    size: int | None = None,
    iterations: int = 1,
    scale: float | None = None,
    what: str = "value",
) -> None:
    """Assert ||actual - expected|| <= allowed * max(||expected||, scale).

    Args:
        actual: the value that is judged; its dtype must be the tolerance's.
        expected: the oracle's value, of the same shape.
        tolerance: a named tolerance of this module.
        condition: amplification of a relative error of the input, at least 1.
        size: terms of the longest sum behind one entry; the largest dimension by default.
        iterations: how many operations of this kind are chained.
        scale: magnitude of the terms that were added, where they may cancel.
        what: what is compared, for the message.

    Raises:
        AssertionError: shapes or dtypes differ, a value is not finite, or the error is too large.
    """
    a, e = np.asarray(actual), np.asarray(expected)
    if a.shape != e.shape:
        raise AssertionError(f"{what}: shape {a.shape} where {e.shape} was expected.")
    if np.issubdtype(a.dtype, np.floating) and a.dtype != np.dtype(tolerance.dtype):
        raise AssertionError(
            f"{what}: dtype {a.dtype} where {tolerance.name} is for {np.dtype(tolerance.dtype)}."
        )
    if size is None:
        size = max(1, *e.shape) if e.shape else 1
    allowed = tolerance.allowed(condition=condition, size=size, iterations=iterations)
    with np.errstate(invalid="ignore"):  # inf - inf is caught below, as a NaN
        difference = np.ravel(a - e)
    error = float(np.linalg.norm(difference))
    reference = max(float(np.linalg.norm(np.ravel(e))), 0.0 if scale is None else float(scale))
    ratio = _ratio(error, allowed * reference)
    if allowed > 0.0 and _recorders:
        _recorders[-1].note(ratio)
    if not ratio <= 1.0:  # also true for NaN
        raise AssertionError(
            f"{what}: error/tolerance = {ratio:.3g}\n"
            f"  error {error:.6g} > allowed {allowed:.3g} * scale {reference:.6g}"
            f" ({tolerance.name}, condition {condition:.3g}, size {size},"
            f" iterations {iterations})\n"
            f"  shape {a.shape}, dtype {a.dtype}\n"
            f"  actual   {_show(a)}\n  expected {_show(e)}\n  difference {_show(difference)}\n"
            f"  {tolerance.reason}"
        )


def _ratio(error: float, allowed: float) -> float:
    """Error over tolerance: 0 for equal values, infinite where a difference has no allowance."""
    if not math.isfinite(error) or not math.isfinite(allowed):
        return math.inf
    if error == 0.0:
        return 0.0
    return error / allowed if allowed > 0.0 else math.inf


def _show(array: np.ndarray) -> str:
    return np.array2string(array, precision=17, threshold=24, edgeitems=3, separator=", ").replace(
        "\n", "\n             "
    )
