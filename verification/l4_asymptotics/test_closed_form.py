"""P22 eq. 4 against the exact proximal point, as a weight grows: order and leading coefficient.

| symbol | meaning |
|---|---|
| d, d0 | exact step u - theta, and the closed form -(lambda_FSD G + lambda_WSD I)^-1 g |
| H, T | Hessian of J_B, third derivative of D_F in u, both at theta |
| T[p, p] | the vector sum_jk T_ijk p_j p_k |
| h | 1 / (the weight that grows) |

The exact step is stationary: g + H d + O(d^2) + lambda_FSD (G d + 1/2 T[d, d] + O(d^3)) +
lambda_WSD d = 0, and the closed form solves g + (lambda_FSD G + lambda_WSD I) d0 = 0. So

    (lambda_FSD G + lambda_WSD I) (d - d0) = -H d - lambda_FSD/2 T[d, d] + O(d^2, lambda_FSD d^3).

* lambda_FSD -> infinity with a non-singular G: d = h p + O(h^2) with p = -G^-1 g, so that
  d - d0 = -h^2 G^-1 (H p + 1/2 T[p, p]) + O(h^3): relative to the step the error falls as h.
  With a linear loss H drops out, with a quadratic FSD T does, with both nothing is left.
* both weights -> infinity in the ratio r: the same with G + r I for G in p and outside.
* lambda_WSD -> infinity, G any: d = -h g + O(h^2), d - d0 = h^2 H g + O(h^3); with a linear loss
  -h^3 lambda_FSD/2 T[g, g] + O(h^4), one order better.

H is a complex step and T[p, p] derived by hand: neither knows of the solver, nor of the gradient of
the discrepancy that the solver follows.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import (
    MLP,
    CategoricalKL,
    CrossEntropy,
    FixedHead,
    MetaObjective,
    Problem,
    SquaredError,
    SquaredEuclidean,
    closed_form_step,
    complex_step_jacobian,
    exact_step,
    fsd_hessian,
    proximity_matrix,
)
from reference.analytic import softmax
from reference.arrays import Array
from reference.discrepancies import Discrepancy
from reference.problem import Batch
from verification.l0_oracle.rounding import meta_gradient_error
from verification.l4_asymptotics.series import AMPLIFICATION, neville
from verification.profiles import share
from verification.tolerances import ROUNDING, SOLVE

UNIT_ROUNDOFF = 0.5 * float(np.finfo(float).eps)
HALVINGS = 5
SEEDS = 32  # a finite set: the power that each scene must have was seen on all of them
FIXED = 0.5  # the weight that does not grow


class Regime(NamedTuple):
    """Which weights grow, how far the objective is exact, and the order of the error."""

    fsd_grows: bool
    wsd_grows: bool
    loss: str
    fsd: str
    order: int

    def weights(self, weight: float) -> tuple[float, float]:
        """(lambda_FSD, lambda_WSD)."""
        return weight if self.fsd_grows else FIXED, weight if self.wsd_grows else FIXED


REGIMES = {
    "FSD grows": Regime(True, False, "exact", "exact", 2),
    "FSD grows, linear loss": Regime(True, False, "linear", "exact", 2),
    "FSD grows, quadratic FSD": Regime(True, False, "exact", "quadratic", 2),
    "both grow": Regime(True, True, "exact", "exact", 2),
    "WSD grows": Regime(False, True, "exact", "exact", 2),
    "WSD grows, linear loss": Regime(False, True, "linear", "exact", 3),
}


class Scene(NamedTuple):
    """A small problem with a non-singular G."""

    problem: Problem
    discrepancy: Discrepancy
    theta: Array
    batch: Batch
    fsd_inputs: Array

    @property
    def G(self) -> Array:
        G = fsd_hessian(self.problem.network, self.discrepancy, self.theta, self.fsd_inputs)
        return 0.5 * (G + G.T)


def regression(seed: int) -> Scene:
    """A tanh network 1-1-1 with squared errors: two curved parameters, theta near (1, 1)."""
    rng = np.random.default_rng(seed)
    theta = 1.0 + 0.1 * rng.standard_normal(2)
    inputs = np.linspace(-2.0, 2.0, 8)[:, None] + 0.1 * rng.standard_normal((8, 1))
    batch = Batch(np.array([[0.5], [1.0]]), 2.0 + 0.5 * rng.standard_normal((2, 1)))
    problem = Problem(MLP([1, 1, 1], bias=False), SquaredError())
    return Scene(problem, SquaredEuclidean(), theta, batch, inputs)


def classification(order: str, seed: int) -> Scene:
    """Three classes, whose logits are a fixed map of W x (2 x 2): no shift of all logits in W."""
    rng = np.random.default_rng(seed)
    head = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    problem = Problem(FixedHead([head], [2]), CrossEntropy())
    inputs = np.concatenate([np.eye(2), -np.eye(2)]) + 0.2 * rng.standard_normal((4, 2))
    batch = Batch(rng.standard_normal((2, 2)), rng.integers(3, size=2))
    return Scene(problem, CategoricalKL(order), 0.5 * rng.standard_normal(4), batch, inputs)


SCENES = {
    "regression": regression,
    "KL(p || p0)": lambda seed: classification("lookahead_current", seed),
    "KL(p0 || p)": lambda seed: classification("current_lookahead", seed),
}


def third_derivative(scene: Scene, p: Array) -> Array:
    """T[p, p] = E[J^T (H_rho b + R[a, a]) + 2 (dJ)^T H_rho a], (n,), with a = J p, b = (dJ) p.

    dJ is the derivative of J along p, by a complex step. R[a, a] is the third derivative of rho at
    z0 along a and a: none for the squared error, p0 ((a - m)^2 - v) for KL(p0 || p) with the mean
    m and the variance v of a under p0, twice that for KL(p || p0) (see test_discrepancies).
    """
    network, X = scene.problem.network, scene.fsd_inputs
    J, z = network.jacobian(scene.theta, X), network.outputs(scene.theta, X)
    dJ = complex_step_jacobian(
        lambda t: network.jacobian(scene.theta + t[0] * p, X).ravel(), np.zeros(1)
    ).reshape(J.shape)
    a, b = J @ p, dJ @ p
    H = scene.discrepancy.output_hessian(z)
    R = np.zeros_like(z)
    if isinstance(scene.discrepancy, CategoricalKL):
        p0 = softmax(z)
        centered = a - np.sum(p0 * a, axis=1, keepdims=True)
        variance = np.sum(p0 * centered**2, axis=1, keepdims=True)
        R = p0 * (centered**2 - variance)
        R *= 2.0 if scene.discrepancy.order == "lookahead_current" else 1.0
    outer = np.einsum("ncd,nd->nc", H, b) + R
    inner = np.einsum("ncd,nd->nc", H, a)
    terms = np.einsum("nci,nc->i", J, outer) + 2.0 * np.einsum("nci,nc->i", dJ, inner)
    return terms / len(X)


def leading_coefficient(scene: Scene, regime: Regime, g: Array, H: Array) -> Array:
    """c of d - d0 = c h^order + O(h^(order + 1)), by the module's derivation, (n,)."""
    if not regime.fsd_grows:
        return H @ g if regime.order == 2 else -0.5 * FIXED * third_derivative(scene, g)
    M = proximity_matrix(scene.G, 1.0, float(regime.wsd_grows))
    p = -np.linalg.solve(M, g)
    terms = np.zeros_like(p)
    if regime.loss == "exact":
        terms += H @ p
    if regime.fsd == "exact":
        terms += 0.5 * third_derivative(scene, p)
    return -np.linalg.solve(M, terms)


