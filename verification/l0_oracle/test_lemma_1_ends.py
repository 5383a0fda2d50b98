"""Where Lemma 1 of P18 has nothing to do, and where its weight is the least."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.cycles import helix_cycle
from reference.manifolds import Affine, Sphere
from reference.output_space import lemma_1_point, printed_weight, sufficient_weight
from verification.tolerances import BITWISE, ROUNDING, SOLVE, assert_close


def test_a_stationary_point_is_its_own_point_of_lemma_1() -> None:
    """The gradient is normal to the sphere there, so that no direction along it is downhill."""
    Z = np.array([1.0, 0.0])
    assert_close(lemma_1_point(Sphere(np.zeros(2), 1.0), Z, 0.0 * Z, 0.1), Z, BITWISE)


@given(bend=st.floats(0.0, 8.0), L=st.floats(0.1, 8.0))
def test_the_sufficient_weight_is_the_least_that_both_steps_of_the_proof_allow(
    bend: float, L: float
) -> None:
    """Lemma 1 needs gamma = 1/(2 lambda) <= 1/(C G), the descent of the loss lambda >= L/2."""
    weight = sufficient_weight(L, bend, 1.0)
    gamma = 1.0 / (2.0 * weight)
    rounding = ROUNDING.allowed(size=1)
    assert gamma * bend <= 1.0 + rounding
    assert 2.0 * weight >= L
    assert gamma * bend >= 1.0 - rounding or 2.0 * weight == L


def test_a_weight_a_little_below_the_sufficient_one_has_a_cycle() -> None:
    """On a nearly straight helix, C G is about 0 and L is 1."""
    least = sufficient_weight(1.0, 0.0, 0.0)
    assert helix_cycle(0.999 * least).weight == 0.999 * least
    with pytest.raises(ValueError, match="`ratio` must lie in"):
        helix_cycle(least)


@pytest.mark.parametrize(
    ("L", "C", "G", "weight"), [(4.0, 2.0, 3.0, 6.0), (4.0, 0.25, 2.0, 1.0), (0.0, 0.5, 4.0, 2.0)]
)
def test_the_printed_weight_is_the_larger_of_both_conditions(
    L: float, C: float, G: float, weight: float
) -> None:
    """lambda >= C G and lambda >= L / 4, as Theorem 1 prints them."""
    assert printed_weight(L, C, G) == weight


@given(seed=st.integers(0, 2**16), length=st.floats(-3.0, 3.0))
def test_what_is_flat_has_no_curvature_and_straight_geodesics(seed: int, length: float) -> None:
    """They go as far as they are long, and end in the plane: it is straight, and C is 0."""
    rng = np.random.default_rng(seed)
    plane = Affine(rng.standard_normal(3), rng.standard_normal((3, 2)))
    Z, v = plane.project(rng.standard_normal(3)), plane.tangent(plane.offset)[:, 0]
    end = plane.geodesic(Z, v, length)
    # Both are known to the rounding of Z, whose size is that of the offset and the point.
    scale = 4.0 + float(np.linalg.norm(Z))
    assert_close(np.linalg.norm(end - Z), np.abs(length), ROUNDING, size=3, scale=scale)
    assert_close(plane.project(end), end, SOLVE, size=3, scale=scale)
    assert plane.curvature == 0.0
