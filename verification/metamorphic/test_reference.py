"""The oracle's curvature in other coordinates: G, the Fishers, K-FAC's factors and P* follow."""

from typing import final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.arrays import Array, vec
from reference.curvature import empirical_fisher, exact_fisher, fsd_hessian, kfac_factors
from reference.discrepancies import CategoricalKL
from reference.losses import CrossEntropy
from reference.networks import MLP
from reference.problem import Problem
from verification.profiles import share
from verification.strategies.spd import rotation
from verification.tolerances import FUNCTION, SOLVE, assert_close, recording

WIDTHS = [2, 3, 2]
EXAMPLES = 5
PROBLEM = Problem(MLP(WIDTHS, "tanh", bias=False), CrossEntropy())
KL = CategoricalKL()


@final
class Case:
    """θ and inputs X in the old coordinates, θ' and X' with x' = Tx, W₁ = W₁'T, and θ = Kθ'."""

    def __init__(self, seed: int, stretched: bool) -> None:
        rng = np.random.default_rng(seed)
        first = PROBLEM.network.layers[0]
        n = PROBLEM.network.size
        self.T = rotation(WIDTHS[0], seed)
        if stretched:
            self.T = self.T * [0.5, 2.0] @ rotation(WIDTHS[0], seed + 1)
        self.X = rng.standard_normal((EXAMPLES, WIDTHS[0]))
        self.labels = rng.integers(WIDTHS[-1], size=EXAMPLES)
        self.theta = rng.standard_normal(n)
        self.K = np.eye(n)
        self.K[first.weight, first.weight] = np.kron(self.T.T, np.eye(WIDTHS[1]))
        self.X_new = self.X @ self.T.T
        self.theta_new = np.linalg.solve(self.K, self.theta)

    def curvature(self, kind: str, new: bool) -> Array:
        """G, the Fisher or the empirical Fisher, in the old or the new coordinates, (n, n)."""
        theta, X = (self.theta_new, self.X_new) if new else (self.theta, self.X)
        if kind == "G":
            return fsd_hessian(PROBLEM.network, KL, theta, X)
        if kind == "Fisher":
            return exact_fisher(PROBLEM, theta, X)
        return empirical_fisher(PROBLEM, theta, X, self.labels)

    @property
    def condition(self) -> float:
        """Of T, by which a rounding of x' or W₁' arrives in W₁x, times how G varies with θ.

        G is quadratic in J, and J changes with the hidden units by at most ‖θ‖ a layer.
        """
        return float(np.linalg.cond(self.T)) * (1 + float(np.linalg.norm(self.theta))) ** 2


@pytest.mark.parametrize("kind", ["G", "Fisher", "empirical Fisher"])
@given(seed=st.integers(0, 2**16), stretched=st.booleans())
def test_curvature_is_a_quadratic_form(kind: str, seed: int, stretched: bool) -> None:
    """G' = KᵀGK for θ = Kθ'."""
    case = Case(seed, stretched)
    expected = case.K.T @ case.curvature(kind, new=False) @ case.K
    assert_close(
        case.curvature(kind, new=True),
        expected,
        FUNCTION,
        condition=case.condition,
        size=PROBLEM.network.size,
        iterations=4,
        what=kind,
    )


@given(seed=st.integers(0, 2**16), stretched=st.booleans())
def test_kfac_factors_follow_the_inputs(seed: int, stretched: bool) -> None:
    """A₁' = TA₁Tᵀ; B₁, A₂ and B₂ stay."""
    case = Case(seed, stretched)
    old = kfac_factors(PROBLEM.network, KL, case.theta, case.X)
    new = kfac_factors(PROBLEM.network, KL, case.theta_new, case.X_new)
    pairs = [
        (new[0].A, case.T @ old[0].A @ case.T.T),
        (new[0].B, old[0].B),
        *zip(new[1], old[1], strict=True),
    ]
    for actual, expected in pairs:
        assert_close(actual, expected, FUNCTION, condition=case.condition, size=8, iterations=4)


@share(0.5)
@given(seed=st.integers(0, 2**16), stretched=st.booleans())
def test_the_natural_gradient_follows_and_gradient_descent_only_rotations(
    seed: int, stretched: bool
) -> None:
    """K(G' + λKᵀK)⁻¹g' = (G + λI)⁻¹g, while Kg' = KKᵀg is g for an orthogonal K alone.

    λI is there since G is singular: in the new coordinates it is λKᵀK, no multiple of I.
    """
    case, damping = Case(seed, stretched), 0.1
    n = PROBLEM.network.size
    old = PROBLEM.gradient(case.theta, case.X, case.labels)
    new = PROBLEM.gradient(case.theta_new, case.X_new, case.labels)
    G, G_new = case.curvature("G", new=False), case.curvature("G", new=True)
    M_new = G_new + damping * case.K.T @ case.K
    expected = np.linalg.solve(G + damping * np.eye(n), old)
    condition = float(np.linalg.cond(M_new)) * case.condition
    assert_close(case.K @ np.linalg.solve(M_new, new), expected, SOLVE, condition=condition, size=n)
    first = PROBLEM.network.layers[0].weight
    followed = (case.K @ new)[first]
    by_hand = vec(PROBLEM.network.layers[0].weight_matrix(old) @ case.T.T @ case.T)
    assert_close(followed, by_hand, FUNCTION, condition=case.condition, size=n, iterations=4)
    if stretched:
        with recording(), pytest.raises(AssertionError, match="error/tolerance"):
            assert_close(followed, old[first], FUNCTION, condition=case.condition, size=n)
    else:
        assert_close(followed, old[first], FUNCTION, condition=case.condition, size=n, iterations=4)
