"""P22 eq. 4 and appendix E: what "as lambda_FSD -> infinity u* stays close to theta" needs.

Appendix E argues that a large lambda_FSD keeps u* near theta. That holds where G is non-singular.
In G's null space, which a finite B' always has in an over-parameterized network, the FSD holds
nothing back: u* - theta does not shrink there as lambda_FSD grows, and neither does the error of
eq. 4. What is true: the error vanishes as lambda_FSD -> infinity with a non-singular G (level 4),
and as lambda_WSD -> infinity whatever G and lambda_FSD are.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import (
    MLP,
    Batch,
    Linear,
    MetaObjective,
    Problem,
    SquaredError,
    SquaredEuclidean,
    closed_form_step,
    exact_step,
    fsd_hessian,
    proximity_matrix,
)
from verification.l0_oracle.rounding import meta_gradient_error
from verification.profiles import share
from verification.strategies import batches, networks, parameters, weights
from verification.tolerances import ROUNDING, SOLVE, assert_close


@pytest.mark.parametrize("fsd", [1e2, 1e4, 1e6])
@share(0.25)
@given(wsd=weights(min_decade=-2.0, max_decade=1.0, zero=False))
def test_with_a_singular_g_the_error_does_not_vanish(fsd: float, wsd: float) -> None:
    """z = u_1 x_1 + u_2 x_2 at theta = 0; B = {x = (1, 1), t = 1}, B' = {(1, 0)}: G = diag(1, 0).

    The objective is 1/2 (u_1 + u_2 - 1)^2 + (lambda_FSD + lambda_WSD)/2 u_1^2 + lambda_WSD/2 u_2^2.
    Its minimizer has u_2 = e / lambda_WSD with the residual e = 1 / (1 + 1/lambda_WSD +
    1/(lambda_FSD + lambda_WSD)); eq. 4 takes u_2 = 1 / lambda_WSD. For lambda_FSD -> infinity
    u_2 tends to 1 / (1 + lambda_WSD), the error to 1 / (lambda_WSD (1 + lambda_WSD)) from above.
    """
    problem = Problem(Linear(2, 1, bias=False), SquaredError())
    theta, batch = np.zeros(2), Batch(np.ones((1, 2)), np.ones((1, 1)))
    other = np.array([[1.0, 0.0]])
    G = fsd_hessian(problem.network, SquaredEuclidean(), theta, other)
    point = exact_step(MetaObjective(problem, SquaredEuclidean(), fsd, wsd), theta, batch, other)
    closed = closed_form_step(theta, problem.gradient(theta, *batch), G, fsd, wsd)
    residual = 1.0 / (1.0 + 1.0 / wsd + 1.0 / (fsd + wsd))
    expected = np.array([residual / (fsd + wsd), residual / wsd])
    condition = (fsd + wsd + 2.0) / wsd
    assert_close(point.u, expected, SOLVE, condition=condition, size=2, what="u*")
    limit = 1.0 / (wsd * (1.0 + wsd))
    assert closed[1] - point.u[1] >= limit * (1.0 - SOLVE.allowed(condition=condition, size=2))


def test_an_over_parameterized_network_keeps_moving_as_the_fsd_weight_grows() -> None:
    """A tanh network 1-3-1 (10 parameters) with two inputs in B': rank G = 2.

    Over four decades of lambda_FSD the exact step's length settles instead of falling as 1 /
    lambda_FSD, and the closed form, which knows the loss by its slope alone, overshoots it by a
    factor that settles as well.
    """
    network = MLP([1, 3, 1])
    rng = np.random.default_rng(0)
    theta = rng.standard_normal(network.size)
    problem, wsd = Problem(network, SquaredError()), 0.1
    batch, other = Batch(np.array([[0.3]]), np.array([[2.0]])), np.array([[-1.0], [1.5]])
    G = fsd_hessian(network, SquaredEuclidean(), theta, other)
    assert np.linalg.matrix_rank(G) == 2
    g = problem.gradient(theta, *batch)
    lengths, errors = [], []
    for fsd in (1e1, 1e3, 1e5):
        objective = MetaObjective(problem, SquaredEuclidean(), fsd, wsd)
        point = exact_step(objective, theta, batch, other)
        assert point.certified, point
        closed = closed_form_step(theta, g, 0.5 * (G + G.T), fsd, wsd)
        lengths.append(float(np.linalg.norm(point.u - theta)))
        errors.append(float(np.linalg.norm(closed - point.u)))
    # what is left of the change is O(1 / lambda_FSD): at most a tenth from 1e3 on
    for values in (lengths, errors):
        assert abs(values[2] - values[1]) <= 0.1 * abs(values[1] - values[0]), values
    assert errors[2] > lengths[2] > 0.1, (errors, lengths)


@share(0.5)
@given(
    data=st.data(),
    fsd=weights(min_decade=-2.0, max_decade=4.0),
    wsd=weights(min_decade=0.0, max_decade=4.0, zero=False),
)
def test_a_large_wsd_weight_makes_eq_4_exact_whatever_g_is(
    data: st.DataObject, fsd: float, wsd: float
) -> None:
    """||u* - u_4|| <= ||H|| ||g|| / lambda_WSD^2 for networks linear in theta, singular G included.

    There D_F is quadratic and (lambda_FSD G + lambda_WSD I)(u* - u_4) = -H (u* - theta), while
    ||u* - theta|| <= ||g|| / lambda_WSD as the whole Hessian is at least lambda_WSD I.
    """
    network = data.draw(networks(kinds=["linear", "fixed-head"]), label="network")
    problem, rho = Problem(network, SquaredError()), SquaredEuclidean()
    theta = data.draw(parameters(network), label="theta")
    batch = data.draw(batches(network, problem.loss), label="B")
    other = data.draw(batches(network, problem.loss), label="B'").inputs
    G = fsd_hessian(network, rho, theta, other)
    M = proximity_matrix(0.5 * (G + G.T), fsd, wsd)
    H, g = problem.hessian(theta, *batch), problem.gradient(theta, *batch)
    objective = MetaObjective(problem, rho, fsd, wsd)
    u = exact_step(objective, theta, batch, other).u
    closed = closed_form_step(theta, g, 0.5 * (G + G.T), fsd, wsd)
    bound = float(np.linalg.norm(H, 2) * np.linalg.norm(g)) / wsd**2
    eps = float(np.finfo(float).eps)
    solver = 2.0 * eps * meta_gradient_error(objective, theta, u, batch, other) / wsd
    step = SOLVE.allowed(condition=float(np.linalg.cond(M)), size=len(u)) * np.linalg.norm(g) / wsd
    ends = ROUNDING.allowed() * float(np.linalg.norm(u) + np.linalg.norm(theta))
    assert np.linalg.norm(u - closed) <= bound + solver + step + ends
