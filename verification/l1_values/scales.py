"""First-order bounds, in units of the unit roundoff, of what rounding does to Q, its terms and q.

| symbol | meaning                                                                  | shape |
|--------|--------------------------------------------------------------------------|-------|
| e_x    | bound on the absolute error of x, divided by u                            | as x  |
| d      | θ' − θ                                                                   | (n,)  |
| H_Q    | ∂q/∂θ': how an error of the lookahead reaches q                           | (n, n) |

They are the `scale` of PROPAGATED, with size 1: what the errors of all intermediate terms amount
to in the result.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from reference.arrays import Array
from reference.meta_objective import MetaObjective
from reference.problem import complex_step_jacobian
from verification.l0_oracle.rounding import (
    PassErrors,
    divergence_gradient_error,
    divergence_value_error,
    gradient_error,
    loss_gradient_error,
    loss_value_error,
    pass_errors,
)
from verification.strategies import MetaCase


class TermErrors(NamedTuple):
    """Bounds for the three addends of Q."""

    loss: float
    fsd: float
    wsd: float


def lookahead_gradient_error(
    case: MetaCase, objective: MetaObjective, lookahead: Array, e_lookahead: Array
) -> float:
    """Norm of the bound for q = ∇_θ' Q, with θ' known to `e_lookahead` (n,)."""
    network, loss = case.problem.network, case.problem.loss
    e_lookahead = e_lookahead + np.abs(case.theta)  # of θ + Δ, and of d taken back from it
    d = _largest_step(case, lookahead)
    at_loss = lookahead if objective.loss == "exact" else case.theta
    on_batch = pass_errors(network, at_loss, case.batch.inputs)
    dL = loss.gradient(on_batch.z, case.batch.targets)
    total = gradient_error(on_batch, dL, loss_gradient_error(on_batch, dL))
    there = pass_errors(network, case.theta, case.other.inputs)
    if objective.fsd == "exact":
        here = pass_errors(network, lookahead, case.other.inputs)
        drho = case.discrepancy.gradient(here.z, there.z)
        fsd = gradient_error(here, drho, divergence_gradient_error(here, there))
    else:
        fsd = float(np.linalg.norm(_curvature_error(case, there, d)))
    total += objective.fsd_weight * fsd
    total += objective.wsd_weight * float(np.linalg.norm(3.0 * d))
    bent = objective.loss == "quadratic"
    straight = case.objective("linear", objective.fsd) if bent else objective
    H_Q = complex_step_jacobian(
        lambda u: straight.lookahead_gradient(case.theta, u, case.batch, case.other.inputs),
        lookahead,
    )
    if bent:
        H = objective.loss_curvature(case.theta, case.batch)
        total += _hessian_error(case, total) * float(np.linalg.norm(d))
        H_Q = np.abs(H_Q) + np.abs(H)
    return total + float(np.linalg.norm(np.abs(H_Q) @ e_lookahead))


def term_errors(
    case: MetaCase, objective: MetaObjective, lookahead: Array, e_lookahead: Array
) -> TermErrors:
    """Bounds for the values of the addends."""
    network, problem = case.problem.network, case.problem
    e_lookahead = e_lookahead + np.abs(case.theta)
    d = _largest_step(case, lookahead)
    n = len(d)
    if objective.loss == "exact":
        on_batch = pass_errors(network, lookahead, case.batch.inputs)
        dL = problem.loss.gradient(on_batch.z, case.batch.targets)
        loss = loss_value_error(on_batch, dL, problem.loss.value(on_batch.z, case.batch.targets))
        loss += np.abs(problem.gradient(lookahead, *case.batch)) @ e_lookahead
    else:
        loss = np.abs(case.gradient) @ ((n + 4) * d + e_lookahead)
    if objective.loss == "quadratic":
        on_batch = pass_errors(network, case.theta, case.batch.inputs)
        dL = problem.loss.gradient(on_batch.z, case.batch.targets)
        e_g = gradient_error(on_batch, dL, loss_gradient_error(on_batch, dL))
        H = np.abs(objective.loss_curvature(case.theta, case.batch))
        loss += _hessian_error(case, e_g) * float(d @ d) + d @ H @ ((n + 4) * d + e_lookahead)
        loss += abs(problem.value(case.theta, *case.batch))  # which the engine leaves out
    there = pass_errors(network, case.theta, case.other.inputs)
    if objective.fsd == "exact":
        here = pass_errors(network, lookahead, case.other.inputs)
        fsd = divergence_value_error(here, there)
        slope = np.einsum("nci,nc->i", here.J, case.discrepancy.gradient(here.z, there.z))
        fsd += np.abs(slope) @ e_lookahead / len(here.z)
    else:
        fsd = d @ (_curvature_error(case, there, d) + _curvature_error(case, there, e_lookahead))
    wsd = (n + 4) * float(d @ (d + e_lookahead))
    return TermErrors(float(loss), objective.fsd_weight * float(fsd), objective.wsd_weight * wsd)


def output_curvature_error(H: Array, e_z: Array | float) -> Array:
    """Bound for H_ρ, whose slope in each output is at most 1, or at most 2 |H_ρ| of exponentials.

    Four functions of 8 units on both sides are in it.
    """
    return (2.0 * e_z + 32.0) * np.maximum(1.0, H.max()) * np.ones_like(H)


def _hessian_error(case: MetaCase, e_g: float) -> float:
    """Norm of the bound for H = ∇²J_B(θ), from that for g.

    One derivative more: every term is differentiated, by a weight or by an activation, whose
    derivatives are at most 1; each layer has at most as many paths as it has weights. The oracle's
    complex steps err by √5 n + 16.
    """
    theta, layers = case.theta, case.problem.network.layers
    paths = np.prod([1.0 + np.linalg.norm(theta[layer.parameters]) for layer in layers])
    return float(
        (np.sqrt(5.0) * len(theta) + 16) * e_g * paths * (1.0 + np.abs(case.batch.inputs).max())
    )


def _largest_step(case: MetaCase, lookahead: Array) -> Array:
    """|d| where θ + Δ may have swallowed a part of Δ, (n,)."""
    return np.abs(lookahead - case.theta) + np.finfo(float).eps * np.abs(case.theta)


def _curvature_error(case: MetaCase, passes: PassErrors, d: Array) -> Array:
    """Bound for G d = E[Jᵀ H_ρ J] d, (n,)."""
    H = np.abs(case.discrepancy.output_hessian(passes.z))
    J, e_J = np.abs(passes.J), passes.e_J
    outputs = H.shape[1]
    e_H = output_curvature_error(H, np.max(passes.e_z, axis=1)[:, None, None])
    change, e_change = J @ d, e_J @ d  # (N, C)
    curved = np.einsum("ncd,nd->nc", H, change)
    e_curved = np.einsum("ncd,nd->nc", H, e_change) + np.einsum("ncd,nd->nc", e_H, change)
    terms = (
        np.einsum("nci,nc->i", e_J, curved)
        + np.einsum("nci,nc->i", J, e_curved)
        + (len(d) + 2 * outputs + len(H) + 8) * np.einsum("nci,nc->i", J, curved)
    )
    return terms / len(H)
