"""The quadratic FSD against the exact one along a step t v: order and coefficient.

| symbol | meaning |
|---|---|
| a, b | dz/dt and d^2z/dt^2 at t = 0 of z(t) = f(x, theta + t v): a = J v, b = (dJ/dt) v |
| H_rho, R[a, a, a] | second and third derivative of rho(., z0) at z0, along a |
| psi, kappa_k | logsumexp; d^k/dt^k psi(z0 + t a) = kappa_k, the cumulants of a_y under p0 |

With z = z0 + t a + t^2/2 b + O(t^3) and rho = 1/2 <z - z0, H_rho (z - z0)> + 1/6 R + O(|z - z0|^4),

    D_F(theta + t v) - t^2/2 v^T G v = t^3 E[1/2 a^T H_rho b + 1/6 R[a, a, a]] + O(t^4).

The order is three, and four or more only where the bracket vanishes in the mean: for logits linear
in theta with a symmetric p0 (R = 0, b = 0), or for an odd curve of the squared error (a^T b = 0).

For the KL between members of one exponential family, along z0 + t a,

    KL(p0 || p) = psi(z) - psi(z0) - t kappa_1           = t^2/2 kappa_2 +   t^3/6 kappa_3 + ...
    KL(p || p0) = psi(z0) - psi(z) + t psi'              = t^2/2 kappa_2 + 2 t^3/6 kappa_3 + ...

where coefficient k of the second is (k - 1) times that of the first. So R = kappa_3 and 2 kappa_3,
and KL(p || p0) - KL(p0 || p) = t^3/6 kappa_3 + t^4/12 kappa_4 + t^5/40 kappa_5 + ...
"""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import (
    MLP,
    CategoricalKL,
    FixedHead,
    MetaObjective,
    Network,
    Problem,
    SquaredError,
    SquaredEuclidean,
    complex_step_jacobian,
    fsd_hessian,
)
from reference.analytic import softmax
from reference.arrays import Array
from reference.discrepancies import Discrepancy
from reference.problem import Batch
from verification.l4_asymptotics.series import AMPLIFICATION, Taylor, neville, taylor
from verification.profiles import share
from verification.tolerances import COMPLEX_STEP, FUNCTION, assert_close

seeds = st.integers(0, 2**16)
RADIUS = 0.125  # no singularity within four radii: steps are scaled to move nothing by more than t
KL_ORDERS = (CategoricalKL("lookahead_current"), CategoricalKL("current_lookahead"))
DISCREPANCIES: dict[str, Discrepancy] = {
    "squared error": SquaredEuclidean(),
    "KL(p || p0)": KL_ORDERS[0],
    "KL(p0 || p)": KL_ORDERS[1],
}


def cumulants(a: Array, p: Array) -> tuple[Array, Array, Array]:
    """kappa_2, kappa_3, kappa_4 of the values a (N, C) under the probabilities p, from moments."""
    centered = a - np.sum(p * a, axis=1, keepdims=True)
    m2, m3, m4 = (np.sum(p * centered**k, axis=1) for k in (2, 3, 4))
    return m2, m3, m4 - 3.0 * m2**2


def scene(seed: int) -> tuple[Network, Array, Array, Array]:
    """A tanh network with three outputs: (network, theta, X, v), ||v|| such that t moves little."""
    rng = np.random.default_rng(seed)
    network = MLP([2, 2, 3])
    theta = 0.7 * rng.standard_normal(network.size)
    X = rng.uniform(-1.0, 1.0, (3, 2))
    v = rng.standard_normal(network.size)
    return network, theta, X, v / (2.0 * np.linalg.norm(v))


def along(network: Network, rho: Discrepancy, theta: Array, X: Array, v: Array) -> Taylor:
    """The coefficients of D_F(theta + t v) in t, up to the fourth."""
    fsd = MetaObjective(Problem(network, SquaredError()), rho, 1.0, 0.0, loss="linear")
    nothing = Batch(X, np.zeros((len(X), network.output_size)))
    return taylor(lambda t: fsd.terms(theta, theta + t * v, nothing, X).fsd, RADIUS, 5)


