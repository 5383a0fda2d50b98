"""What each assumption of P18 Lemma 1 and Theorem 1 is for: drop it, and see the claim fail."""

import numpy as np
import pytest
from hypothesis import find
from hypothesis import strategies as st

from reference.manifolds import Affine, Parametrized, Polyline, Sphere
from reference.output_space import (
    OutputLoss,
    effective_gradient,
    model_change,
    projected_gradient_descent,
    projected_gradient_step,
    rate_bound,
)


def on_a_parabola(gamma: float, curvature: float, tangential: float) -> float:
    """The least of Lemma 1's model on y = C x^2 / 2, as a multiple of -gamma/4 ||g||^2.

    At the bottom, with ||grad L|| = 1: `tangential` along the curve, the rest upwards, so that all
    of M lies uphill of the tangent.
    """
    parabola = Parametrized(
        lambda w: np.array([w[0], 0.5 * curvature * w[0] ** 2]),
        lambda w: np.array([[1.0], [curvature * w[0]]]),
        np.linspace(-1.0, 1.0, 41)[:, None] / curvature,
        curvature,
    )
    gradient = np.array([tangential, np.sqrt(1.0 - tangential**2)])
    step = projected_gradient_step(parabola, np.zeros(2), gradient, 0.5 / gamma)
    return model_change(np.zeros(2), step, gradient, gamma) / (-0.25 * gamma * tangential**2)


@pytest.mark.parametrize("curvature", [0.1, 1.0, 20.0])
def test_lemma_1_needs_gamma_of_at_most_one_over_cg(curvature: float) -> None:
    """For small ||g|| the least model is -gamma ||g||^2 / (2 (1 + gamma C G)).

    So 1 / (C G) is the end of the lemma's range, four times the printed one.
    """
    inside, outside = (
        on_a_parabola(share / curvature, curvature, tangential=1e-3) for share in (0.99, 1.01)
    )
    assert inside > 1.0 > outside
    assert outside == pytest.approx(2.0 / 2.01, rel=1e-5)  # + O(||g||^2) = 1e-6


def test_lemma_1_needs_a_bound_on_the_gradient() -> None:
    """With G unknown no gamma is small enough: found by search on a parabola with C = 1.

    Scaling the loss by G and gamma by 1 / G leaves the model's multiple as it is.
    """
    for gamma in (1.0, 0.1, 0.01):
        G = find(
            st.integers(1, 1000),
            lambda G, gamma=gamma: on_a_parabola(gamma * G, 1.0, tangential=1e-3) < 1.0 - 1e-5,
        )
        assert G == round(1.0 / gamma) + 1


@pytest.mark.parametrize("weight", [0.01, 1.0, 100.0])
def test_theorem_1_needs_a_bound_on_the_curvature(weight: float) -> None:
    """Whatever lambda, a small enough circle breaks eq. 15 at T = 1.

    A linear loss (L = 0, G = 1), started where it is steepest: ||g_0|| = 1, and no more than the
    radius can be gained. Eq. 15 then reads 1 <= 16 lambda radius, so C G > 16 lambda breaks it.
    """

    def broken(curvature: float) -> bool:
        circle = Sphere(np.zeros(2), 1.0 / curvature)
        Z, gradient = np.array([1.0 / curvature, 0.0]), np.array([0.0, 1.0])
        g = effective_gradient(circle, Z, gradient)
        gap = -float(gradient @ circle.project(-gradient))
        return float(g @ g) > rate_bound(weight, 1, gap) * (1.0 + 1e-12)

    C = find(st.integers(1, 10_000), lambda C: broken(float(C)))
    assert C == int(np.floor(16.0 * weight)) + 1


@pytest.mark.parametrize("weight", [0.25, 1.0, 50.0])
def test_theorem_1_needs_a_lipschitz_gradient(weight: float) -> None:
    """M = R and the loss |Z|^(3/2): a two-cycle at |Z| = (3 / (8 lambda))^2 for every lambda."""
    line = Affine(np.zeros(1), np.eye(1))
    loss = OutputLoss(
        lambda Z: float(np.abs(Z[0]) ** 1.5),
        lambda Z: 1.5 * np.sign(Z) * np.sqrt(np.abs(Z)),
        lambda Z: np.full((1, 1), np.nan),
    )
    start = np.array([(3.0 / (8.0 * weight)) ** 2])
    trajectory = projected_gradient_descent(line, loss, start, weight, 40)
    sizes = np.abs(trajectory.Z[:, 0])
    # Each step maps Z to -Z up to rounding, which it multiplies by 1/2 of the cycle's contraction.
    assert np.allclose(sizes, start[0], rtol=1e-12, atol=0.0)
    norm = trajectory.gradient_norm.min()
    assert norm**2 > rate_bound(weight, 41, gap=trajectory.loss[0])


def test_theorem_1_needs_a_manifold_without_boundary() -> None:
    """Not stated in the paper: M = [0, 1] on the line, the loss pulling below 0, Z_0 = 0.

    The step stays where it is for ever, while the projection of the gradient on the tangent is 1.
    """
    interval = Polyline([[0.0], [1.0]])
    Z, gradient = np.zeros(1), np.ones(1)
    for _ in range(3):
        Z = projected_gradient_step(interval, Z, gradient, 1.0)
        assert Z[0] == 0.0
    # Lemma 1 asks for a point of M with model at most -gamma/4: the least on M is 0.
    points = np.linspace(0.0, 1.0, 101)[:, None]
    assert min(model_change(np.zeros(1), point, gradient, 0.5) for point in points) == 0.0


def test_theorem_1_needs_a_loss_that_is_bounded_below() -> None:
    """M = R and the loss -Z: the gradient never falls, and L* = -infinity bounds nothing."""
    line = Affine(np.zeros(1), np.eye(1))
    loss = OutputLoss(lambda Z: -float(Z[0]), lambda Z: -np.ones(1), lambda Z: np.zeros((1, 1)))
    trajectory = projected_gradient_descent(line, loss, np.zeros(1), 1.0, 30)
    assert np.all(trajectory.gradient_norm == 1.0)
    assert trajectory.gradient_norm.min() ** 2 > rate_bound(1.0, 30, gap=1.0)
