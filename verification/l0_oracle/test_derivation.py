"""P22 appendix G, eq. 44 to 50, line by line as identities on random matrices.

| symbol | here |
|---|---|
| G | Hessian of the FSD; `G` symmetric, `skewed` not |
| E[g g^T] | `moment`, of the rows of `g` |
| lambda_FSD, lambda_WSD | `fsd`, `wsd` |
"""

from typing import NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reference import (
    approximate_meta_gradient,
    closed_form_step,
    complex_step_jacobian,
    preconditioned,
    proximity_matrix,
)
from reference.arrays import Array
from verification.strategies import spd_matrices, weights
from verification.tolerances import COMPLEX_STEP, ROUNDING, SOLVE, assert_close


class Derivation(NamedTuple):
    """What the lines of the proof are about."""

    P: Array
    G: Array
    g: Array
    fsd: float
    wsd: float

    @property
    def moment(self) -> Array:
        """E[g g^T]."""
        return self.g.T @ self.g / len(self.g)

    @property
    def size(self) -> int:
        """Terms of the longest sum: the products of two or three matrices, and the mean."""
        return 3 * len(self.P) + len(self.g)

    @property
    def magnitude(self) -> float:
        """Norm of what eq. 45 adds."""
        P, G, g = np.abs(self.P), np.abs(self.G), np.abs(self.g)
        terms = np.eye(len(P)) + self.fsd / 2 * (G + G.T) @ P + self.wsd * P
        return float(np.linalg.norm(terms @ g.T @ g)) / len(g)


@st.composite
def derivations(draw: st.DrawFn, symmetric: bool = True) -> Derivation:
    """Random P and g, more gradients than parameters, a G of condition number at most 100."""
    spd = draw(spd_matrices(max_size=4, max_condition=1e2, max_log_scale=1.0), label="G")
    n = len(spd.eigenvalues)
    rng = np.random.default_rng(draw(st.integers(0, 2**16), label="seed"))
    skew = np.zeros((n, n)) if symmetric else rng.standard_normal((n, n))
    return Derivation(
        P=rng.standard_normal((n, n)),
        G=spd.matrix + skew - skew.T,
        g=rng.standard_normal((2 * n + 1, n)),
        fsd=draw(weights(min_decade=-2.0, max_decade=1.0, zero=False), label="lambda_FSD"),
        wsd=draw(weights(min_decade=-2.0, max_decade=1.0), label="lambda_WSD"),
    )


def eq_44(d: Derivation, P: Array) -> Array:
    """E[-g^T P g + lambda_FSD/2 g^T P^T G P g + lambda_WSD/2 g^T P^T P g], as printed, (1,)."""
    values = [
        -g @ P @ g + d.fsd / 2 * (g @ P.T @ d.G @ P @ g) + d.wsd / 2 * (g @ P.T @ P @ g)
        for g in d.g
    ]
    return np.array([np.mean(values)])


def eq_45(d: Derivation) -> Array:
    """E[-g g^T + lambda_FSD/2 (G P g g^T + G^T P g g^T) + lambda_WSD P g g^T], as printed."""
    lines = []
    for g in d.g:
        gg = np.outer(g, g)
        lines.append(-gg + d.fsd / 2 * (d.G @ d.P @ gg + d.G.T @ d.P @ gg) + d.wsd * d.P @ gg)
    return np.mean(lines, axis=0)


def eq_46(d: Derivation) -> Array:
    """E[-g g^T + lambda_FSD G P g g^T + lambda_WSD P g g^T], as printed."""
    outer = [np.outer(g, g) for g in d.g]
    return np.mean([-gg + d.fsd * d.G @ d.P @ gg + d.wsd * d.P @ gg for gg in outer], axis=0)


def eq_48(d: Derivation) -> Array:
    """lambda_FSD G P + lambda_WSD P - I, as printed."""
    return d.fsd * d.G @ d.P + d.wsd * d.P - np.eye(len(d.P))


@given(d=derivations(symmetric=False))
def test_eq_45_is_the_gradient_of_eq_44(d: Derivation) -> None:
    """Also where G is not symmetric, which is why both G and G^T stand there."""
    shape = d.P.shape
    numeric = complex_step_jacobian(lambda phi: eq_44(d, phi.reshape(shape)), d.P.ravel())
    assert_close(
        eq_45(d),
        numeric.reshape(shape),
        COMPLEX_STEP,
        size=d.size,
        scale=d.magnitude,
        what="eq. 45",
    )