def assert_coefficients(
    actual: Array,
    expected: Sequence[float | np.floating],
    size: int,
    iterations: int,
    scale: Callable[[int], float],
) -> None:
    """Each expected coefficient of t^k, with `scale(k)` what the terms of the mean amount to.

    `iterations` are the functions behind a value: two for logits, four for two layers, softmax and
    mean.
    """
    for k, value in enumerate(expected):
        assert_close(
            actual[k],
            np.float64(value),
            COMPLEX_STEP,
            size=size,
            iterations=iterations,
            scale=scale(k),
            what=f"coefficient of t^{k}",
        )


@pytest.mark.parametrize("name", list(DISCREPANCIES))
@share(0.5)
@given(seed=seeds)
def test_quadratic_fsd_errs_at_third_order_with_the_derived_coefficient(
    name: str, seed: int
) -> None:
    network, theta, X, v = scene(seed)
    rho = DISCREPANCIES[name]
    series = along(network, rho, theta, X, v)
    a = network.jacobian(theta, X) @ v
    b = complex_step_jacobian(
        lambda t: (network.jacobian(theta + t[0] * v, X) @ v).ravel(), np.zeros(1)
    ).reshape(a.shape)
    H = rho.output_hessian(network.outputs(theta, X))
    third = {
        "squared error": np.zeros(len(X)),
        "KL(p || p0)": 2.0 * cumulants(a, softmax(network.outputs(theta, X)))[1],
        "KL(p0 || p)": cumulants(a, softmax(network.outputs(theta, X)))[1],
    }[name]
    cubic = np.mean(0.5 * np.einsum("nc,ncd,nd->n", a, H, b) + third / 6.0)
    G = fsd_hessian(network, rho, theta, X)
    expected = [0.0, 0.0, 0.5 * v @ G @ v, cubic]
    # rho is a sum of C products of log-probabilities, which err by eps of themselves
    terms = 1.0 + float(np.abs(network.outputs(theta, X)).max())
    assert_coefficients(
        series.coefficients,
        expected,
        size=3,
        iterations=4,
        scale=lambda order: terms / RADIUS**order,
    )


@given(seed=seeds)
def test_the_two_orders_of_kl_differ_at_third_order(seed: int) -> None:
    """Along straight lines of logits, coefficients two to four; and along a network's curves."""
    rng = np.random.default_rng(seed)
    z0, a = rng.standard_normal((1, 4)), rng.standard_normal((1, 4))
    a /= 2.0 * np.linalg.norm(a)
    there, back = (
        taylor(lambda t, rho=rho: rho.value(z0 + t * a, z0)[0], RADIUS, 5) for rho in KL_ORDERS
    )
    _, k3, k4 = cumulants(a, softmax(z0))
    difference = there.coefficients - back.coefficients
    scale = 1.0 + float(np.abs(z0).max())
    expected = [0.0, 0.0, 0.0, k3[0] / 6.0, k4[0] / 12.0]
    assert_coefficients(
        difference,
        expected,
        size=4,
        iterations=2,
        scale=lambda order: scale / RADIUS**order,
    )


@share(0.5)
@given(seed=seeds)
def test_the_two_orders_of_kl_differ_at_third_order_in_a_network(seed: int) -> None:
    """b enters both orders alike, so that E[kappa_3] / 6 of a = J v is left of it."""
    network, theta, X, v = scene(seed)
    there, back = (along(network, rho, theta, X, v) for rho in KL_ORDERS)
    _, k3, _ = cumulants(network.jacobian(theta, X) @ v, softmax(network.outputs(theta, X)))
    terms = 1.0 + float(np.abs(network.outputs(theta, X)).max())
    assert_coefficients(
        there.coefficients - back.coefficients,
        [0.0, 0.0, 0.0, np.mean(k3) / 6.0],
        size=3,
        iterations=4,
        scale=lambda order: terms / RADIUS**order,
    )


