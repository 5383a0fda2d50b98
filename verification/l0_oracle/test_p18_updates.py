"""P18 eq. 4 to 9: the closed form, its missing half, and the methods of three divergences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import MetaObjective, SquaredEuclidean, exact_step, fsd_hessian
from reference.arrays import Array
from reference.classical_methods import gauss_newton, p18_step
from verification.l0_oracle.classical_steps import closed_form
from verification.profiles import share
from verification.strategies import SPD, MetaCase, meta_cases, spd_matrices, weights
from verification.strategies.classical_methods import row_cases
from verification.tolerances import SOLVE, assert_close


def eq_5(d: Array, g: Array, G: Array, weight: float) -> float:
    """g^T d + lambda d^T G d, as printed."""
    return float(g @ d + weight * d @ G @ d)


@given(
    G=spd_matrices(max_size=4, max_condition=1e2, max_log_scale=1.0),
    weight=weights(min_decade=-1.0, max_decade=1.0, zero=False),
    seed=st.integers(0, 2**16),
)
def test_eq_6_is_twice_the_minimizer_of_eq_5_as_printed(G: SPD, weight: float, seed: int) -> None:
    """Completing the square: eq_5(d) - eq_5(d*) = lambda ||d - d*||_G^2 with d* half of eq. 6."""
    rng = np.random.default_rng(seed)
    g, v = rng.standard_normal((2, len(G.eigenvalues)))
    d = p18_step(np.zeros_like(g), g, G.matrix, weight)
    v *= np.linalg.norm(d)
    least = eq_5(d / 2, g, G.matrix, weight)
    scale = float(np.abs(g) @ (np.abs(d) + np.abs(v)))
    scale += weight * G.eigenvalues[0] * float((np.linalg.norm(d) + np.linalg.norm(v)) ** 2)
    sizes = {"condition": G.condition, "size": len(g), "scale": scale}
    rise = np.float64(eq_5(d / 2 + v, g, G.matrix, weight) - least)
    square = np.float64(weight * v @ G.matrix @ v)
    assert_close(rise, square, SOLVE, what="rise around half of eq. 6", **sizes)
    # At eq. 6 itself eq. 5 as printed is 0: no better than not to move.
    assert_close(np.float64(eq_5(d, g, G.matrix, weight)), np.float64(0.0), SOLVE, **sizes)
    assert least < 0.0


@pytest.mark.loose("Its condition is that of G, for a gradient along the weakest direction.")
@share(0.5)
@given(case=meta_cases(kinds=["linear"]), seed=st.integers(0, 2**16))
def test_eq_6_minimizes_eq_4_without_any_approximation_on_linear_networks(
    case: MetaCase, seed: int
) -> None:
    """Eq. 4 with eq. 7 is g^T d + lambda E||J d||^2, its G is 2 E[J^T J], and eq. 6 is right."""
    network = case.problem.network
    X = np.eye(network.input_size)
    if network.layers[0].bias is not None:
        X = np.vstack([X, np.zeros((1, network.input_size))])
    other = case.other._replace(inputs=X)
    rho = SquaredEuclidean(half=False)
    weight = case.weights.fsd + 0.1
    objective = MetaObjective(case.problem, rho, weight, 0.0, loss="linear")
    J = network.jacobian(case.theta, X)
    G = 2.0 * np.einsum("nci,ncj->ij", J, J) / len(J)
    u = p18_step(case.theta, case.gradient, G, weight)
    size = float(np.linalg.norm(case.theta) + np.linalg.norm(u))
    assert_close(
        exact_step(objective, case.theta, case.batch, other.inputs).u,
        u,
        SOLVE,
        condition=float(np.linalg.cond(G)),
        size=len(u) + len(X),
        scale=size * (1.0 + float(np.linalg.norm(case.gradient)) / float(weight)),
        what="arg min of eq. 4",
    )


@given(seed=st.integers(0, 2**16), weight=weights(min_decade=-1.0, max_decade=1.0, zero=False))
def test_eq_7_gives_gauss_newton_at_lambda_one_half(seed: int, weight: float) -> None:
    """With L = 1/2 ||z - t||^2 eq. 6 and 7 are 1/(2 lambda) of the classical step; with the L =
    ||z - t||^2 that matches eq. 7, 1/lambda; and eq. 5 as printed would halve both.
    """
    rng = np.random.default_rng(seed)
    J, r = rng.standard_normal((4, 2, 3)), rng.standard_normal((4, 2))
    theta = rng.standard_normal(3)
    G = 2.0 * np.einsum("nci,ncj->ij", J, J) / 4.0
    classical = gauss_newton(theta, J, r) - theta
    for factor in (1.0, 2.0):  # of the loss 1/2 ||r||^2
        g = factor * np.einsum("nci,nc->i", J, r) / 4.0
        assert_close(
            p18_step(theta, g, G, weight) - theta,
            classical * factor / (2.0 * weight),
            SOLVE,
            condition=float(np.linalg.cond(G)),
            scale=float(np.linalg.norm(theta) + np.linalg.norm(classical) * (1.0 + 1.0 / weight)),
            what="step",
        )


@pytest.mark.parametrize("equation", ["8: Bregman, GGN", "9: KL, natural gradient"])
@share(0.5)
@given(st.data())
def test_eq_8_and_9_give_ggn_and_natural_gradient(equation: str, data: st.DataObject) -> None:
    """At every lambda: the half of the second-order expansion is in neither, and eq. 6 is right."""
    row = "generalized Gauss-Newton" if equation.startswith("8") else "natural gradient"
    case = data.draw(row_cases(row), label="case")
    closed, M = closed_form(row, case)
    G = fsd_hessian(case.problem.network, case.discrepancy, case.theta, case.other.inputs)
    u = p18_step(case.theta, case.gradient, G, case.weights.fsd)
    condition, size = float(np.linalg.cond(M)), float(np.linalg.norm(case.theta))
    terms = len(u) + 4 * case.problem.network.output_size + len(case.other.inputs)
    scale = size + float(np.linalg.norm(u))
    assert_close(u, closed, SOLVE, condition=condition, size=terms, scale=scale, what="eq. 6")
