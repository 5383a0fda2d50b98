"""Meta-optimization to the end: L-BFGS on the deterministic Q̂, through the engine's own code.

Q̂(φ) = E_g[ gᵀΔ + λ_FSD/2 ΔᵀGΔ + λ_WSD/2 ‖Δ‖² ] with Δ = u(θ, φ, g) − θ (P22 eq. 43).

The mean runs over a fixed set of gradients, so that nothing is random; each term is the engine's
`meta_backward` with the linear loss and the quadratic FSD.

What conditioning does. Q̂ is quadratic in P with Hessian C ⊗ M, C = E[ggᵀ], M = λ_FSD G + λ_WSD I:
Q̂(P) − Q̂* = ½ tr((P − P*)ᵀ M (P − P*) C) ≥ ½ σ_min(C) σ_min(M) ‖P − P*‖², in every structure that
holds P*. A line search compares values of Q̂, which are known to n eps |Q̂|, so that P is found to
‖P − P*‖ / ‖P*‖ = sqrt(2 n eps |Q̂*| / (σ_min(C) σ_min(M) ‖P*‖²)): the half of the digits, times the
root of the condition numbers. `MINIMIZER` is this bound. With |Q̂*| = ½ tr(C P*) ≤ ½ n σ_max(C)
/ σ_min(M) and ‖P*‖ ≥ 1/σ_min(M) it is at most sqrt(n² eps κ(C)), whatever κ(M): for n = 8 and
κ(C) = 4 below 3e-7 a term.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import apo_core as apo
from reference.arrays import Array
from reference.problem import Problem
from verification import bridge
from verification.strategies.readable import SEEDS_UP_TO
from verification.strategies.spd import rotation

EPS = float(np.finfo(np.float64).eps)
ROUNDS = 12  # of 60 iterations


def solve(
    rule: apo.UpdateRule,
    module: torch.nn.Module,
    problem: Problem,
    objective: apo.ProximalObjective,
    gradients: Array,
    inputs: Array,
) -> float:
    """Move φ to the minimum of Q̂ over the set of `gradients` (m, n); returns Q̂ there.

    Infinite if L-BFGS still descended after `ROUNDS` rounds: in A, B and S, Q̂ has saddle points
    and nearly flat valleys, where it can crawl for long.
    """
    solver = torch.optim.LBFGS(
        rule.parameters(),
        max_iter=60,
        tolerance_grad=0.0,
        tolerance_change=1e-16,
        history_size=100,
        line_search_fn="strong_wolfe",
    )
    optimizer = apo.APO(module, rule, objective, solver)
    outputs = bridge.outputs_closure(module, inputs)
    share = 1.0 / len(gradients)

    def evaluate() -> Tensor:
        solver.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for g in gradients:
            bridge.set_gradients(module, g, problem.network)
            terms = optimizer.meta_backward(loss=_unused, outputs=outputs, weight=share)
            total += share * terms.total
        return total

    value = float(evaluate())
    for _ in range(ROUNDS):
        solver.step(evaluate)  # pyright: ignore[reportArgumentType]
        last, value = value, float(evaluate())
        if not value < last - gradients.size * EPS * abs(value):  # nothing that rounding shows
            return value
    return math.inf


def _unused() -> Tensor:
    raise AssertionError("the linear loss term needs no pass")


def condition_of(C: Array, M: Array) -> float:
    """|Q̂*| / (σ_min(C) σ_min(M) ‖P*‖²), what `MINIMIZER` asks for."""
    P = np.linalg.inv(M)
    flat = np.linalg.eigvalsh(C)[0] * np.linalg.eigvalsh(M)[0] * np.linalg.norm(P) ** 2
    return max(1.0, 0.5 * float(np.trace(C @ P)) / flat)


@st.composite
def gradient_sets(draw: st.DrawFn, n: int, max_condition: float = 4.0) -> Array:
    """n gradients with a non-singular C = E[ggᵀ] of condition at most `max_condition`, (n, n)."""
    spread = draw(
        st.lists(st.floats(1.0, max_condition), min_size=n, max_size=n), label="eigenvalues of C"
    )
    left, right = (draw(st.integers(0, SEEDS_UP_TO), label="rotation") for _ in range(2))
    return rotation(n, right) * np.sqrt(n * np.array(spread)) @ rotation(n, left).T


@st.composite
def nearly_white_gradient_sets(draw: st.DrawFn, n: int) -> Array:
    """n gradients whose C = I + R has |R_ij| ≤ 0.1 / n off the diagonal, (n, n).

    Then the best diagonal and the best learning rates of layers are positive, as the logarithm and
    the square of φ need them.
    """
    seed = draw(st.integers(0, SEEDS_UP_TO), label="seed of C")
    R = np.random.default_rng(seed).uniform(-0.1 / n, 0.1 / n, (n, n))
    C = np.eye(n) + np.triu(R, 1) + np.triu(R, 1).T
    return np.sqrt(n) * np.linalg.cholesky(C).T
