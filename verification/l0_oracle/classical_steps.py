"""The classical methods' own steps, from curvatures that never saw the proximal objective."""

import numpy as np

from reference import exact_fisher
from reference.arrays import Array
from reference.classical_methods import (
    TABLE_1,
    generalized_gauss_newton,
    gradient_descent,
    natural_gradient,
    newton,
)
from verification.strategies import MetaCase
from verification.strategies.outputs import targets


def closed_form(row: str, case: MetaCase) -> tuple[Array, Array]:
    """The method's own step and the matrix that it inverts, without the proximal objective."""
    theta, g, X = case.theta, case.gradient, case.other.inputs
    fsd, wsd = case.weights.fsd, case.weights.wsd if TABLE_1[row].damped else 0.0
    identity = np.eye(len(theta))
    if row == "gradient descent":
        return gradient_descent(theta, g, wsd), wsd * identity
    if row.endswith("Newton") and "Gauss" not in row:
        H = case.problem.hessian(theta, *case.batch)
        return newton(theta, g, H, wsd), H + wsd * identity
    if row.endswith("natural gradient"):
        F = exact_fisher(case.problem, theta, X)
        return natural_gradient(theta, g, F, fsd, wsd), fsd * F + wsd * identity
    # The target of the GGN is any: it is not the batch's.
    loss, network = case.problem.loss, case.problem.network
    z, J = network.outputs(theta, X), network.jacobian(theta, X)
    T = targets(loss, z.shape, np.random.default_rng(0))
    G = np.mean([j.T @ h @ j for j, h in zip(J, loss.hessian(z, T), strict=True)], axis=0)
    return generalized_gauss_newton(theta, g, G, fsd, wsd), fsd * G + wsd * identity