@given(d=derivations())
def test_eq_46_is_eq_45_for_a_symmetric_g(d: Derivation) -> None:
    assert_close(eq_46(d), eq_45(d), ROUNDING, size=d.size, scale=d.magnitude, what="eq. 46")


def test_eq_46_needs_a_symmetric_g() -> None:
    skewed = Derivation(np.eye(2), np.array([[1.0, 1.0], [-1.0, 1.0]]), np.eye(2), 1.0, 0.0)
    assert np.linalg.norm(eq_46(skewed) - eq_45(skewed)) > 0.5


@given(d=derivations())
def test_eq_47_factors_out_the_second_moment(d: Derivation) -> None:
    """With G where eq. 47 prints F; and the oracle's gradient is this product."""
    product = eq_48(d) @ d.moment
    assert_close(product, eq_46(d), ROUNDING, size=d.size, scale=d.magnitude, what="eq. 47")
    by_oracle = approximate_meta_gradient(d.P, d.g, proximity_matrix(d.G, d.fsd, d.wsd))
    assert_close(by_oracle, product, ROUNDING, size=d.size, scale=d.magnitude, what="dQ-hat/dP")


@given(d=derivations())
def test_eq_48_follows_where_the_second_moment_is_non_singular(d: Derivation) -> None:
    """The second moment can be divided out, so the left side of eq. 47 vanishes only with 48's."""
    condition = float(np.linalg.cond(d.moment))
    recovered = np.linalg.solve(d.moment, eq_46(d).T).T
    scale = d.magnitude / float(np.linalg.norm(d.moment, 2))
    assert_close(
        recovered, eq_48(d), SOLVE, condition=condition, size=d.size, scale=scale, what="eq. 48"
    )


@given(d=derivations(), seed=st.integers(0, 2**16))
def test_eq_47_holds_without_eq_48_where_the_second_moment_is_singular(
    d: Derivation, seed: int
) -> None:
    """Necessity: P* plus anything that sends the only gradient to zero."""
    g = np.zeros((1, len(d.P) + 1))
    g[0, 0] = 1.0
    M = np.pad(proximity_matrix(d.G, d.fsd, d.wsd), (0, 1))
    M[-1, -1] = 1.0
    other = np.linalg.inv(M)
    other[:, -1] += 1.0 + np.random.default_rng(seed).uniform(size=len(M))
    gradient = approximate_meta_gradient(other, g, M)
    condition = float(np.linalg.cond(M))
    assert_close(
        gradient,
        np.zeros_like(M),
        SOLVE,
        condition=condition,
        size=len(M),
        scale=1.0,
        what="eq. 47",
    )
    assert np.linalg.norm(M @ other - np.eye(len(M))) > 0.5


@given(d=derivations())
def test_eq_49_collects_the_terms_of_eq_48(d: Derivation) -> None:
    eq_49 = proximity_matrix(d.G, d.fsd, d.wsd) @ d.P - np.eye(len(d.P))
    scale = d.magnitude / float(np.linalg.norm(d.moment, 2))
    assert_close(eq_49, eq_48(d), ROUNDING, size=d.size, scale=scale, what="eq. 49")


@given(d=derivations())
def test_eq_50_solves_every_line(d: Derivation) -> None:
    M = proximity_matrix(d.G, d.fsd, d.wsd)
    star = d._replace(P=np.linalg.inv(M))
    condition, zero = float(np.linalg.cond(M)), np.zeros_like(M)
    for name, residual, scale in (
        ("eq. 45", eq_45(star), star.magnitude),
        ("eq. 46", eq_46(star), star.magnitude),
        ("eq. 48", eq_48(star), 1.0),
    ):
        assert_close(
            residual, zero, SOLVE, condition=condition, size=d.size, scale=scale, what=name
        )


@given(d=derivations(), seed=st.integers(0, 2**16))
def test_eq_50_takes_the_step_of_eq_4(d: Derivation, seed: int) -> None:
    """The preconditioned step with P* is the closed-form proximal step, for every gradient."""
    theta, g = np.random.default_rng(seed).standard_normal((2, len(d.P)))
    M = proximity_matrix(d.G, d.fsd, d.wsd)
    assert_close(
        preconditioned(theta, g, np.linalg.inv(M)),
        closed_form_step(theta, g, d.G, d.fsd, d.wsd),
        SOLVE,
        condition=float(np.linalg.cond(M)),
        scale=float(np.linalg.norm(theta) + np.linalg.norm(np.linalg.solve(M, g))),
        what="theta - P* g",
    )
