"""What each assumption of P18 Theorem 2 is for: drop it, and see the claim fail."""

import numpy as np
import pytest

from reference.arrays import Array
from reference.manifolds import Affine, Sphere
from reference.output_space import OutputLoss, proximal_newton

LINE = Affine(np.zeros(1), np.eye(1))


def power(exponent: float, strong: float) -> OutputLoss:
    """|Z|^p / p + strong/2 Z^2 on the line."""
    return OutputLoss(
        lambda Z: float(np.abs(Z[0]) ** exponent / exponent + 0.5 * strong * Z[0] ** 2),
        lambda Z: np.sign(Z) * np.abs(Z) ** (exponent - 1.0) + strong * Z,
        lambda Z: ((exponent - 1.0) * np.abs(Z) ** (exponent - 2.0) + strong) * np.eye(1),
    )


@pytest.mark.parametrize("exponent", [3.0, 4.0, 6.0])
def test_theorem_2_needs_strong_convexity(exponent: float) -> None:
    """|Z|^p / p has mu = 0: the error only shrinks by (p - 2) / (p - 1) a step, for ever."""
    path = proximal_newton(LINE, power(exponent, 0.0), np.array([0.5]), 20)[:, 0]
    ratios = path[1:] / path[:-1]
    assert ratios == pytest.approx(np.full(20, (exponent - 2.0) / (exponent - 1.0)), rel=1e-12)
    constants = path[1:] / path[:-1] ** 2
    assert np.all(np.diff(constants) > 0.0)  # no constant bounds e_{k+1} / e_k^2
    # They grow by (p - 1) / (p - 2) a step.
    growth = ((exponent - 1.0) / (exponent - 2.0)) ** 19
    assert constants[-1] == pytest.approx(growth * constants[0], rel=1e-10)


def test_theorem_2_needs_a_lipschitz_hessian() -> None:
    """|Z|^(5/2) / (5/2) + Z^2 / 2: strongly convex, L_H infinite at 0, of order 3/2 and not 2.

    Newton's error is e' = 1/2 e^(3/2) / (1 + 3/2 e^(1/2)).
    """
    path = proximal_newton(LINE, power(2.5, 1.0), np.array([0.01]), 4)[:, 0]
    e = np.abs(path)
    assert e[1:] == pytest.approx(0.5 * e[:-1] ** 1.5 / (1.0 + 1.5 * np.sqrt(e[:-1])), rel=1e-6)
    constants = e[1:] / e[:-1] ** 2
    assert constants[-1] > 1000.0 * constants[0]
    order = np.log(e[3] / e[2]) / np.log(e[2] / e[1])
    assert 1.45 < order < 1.55


def test_theorem_2_needs_the_minimizer_on_the_manifold() -> None:
    """A circle around a point near the loss's minimizer: convergence is quadratic, but its constant
    exceeds L_H / mu, because the loss bends less along the circle than in space.

    Loss 1/2 ||Z||^2 + a (log cosh x + log cosh (y + 1/2) - tanh(1/2) y), mu = 1; the constrained
    minimizer is found by many steps of the iteration itself and checked to be stationary.
    """
    a, shift = 0.5, np.array([0.0, 0.5])

    def gradient(Z: Array) -> Array:
        return Z + a * (np.tanh(Z + shift) - np.tanh(shift))

    def hessian(Z: Array) -> Array:
        return np.eye(2) + a * np.diag(1.0 - np.tanh(Z + shift) ** 2)

    loss = OutputLoss(lambda Z: np.nan, gradient, hessian)
    circle = Sphere([0.0, -0.02], 1.0)
    start = np.array([0.5, 0.8])
    end = proximal_newton(circle, loss, start, 60)[-1]
    tangent = circle.tangent(end)[:, 0]
    assert abs(tangent @ gradient(end)) < 1e-12
    assert np.linalg.norm(gradient(end)) > 0.1  # Z* lies off the circle
    near = circle.project(end + 1e-2 * tangent)
    e = np.linalg.norm(proximal_newton(circle, loss, near, 1) - end, axis=1)
    limit = a * 4.0 / (3.0 * np.sqrt(3.0))
    assert e[1] / e[0] ** 2 > 1.5 * limit
