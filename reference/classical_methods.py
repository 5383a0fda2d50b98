"""The classical methods as proximal steps: the closed form of each, and the objective it minimizes.

| symbol | meaning | shape |
|---|---|---|
| theta | current parameters | (n,) |
| g, H | gradient and Hessian of J_B at theta | (n,), (n, n) |
| F, G | the Fisher; the GGN: E[J^T H_rho J] with the Bregman divergence of the loss | (n, n) |
| J, r | Jacobian of the outputs, residual z - t, example by example | (N, C, n), (N, C) |
| lambda_FSD, lambda_WSD | `fsd_weight`, `wsd_weight` | > 0, >= 0 |

Every method takes theta + d with a d that solves (curvature) d = -g. Undamped ones need a curvature
that is non-singular.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from reference.arrays import Array, finite_array, non_negative
from reference.discrepancies import Discrepancy
from reference.meta_objective import MetaObjective
from reference.problem import Problem
from reference.proximal_point import closed_form_step


class Row(NamedTuple):
    """One row of P22 Table 1: how its proximal objective approximates eq. 20."""

    loss: str  # as of `MetaObjective`
    fsd: str | None  # "quadratic", "exact", or None without FSD term
    divergence: str | None  # "kl", "bregman", "any", or None
    damped: bool  # whether the WSD term is there


TABLE_1: dict[str, Row] = {
    "gradient descent": Row("linear", None, None, True),
    "Newton": Row("quadratic", None, None, False),
    "damped Newton": Row("quadratic", None, None, True),
    "natural gradient": Row("linear", "quadratic", "kl", False),
    "damped natural gradient": Row("linear", "quadratic", "kl", True),
    "generalized Gauss-Newton": Row("linear", "quadratic", "bregman", False),
    "damped generalized Gauss-Newton": Row("linear", "quadratic", "bregman", True),
    "direct proximal optimization": Row("exact", "exact", "any", True),
}
"""The eight rows of P22 appendix F; Hessian-free optimization, in section 3.2, is damped Newton's
objective, or the same with the Gauss-Newton matrix for H, minimized by conjugate gradients."""


def row_objective(
    name: str, problem: Problem, discrepancy: Discrepancy, fsd_weight: float, wsd_weight: float
) -> MetaObjective:
    """The approximation of eq. 20 that a row of Table 1 minimizes; the row drops weights.

    Raises:
        ValueError: `name` is no row, or a weight is negative.
    """
    if name not in TABLE_1:
        raise ValueError(f"`name` must be one of {sorted(TABLE_1)}, got {name!r}; choose one.")
    loss, fsd, _, damped = TABLE_1[name]
    weights = fsd_weight if fsd else 0.0, wsd_weight if damped else 0.0
    return MetaObjective(problem, discrepancy, *weights, loss, fsd or "exact")


def gradient_descent(theta: Any, g: Any, wsd_weight: float) -> Array:
    """theta - g / lambda_WSD, (n,): the learning rate is 1 / lambda_WSD.

    Source: P22 eq. 25.

    Raises:
        ValueError: a shape is wrong, or `wsd_weight` is not positive.
    """
    if not non_negative("wsd_weight", wsd_weight) > 0.0:
        raise ValueError("`wsd_weight` must be positive, got 0.0; without it the step is infinite.")
    theta = finite_array("theta", theta, ("n",))
    return theta - finite_array("g", g, theta.shape) / wsd_weight


def newton(theta: Any, g: Any, H: Any, wsd_weight: float = 0.0) -> Array:
    """theta - (H + lambda_WSD I)^{-1} g, (n,): the stationary point of eq. 27.

    It is its arg min only where H + lambda_WSD I is positive definite. Where it is indefinite this
    is a saddle point, eq. 27 falls without bound, and no arg min exists: `certify` tells.

    Source: P22 eq. 31.

    Raises:
        ValueError: a shape or weight is wrong, or H + lambda_WSD I is singular.
    """
    theta = finite_array("theta", theta, ("n",))
    g = finite_array("g", g, theta.shape)
    M = finite_array("H", H, (len(g), len(g)))
    M = M + non_negative("wsd_weight", wsd_weight) * np.eye(len(g))
    moduli = np.abs(np.linalg.eigvalsh(M))
    if moduli.min() <= len(g) * np.finfo(float).eps * moduli.max():
        raise ValueError(
            "`H` + `wsd_weight` I must be non-singular, got an eigenvalue of modulus "
            f"{moduli.min():.3g}; change `wsd_weight`."
        )
    return theta - np.linalg.solve(M, g)


def natural_gradient(
    theta: Any, g: Any, F: Any, fsd_weight: float, wsd_weight: float = 0.0
) -> Array:
    """theta - (lambda_FSD F + lambda_WSD I)^{-1} g, (n,), with the Fisher F.

    Source: P22 eq. 36 with the KL divergence, whose G is F; P18 eq. 6 and 9.

    Raises:
        ValueError: a shape or weight is wrong, or the matrix is not positive definite.
    """
    return closed_form_step(theta, g, F, fsd_weight, wsd_weight)


def generalized_gauss_newton(
    theta: Any, g: Any, G: Any, fsd_weight: float, wsd_weight: float = 0.0
) -> Array:
    """theta - (lambda_FSD G + lambda_WSD I)^{-1} g, (n,), with G = E[J^T (d^2 L/dz^2) J].

    Source: P22 eq. 36 with the Bregman divergence of the loss; P18 eq. 6 and 8.

    Raises:
        ValueError: a shape or weight is wrong, or the matrix is not positive definite.
    """
    return closed_form_step(theta, g, G, fsd_weight, wsd_weight)


def gauss_newton(theta: Any, J: Any, r: Any) -> Array:
    """theta - E[J^T J]^{-1} E[J^T r], (n,): the minimizer of sum ||r + J d||^2.

    The step of the squared error, with or without its half, as both sides carry the same factor.

    Raises:
        ValueError: a shape is wrong, or E[J^T J] is singular.
    """
    J = finite_array("J", J, ("N", "C", "n"))
    r = finite_array("r", r, J.shape[:2])
    products = np.einsum("nci,ncj->ij", J, J) / len(J)
    return closed_form_step(theta, np.einsum("nci,nc->i", J, r) / len(J), products, 1.0, 0.0)


def p18_step(theta: Any, g: Any, G: Any, weight: float) -> Array:
    """theta - G^{-1} g / lambda, (n,): the minimizer of g^T d + lambda/2 d^T G d.

    Differs from the paper: eq. 5 lacks the half of the Taylor expansion that eq. 6 has; the
    minimizer of eq. 5 as printed is half this step.

    Args:
        theta: (n,).
        g: the gradient of the loss, (n,).
        G: E[J^T (d^2 D/dz^2) J], (n, n); 2 E[J^T J] with eq. 7, which has no half.
        weight: lambda > 0.

    Source: P18 eq. 6.

    Raises:
        ValueError: a shape or weight is wrong, or lambda G is not positive definite.
    """
    return closed_form_step(theta, g, G, weight, 0.0)


class KrylovStep(NamedTuple):
    """What Hessian-free optimization found."""

    theta: Array  # (n,)
    iterates: list[Array]  # theta + d_k, k = 0 .. iterations
    residual_norm: float  # ||g + (curvature + lambda_WSD I) d||


def hessian_free(
    theta: Any,
    g: Any,
    product: Callable[[Array], Array],
    wsd_weight: float = 0.0,
    iterations: int | None = None,
) -> KrylovStep:
    """Conjugate gradients on g^T d + 1/2 d^T (curvature + lambda_WSD I) d, from d = 0.

    Iterate k minimizes it over the Krylov subspace span{g, M g, ..., M^{k-1} g} with M = curvature
    + lambda_WSD I; n of them are damped Newton's step, with H, or the GGN's of Martens.

    Args:
        theta: (n,).
        g: (n,).
        product: v -> (curvature) v, positive definite with the damping; (n,) -> (n,).
        wsd_weight: lambda_WSD >= 0.
        iterations: at most; n if None. It stops before, where the residual is eps ||g||.

    Source: Martens 2010, algorithm 2; P22 section 3.2.

    Raises:
        ValueError: a shape or weight is wrong, or a direction has no positive curvature.
    """
    theta = finite_array("theta", theta, ("n",))
    g = finite_array("g", g, theta.shape)
    wsd_weight = non_negative("wsd_weight", wsd_weight)
    d, residual = np.zeros_like(g), -g
    direction, iterates = residual, [theta]
    # The recursion's residual falls for ever; that of d is no less than the rounding of M d = -g.
    rounding = np.finfo(float).eps * np.linalg.norm(g)
    for _ in range(len(g) if iterations is None else iterations):
        square = residual @ residual
        if np.sqrt(square) <= rounding:
            break
        M_direction = finite_array("product", product(direction), g.shape) + wsd_weight * direction
        curvature = direction @ M_direction
        if curvature <= 0.0:
            raise ValueError(
                f"`product` must have positive curvature, got {curvature:.3g} along a direction; "
                "raise `wsd_weight` or use the Gauss-Newton matrix."
            )
        step = square / curvature
        d = d + step * direction
        residual = residual - step * M_direction
        direction = residual + (residual @ residual) / square * direction
        iterates.append(theta + d)
    return KrylovStep(theta + d, iterates, float(np.linalg.norm(residual)))
