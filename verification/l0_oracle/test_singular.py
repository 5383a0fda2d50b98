"""What has no curvature at all is told apart from what has a little."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, final

import numpy as np
import pytest

from reference import MLP, KFACFactors, MetaObjective, Problem, SquaredError, SquaredEuclidean
from reference.arrays import Array
from reference.classical_methods import hessian_free, newton
from reference.curvature import damped_ekfac_inverse, ekfac_basis
from reference.networks import Linear
from reference.optimal_preconditioners import ekfac
from reference.problem import Batch
from reference.proximal_point import certify, closed_form_step, polish
from reference.structured_optima import best_kronecker
from verification.tolerances import SOLVE, assert_close

FLAT = KFACFactors(np.zeros((2, 2)), np.zeros((1, 1)))
UNIT = KFACFactors(np.eye(2), np.eye(1))
LAYERS = MLP([2, 1], bias=False).layers


@pytest.mark.parametrize(
    "call",
    [
        lambda: closed_form_step(np.ones(2), np.ones(2), np.zeros((2, 2)), 1.0, 0.0),
        lambda: newton(np.ones(2), np.ones(2), np.zeros((2, 2))),
        lambda: ekfac(FLAT, 1.0, 0.0),
        lambda: damped_ekfac_inverse(ekfac_basis(FLAT), np.zeros((1, 2)), 0.0),
        lambda: best_kronecker(np.ones((1, 2)), np.zeros((2, 2)), LAYERS, [[FLAT]]),
        lambda: hessian_free(np.ones(2), np.ones(2), np.zeros_like),
    ],
    ids=["eq. 4", "Newton", "EKFAC", "damped EKFAC", "Kronecker", "Hessian-free"],
)
def test_no_curvature_is_singular(call: Callable[[], object]) -> None:
    """The threshold is rounding times the largest curvature, which is 0 as well."""
    with pytest.raises(ValueError, match=r"must (be positive|have positive|be non-singular)"):
        call()


def test_a_stationary_point_without_curvature_is_degenerate() -> None:
    """The linear loss of what fits exactly has slope 0 and curvature 0: no kind of extremum."""
    problem = Problem(Linear(1, 1, bias=False), SquaredError())
    flat = MetaObjective(problem, SquaredEuclidean(), 0.0, 0.0, loss="linear")
    theta, x = np.ones(1), np.ones((1, 1))
    point = certify(flat, theta, theta, Batch(x, x), x)
    assert point.kind == "degenerate"
    assert not point.certified


@final
class Quadratic:
    """1/2 u^T diag(h) u in place of a proximal objective."""

    def __init__(self, h: list[float]) -> None:
        self.h = np.array(h)
        self.problem = SimpleNamespace(network=SimpleNamespace(size=len(h)))

    def terms(self, theta: Array, u: Array, batch: Any, fsd_inputs: Any) -> SimpleNamespace:
        """The value."""
        return SimpleNamespace(total=0.5 * u @ (self.h * u))

    def lookahead_gradient(self, theta: Array, u: Array, batch: Any, fsd_inputs: Any) -> Array:
        """h u."""
        return self.h * u


@pytest.mark.parametrize(
    ("h", "kind"),
    [
        ([1.0, 2.0], "minimum"),
        ([0.0, 1.0], "degenerate"),
        ([0.0, 0.0], "degenerate"),
        ([-1.0, 1.0], "saddle"),
        ([-1.0, 0.0], "saddle"),
        ([-2.0, -1.0], "maximum"),
    ],
)
def test_a_stationary_point_has_the_kind_of_its_eigenvalues(h: list[float], kind: str) -> None:
    """A maximum has only negative ones, and a saddle one that is not."""
    objective: Any = Quadratic(h)
    zero: Any = np.zeros(2)
    assert certify(objective, zero, zero, zero, zero).kind == kind


@pytest.mark.parametrize("bend", [0.1, 1.0, 10.0])
def test_a_newton_step_finds_the_minimum_of_a_parabola(bend: float) -> None:
    """Whatever its curvature, and whatever the slope where it starts: here 1."""
    start = np.array([1.0 / bend])
    end = polish(lambda u: bend * u, lambda u: np.array([[bend]]), start)
    assert_close(end, np.zeros(1), SOLVE, scale=float(start[0]))


@pytest.mark.parametrize("bend", [0.0, -1.0])
def test_newton_steps_end_where_the_function_does_not_bend_upwards(bend: float) -> None:
    """The point stays: its Newton step is none, or leads to a maximum."""
    start = np.array([3.0])

    def hessian(u: Array) -> Array:
        return np.array([[bend]])

    assert polish(lambda u: np.ones(1) + bend * u, hessian, start) == start


@pytest.mark.parametrize("unit", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize(
    "solve",
    [
        lambda M: closed_form_step(np.ones(2), np.ones(2), M, 1.0, 0.0),
        lambda M: newton(np.ones(2), np.ones(2), M),
        lambda M: ekfac(KFACFactors(M, np.ones((1, 1))), 1.0, 0.0),
        lambda M: damped_ekfac_inverse(ekfac_basis(UNIT), np.diag(M)[None], 0.0),
        lambda M: best_kronecker(np.ones((1, 2)), M, LAYERS, [[UNIT]], sweeps=1),
    ],
    ids=["eq. 4", "Newton", "EKFAC", "damped EKFAC", "Kronecker"],
)
def test_what_is_singular_to_rounding_is_so_in_every_unit(
    solve: Callable[[Array], object], unit: float
) -> None:
    """A condition of 1e18 is refused, one of 1e12 is solved."""
    solve(unit * np.diag([1.0, 1e-12]))
    with pytest.raises(ValueError, match=r"must be (positive|non-singular)"):
        solve(unit * np.diag([1.0, 1e-18]))