def solver_error(scene: Scene, objective: MetaObjective, u: Array, M: Array, d0: Array) -> float:
    """What rounding does to d - d0: in the gradient that Newton zeroes, in d0, and in u - theta."""
    eigenvalues = np.linalg.eigvalsh(M)
    args = scene.theta, u, scene.batch, scene.fsd_inputs
    gradient = UNIT_ROUNDOFF * meta_gradient_error(objective, *args)
    condition = float(eigenvalues[-1] / eigenvalues[0])
    closed = SOLVE.allowed(condition=condition, size=len(u)) * float(np.linalg.norm(d0))
    ends = ROUNDING.allowed() * float(np.linalg.norm(u) + np.linalg.norm(scene.theta))
    return 2.0 * gradient / float(eigenvalues[0]) + closed + ends


@pytest.mark.parametrize("kind", list(SCENES))
@pytest.mark.parametrize("name", list(REGIMES))
@share(0.1)
@given(seed=st.integers(0, SEEDS - 1))
def test_error_of_eq_4_has_the_derived_order_and_coefficient(
    name: str, kind: str, seed: int
) -> None:
    """h^-order (d - d0), extrapolated to h = 0, is the derived vector, and the log-log slope of
    ||d - d0|| over the halvings of h, extrapolated as well, is the order.
    """
    regime, scene = REGIMES[name], SCENES[kind](seed)
    g = scene.problem.gradient(scene.theta, *scene.batch)
    H = scene.problem.hessian(scene.theta, *scene.batch)
    expected = leading_coefficient(scene, regime, g, H)
    G = scene.G
    softest = float(regime.wsd_grows)
    softest += float(np.linalg.eigvalsh(G)[0]) if regime.fsd_grows else 0.0
    # h = 1 / first is where H d is small beside the proximity's pull in the softest direction
    first = 8.0 * (1.0 + float(np.linalg.norm(H, 2)) + float(np.linalg.norm(g))) / softest
    scaled, errors, rounding = [], [], 0.0
    for k in range(HALVINGS):
        weight = first * 2.0**k
        fsd, wsd = regime.weights(weight)
        objective = MetaObjective(
            scene.problem, scene.discrepancy, fsd, wsd, regime.loss, regime.fsd
        )
        point = exact_step(objective, scene.theta, scene.batch, scene.fsd_inputs)
        assert point.certified, point
        d0 = closed_form_step(np.zeros(len(g)), g, G, fsd, wsd)
        difference = point.u - scene.theta - d0
        scaled.append(difference * weight**regime.order)
        errors.append(float(np.linalg.norm(difference)))
        M = proximity_matrix(G, fsd, wsd)
        error = solver_error(scene, objective, point.u, M, d0)
        rounding = max(rounding, error * weight**regime.order)
    limit = neville(scaled)
    allowed = limit.uncertainty + AMPLIFICATION * rounding
    error = float(np.linalg.norm(limit.value - expected))
    assert error <= allowed, (error, allowed, limit, expected)
    # The test's power: it would see a factor of 1/2 lost in either addend.
    assert allowed <= 0.05 * float(np.linalg.norm(expected)), (allowed, expected)
    slopes = [np.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    slope = neville(slopes)
    # log2 of a ratio of two errors, each known to rounding / size of itself
    noise = AMPLIFICATION * 2.0 * np.log2(np.e) * rounding / float(np.linalg.norm(scaled[-1]))
    assert abs(slope.value - regime.order) <= slope.uncertainty + noise, (slopes, slope)
    assert slope.uncertainty + noise <= 0.05, (slopes, slope)
