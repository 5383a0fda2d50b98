"""The proximal point step: the exact arg min with a certificate, and the closed form of P22 eq. 4.

| symbol | here | shape |
|---|---|---|
| theta^(t) | `theta` | (n,) |
| u | the minimizer of J_B(u) + lambda_FSD D_F(u, theta) + lambda_WSD/2 ||u - theta||^2 | (n,) |
| grad, H | gradient and Hessian of that objective at u | (n,), (n, n) |
| g, G | gradient of J_B, Hessian of D_F at theta | (n,), (n, n) |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import numpy as np
from scipy.optimize import minimize

from reference.arrays import Array, finite_array
from reference.meta_objective import MetaObjective, proximity_matrix
from reference.problem import Batch, complex_step_jacobian, symmetric_part

# u counts as stationary where moving it by this fraction of its length, along the stiffest
# direction, could make the gradient vanish: five digits above float64 rounding.
STATIONARITY = 1e-10

# Two points are the same one where they are nearer than this, relatively: far more than what a
# gradient of that size leaves open, far less than what lies between two minima.
SAME_POINT = STATIONARITY**0.5

Kind = Literal["minimum", "degenerate", "saddle", "maximum", "not stationary"]


@final
@dataclass(frozen=True)
class ProximalPoint:
    """A point u with the evidence that it is (or is not) a local minimizer.

    Attributes:
        u: the point, (n,).
        value: the objective at u.
        rise: the objective at u less that at theta: what a proximal step may not make positive.
        gradient_norm: ||grad|| at u.
        gradient_tolerance: the norm below which u counts as stationary.
        min_eigenvalue: the smallest eigenvalue of H at u.
        max_eigenvalue: the largest in modulus.
        kind: "minimum" (stationary, H positive definite), "degenerate" (H singular to rounding),
            "maximum" (H negative definite), "saddle" (H has a negative eigenvalue, and another that
            is not) or "not stationary".
    """

    u: Array
    value: float
    rise: float
    gradient_norm: float
    gradient_tolerance: float
    min_eigenvalue: float
    max_eigenvalue: float
    kind: Kind

    @property
    def certified(self) -> bool:
        """Whether u is a strict local minimizer and the objective did not rise."""
        rounding = 8 * len(self.u) * np.finfo(float).eps * max(1.0, abs(self.value))
        return self.kind == "minimum" and self.rise <= rounding


class ProximalSearch(NamedTuple):
    """What a search from several starts found.

    Attributes:
        best: the certified point with the lowest objective, None if there is none.
        found: every distinct point, certified or not, by rising objective.
    """

    best: ProximalPoint | None
    found: list[ProximalPoint]


def exact_step(
    objective: MetaObjective, theta: Any, batch: Batch, fsd_inputs: Any, start: Any = None
) -> ProximalPoint:
    """theta^(t+1) = arg min_u J_B(u) + lambda_FSD E[D_F(u, theta)] + lambda_WSD D_W(u, theta).

    A trust-region Newton method with the exact Hessian, then plain Newton steps while the gradient
    shrinks. The minimum is a local one: look at `certified`, and try several `start`s where the
    objective is not convex. ReLU networks have kinks, at which no certificate holds.

    Args:
        objective: Q, exact or with either term approximated.
        theta: (n,).
        batch: B.
        fsd_inputs: the inputs of B', (N', d).
        start: where the search begins, (n,); theta if None.

    Source: P22 eq. 3.
    """
    theta = finite_array("theta", theta, (objective.problem.network.size,))
    start = theta if start is None else finite_array("start", start, theta.shape)
    value, gradient, hessian = _at(objective, theta, batch, fsd_inputs)
    scale = np.linalg.norm(gradient(start))
    found = minimize(
        value,
        start,
        jac=gradient,
        hess=hessian,
        method="trust-exact",
        options={"gtol": 1e-7 * min(1.0, float(scale)), "maxiter": 1000},
    )
    u = polish(gradient, hessian, np.asarray(found.x))
    return certify(objective, theta, u, batch, fsd_inputs)


def certify(
    objective: MetaObjective, theta: Any, u: Any, batch: Batch, fsd_inputs: Any
) -> ProximalPoint:
    """The evidence for or against u (n,) as a minimizer, wherever u came from."""
    theta = finite_array("theta", theta, (objective.problem.network.size,))
    u = finite_array("u", u, theta.shape)
    value, gradient, hessian = _at(objective, theta, batch, fsd_inputs)
    eigenvalues = np.linalg.eigvalsh(hessian(u))
    largest = float(np.abs(eigenvalues).max())
    norm = float(np.linalg.norm(gradient(u)))
    tolerance = STATIONARITY * float(np.linalg.norm(gradient(theta)) + largest * np.linalg.norm(u))
    rounding = 8 * len(u) * np.finfo(float).eps * largest
    kind: Kind
    if norm > tolerance:
        kind = "not stationary"
    elif eigenvalues[0] > rounding:
        kind = "minimum"
    else:
        kind = "degenerate" if eigenvalues[0] >= -rounding else "saddle"
        if eigenvalues[-1] < -rounding:
            kind = "maximum"
    return ProximalPoint(
        u=u,
        value=value(u),
        rise=value(u) - value(theta),
        gradient_norm=norm,
        gradient_tolerance=tolerance,
        min_eigenvalue=float(eigenvalues[0]),
        max_eigenvalue=largest,
        kind=kind,
    )


def search(
    objective: MetaObjective, theta: Any, batch: Batch, fsd_inputs: Any, starts: Sequence[Any]
) -> ProximalSearch:
    """`exact_step` from theta and from each of `starts`, (n,) each.

    The proximal objective of a network is not convex in u: its arg min need not be unique, and need
    not be the point that a descent from theta reaches. A search can miss minima, not invent them.

    Source: P22 eq. 3.
    """
    points = [exact_step(objective, theta, batch, fsd_inputs, s) for s in (theta, *starts)]
    points.sort(key=lambda point: point.value)
    found: list[ProximalPoint] = []
    for point in points:
        near = SAME_POINT * (1.0 + float(np.linalg.norm(point.u)))
        if all(np.linalg.norm(point.u - other.u) > near for other in found):
            found.append(point)
    certified = [point for point in found if point.certified]
    return ProximalSearch(certified[0] if certified else None, found)


def closed_form_step(theta: Any, g: Any, G: Any, fsd_weight: float, wsd_weight: float) -> Array:
    """u = theta - (lambda_FSD G + lambda_WSD I)^{-1} g, (n,).

    Source: P22 eq. 4, 19 and 36.

    Raises:
        ValueError: a shape or weight is wrong, or lambda_FSD G + lambda_WSD I is singular.
    """
    theta = finite_array("theta", theta, ("n",))
    g = finite_array("g", g, theta.shape)
    M = proximity_matrix(finite_array("G", G, (len(g), len(g))), fsd_weight, wsd_weight)
    eigenvalues = np.linalg.eigvalsh(M)
    if eigenvalues[0] <= len(g) * np.finfo(float).eps * np.abs(eigenvalues).max():
        raise ValueError(
            "`fsd_weight` G + `wsd_weight` I must be positive definite, got smallest eigenvalue "
            f"{eigenvalues[0]:.3g}; raise `wsd_weight`."
        )
    return theta - np.linalg.solve(M, g)


def _at(
    objective: MetaObjective, theta: Array, batch: Batch, fsd_inputs: Any
) -> tuple[Callable[[Array], float], Callable[[Array], Array], Callable[[Array], Array]]:
    """Value, gradient and Hessian of the objective as functions of u."""

    def value(u: Array) -> float:
        return float(objective.terms(theta, u, batch, fsd_inputs).total)

    def gradient(u: Array) -> Array:
        return objective.lookahead_gradient(theta, u, batch, fsd_inputs)

    def hessian(u: Array) -> Array:
        return symmetric_part(complex_step_jacobian(gradient, u))

    return value, gradient, hessian


def polish(
    gradient: Callable[[Array], Array], hessian: Callable[[Array], Array], u: Array
) -> Array:
    """Newton steps from a good start, as long as each one shrinks the gradient."""
    norm = np.linalg.norm(gradient(u))
    for _ in range(20):
        H = hessian(u)
        if norm == 0.0 or np.linalg.eigvalsh(H)[0] <= 0.0:
            break
        candidate = u - np.linalg.solve(H, gradient(u))
        candidate_norm = np.linalg.norm(gradient(candidate))
        if not candidate_norm < norm:
            break
        u, norm = candidate, candidate_norm
    return u
