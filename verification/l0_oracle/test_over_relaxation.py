"""Steps past the proximal point: with any relaxation below 2 they lower Q, and converge."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reference.proximal_point import closed_form_step
from verification.strategies import SPD, spd_matrices, weights
from verification.tolerances import SOLVE, assert_close

MATRICES = spd_matrices(max_size=4, max_condition=1e2, max_log_scale=1.0)
WEIGHTS = weights(min_decade=-1.0, max_decade=1.0, zero=False)


@given(G=MATRICES, fsd=WEIGHTS, wsd=WEIGHTS, sigma=st.floats(0.1, 3.0), seed=st.integers(0, 2**16))
def test_q_falls_by_two_sigma_less_its_square(
    G: SPD, fsd: float, wsd: float, sigma: float, seed: int
) -> None:
    """Q̂(θ + σΔ*) − Q̂(θ) = (2σ − σ²) (Q̂(θ + Δ*) − Q̂(θ)), with Δ* = −P* g and Q̂ written out."""
    g = np.random.default_rng(seed).standard_normal(len(G.eigenvalues))
    M = fsd * G.matrix + wsd * np.eye(len(g))
    step = closed_form_step(np.zeros_like(g), g, G.matrix, fsd, wsd)

    def change(s: float) -> float:
        return float(s * g @ step + 0.5 * s**2 * step @ M @ step)

    assert change(1.0) < 0.0
    top = float(np.linalg.eigvalsh(M)[-1])
    scale = (sigma + sigma**2) * float(np.abs(g) @ np.abs(step) + top * np.linalg.norm(step) ** 2)
    assert_close(
        np.float64(change(sigma)),
        np.float64((2 * sigma - sigma**2) * change(1.0)),
        SOLVE,
        condition=top / float(np.linalg.eigvalsh(M)[0]),
        size=len(g),
        scale=scale,
        what="change of Q̂",
    )


@given(H=MATRICES, wsd=WEIGHTS, sigma=st.floats(0.1, 3.0), seed=st.integers(0, 2**16))
def test_relaxed_proximal_iterations_shrink_every_eigendirection_as_predicted(
    H: SPD, wsd: float, sigma: float, seed: int
) -> None:
    """On J = ½θᵀHθ a step maps the coordinate along h's eigenvector to 1 − σh/(h + λ) of itself.

    With the loss's own curvature in the place of λ_FSD G the closed form is the exact proximal
    point. The factor is in (−1, 1) for every λ > 0 if σ < 2; beyond, a small λ gives less than −1.
    """
    theta = np.random.default_rng(seed).standard_normal(len(H.eigenvalues))
    h, vectors = np.linalg.eigh(H.matrix)
    point = closed_form_step(theta, H.matrix @ theta, H.matrix, 1.0, wsd)
    moved = theta + sigma * (point - theta)
    factors = 1.0 - sigma * h / (h + wsd)
    if sigma < 2.0:
        assert np.all(np.abs(factors) < 1.0)
    # eigh finds the eigensystem of H + E with ‖E‖ of order n eps ‖H‖; like the solve's backward
    # error it reaches the step through M⁻¹, M = H + λI: no more than M's condition number.
    assert_close(
        vectors.T @ moved,
        factors * (vectors.T @ theta),
        SOLVE,
        condition=(h[-1] + wsd) / (h[0] + wsd),
        size=len(h),
        scale=(1.0 + 2.0 * sigma) * float(np.linalg.norm(theta)),
        what="θ in the eigenbasis",
    )


def test_beyond_two_they_diverge() -> None:
    """σ = 2.1, h = 1, λ = 0.01: the factor is 1 − 2.1/1.01 = −1.079."""
    theta, H = np.ones(1), np.ones((1, 1))
    for _ in range(50):
        theta = theta + 2.1 * (closed_form_step(theta, H @ theta, H, 1.0, 0.01) - theta)
    assert abs(theta[0]) > 1.07**50