def test_at_a_uniform_binary_p0_the_orders_of_kl_differ_at_fourth_order() -> None:
    """z = (t, -t): t tanh t - 2 log cosh t = -t^4/6 + O(t^6), as kappa_3 = 0 and kappa_4 = -2."""
    z0, a = np.zeros((1, 2)), np.array([[1.0, -1.0]])
    there, back = (
        taylor(lambda t, rho=rho: rho.value(t * a, z0)[0], RADIUS, 6) for rho in KL_ORDERS
    )
    difference = there.coefficients - back.coefficients
    assert_coefficients(
        difference,
        [0.0, 0.0, 0.0, 0.0, -1.0 / 6.0, 0.0],
        size=2,
        iterations=2,
        scale=lambda order: RADIUS**-order,
    )


@pytest.mark.parametrize(("rho", "factor"), [(KL_ORDERS[0], 3.0), (KL_ORDERS[1], 1.0)])
def test_with_a_symmetric_p0_the_quadratic_fsd_errs_at_fourth_order(
    rho: Discrepancy, factor: float
) -> None:
    """Logits W x, W = 0: p0 is uniform over two classes, so R = 0 and b = 0, but kappa_4 = -2.

    Along W = t (1, -1) / 2: logits +-t/2, and the coefficient is factor kappa_4 / 24 / 16.
    """
    network = FixedHead([np.array([[1.0], [-1.0]])], [1])
    series = along(network, rho, np.zeros(1), np.ones((1, 1)), np.array([0.5]))
    expected = [0.0, 0.0, 0.5 * 0.25, 0.0, factor * -2.0 / 24.0 / 16.0]
    assert_coefficients(
        series.coefficients,
        expected,
        size=2,
        iterations=2,
        scale=lambda power: RADIUS**-power,
    )


@given(x=st.floats(-1.0, 1.0), w=st.floats(-2.0, 2.0))
def test_along_an_odd_curve_the_quadratic_fsd_errs_at_fourth_order(x: float, w: float) -> None:
    """z = w tanh(t x) = w (t x - t^3 x^3 / 3 + ...): 1/2 z^2 has -w^2 x^4 / 3 at t^4, 0 at t^3."""
    network = MLP([1, 1, 1], bias=False)
    theta, v = np.array([0.0, w]), np.array([1.0, 0.0])
    series = along(network, SquaredEuclidean(), theta, np.array([[x]]), v)
    expected = [0.0, 0.0, 0.5 * (w * x) ** 2, 0.0, -(w**2) * x**4 / 3.0]
    assert_coefficients(
        series.coefficients,
        expected,
        size=1,
        iterations=3,
        scale=series.scale,
    )


@share(0.5)
@given(seed=seeds)
def test_real_steps_show_the_third_order(seed: int) -> None:
    """The same without complex numbers: (D_F(t) - t^2/2 v^T G v) / t^3 for t -> 0, by Neville.

    Rounding of D_F, eps of log-probabilities below 10, is divided by t^3.
    """
    network, theta, X, v = scene(seed)
    rho = CategoricalKL("lookahead_current")
    fsd = MetaObjective(Problem(network, SquaredError()), rho, 1.0, 0.0, loss="linear")
    nothing = Batch(X, np.zeros((len(X), 3)))
    G = fsd_hessian(network, rho, theta, X)
    cubic = along(network, rho, theta, X, v).coefficients[3]
    steps = 0.5 * 0.5 ** np.arange(5)
    errors = [fsd.terms(theta, theta + t * v, nothing, X).fsd - t**2 / 2 * v @ G @ v for t in steps]
    limit = neville([np.array(e / t**3) for e, t in zip(errors, steps, strict=True)])
    terms = 1.0 + float(np.abs(network.outputs(theta, X)).max())
    rounding = FUNCTION.allowed(size=3, iterations=4) * terms / steps[-1] ** 3
    assert abs(limit.value - cubic) <= limit.uncertainty + AMPLIFICATION * rounding, (limit, cubic)
