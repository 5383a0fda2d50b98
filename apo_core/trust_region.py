"""A trust region: no lookahead and no meta-step may raise Q by more than (κ − 1)·|J_B(θ)|.

symbol   here                       meaning
κ        `objective.trust_factor`   2 lets the loss of the mini-batch double
s        `APO.trust_scale`          in (0, 1]: the lookahead and the steps are θ + sΔ
Q(φ; s)                             Q at θ + sΔ; Q(φ; 0) is J_B(θ) (0 where that is left out of Q)

A preconditioner whose steps are too long cannot learn its way back by small steps of φ before θ
diverges. So each meta-step first looks for the largest s among 2s, s, s/2, ... (at most 1) with

    Q(φ; s) − Q(φ; 0) ≤ (κ − 1)·|J_B(θ)|,

takes the meta-gradient there, and all steps until the next one with that s. Then the move of φ
that the meta-optimizer proposes is halved until Q(φ_new; s) − Q(φ; s) is within the same bound, and
given up after `MOVE_HALVINGS`. What is not finite is out of the region.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apo_core.meta_gradient import MetaGradient, MetaProblem

STEP_HALVINGS = 100  # 1e-30: a step that is still too long then has overflowed
MOVE_HALVINGS = 10  # 1e-3 of the move: nearly none


def fit_step(problem: MetaProblem, step_scale: float) -> tuple[float, MetaGradient, Tensor]:
    """s, Q with its gradient there, and how large Q may become when φ moves.

    Where g, Δ or J_B(θ) is not finite s stays: no step is too long for such a mini-batch.
    """
    assert problem.objective.trust_factor is not None
    value = problem.current_loss()
    allowed = (problem.objective.trust_factor - 1.0) * value.abs()
    standing = value if problem.objective.loss == "exact" else torch.zeros_like(value)
    fitted = min(1.0, 2.0 * step_scale)
    found = problem.gradient(fitted)
    if not (found.looked_ahead and bool(value.isfinite())):
        return step_scale, found, allowed
    if not bool(found.terms.total - standing <= allowed):
        for _ in range(STEP_HALVINGS):
            fitted *= 0.5
            if bool(problem.terms(fitted).total - standing <= allowed):
                break
        found = problem.gradient(fitted)
    return fitted, found, found.terms.total + allowed


def shorten_move(
    problem: MetaProblem,
    phi: list[Tensor],
    before: list[Tensor],
    ceiling: Tensor,
    step_scale: float,
) -> int:
    """Halve the move of φ, in place, until Q is at most `ceiling`.

    Returns:
        How many halvings it took; `MOVE_HALVINGS` means that φ is back at `before`.
    """
    with torch.no_grad():
        for halvings in range(MOVE_HALVINGS):
            if bool(problem.terms(step_scale).total <= ceiling):
                return halvings
            torch._foreach_lerp_(phi, before, 0.5)
        torch._foreach_copy_(phi, before)
    return MOVE_HALVINGS
