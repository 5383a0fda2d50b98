"""A trust region: no lookahead and no meta-step may raise Q by more than (κ − 1)·|J_B(θ)|.

symbol   here                       meaning
κ        `objective.trust_factor`   1.1 lets the loss of the mini-batch rise by a tenth
s        `APO.trust.scale`          in (0, 1]: the lookahead and the steps are θ + sΔ
r        `APO.trust.radius`         the longest ‖sΔ‖ until the next meta-step
Q(φ; s)                             Q at θ + sΔ; Q(φ; 0) is J_B(θ) (0 where that is left out of Q)

A preconditioner whose steps are too long cannot learn its way back by small steps of φ before θ
diverges. So each meta-step first looks for the largest s among 2s, s, s/2, ... (at most 1) with

    Q(φ; s) − Q(φ; 0) ≤ (κ − 1)·|J_B(θ)|,

takes the meta-gradient there, and all steps until the next one with that s. Then the move of φ
that the meta-optimizer proposes is halved until Q(φ_new; s) − Q(φ; s) is within the same bound, and
given up after `MOVE_HALVINGS`. What is not finite is out of the region. Between two meta-steps,
where nothing is looked at, no step is longer than r, twice the step that followed the last one.

With the region a step may go past the best point of its line, to θ + σsΔ with `update_scale` σ in
(1, 2): over-relaxation. Where Q is quadratic along Δ and Δ its best multiple, Q falls by 2σ − σ²
times what it does at σ = 1: it falls for all σ < 2. Why one would: a step that is best for one step
follows the sharpness of where training already is, and shorter steps let the sharpness grow
(`experiments/sharpness.py` measures it); on the tasks of `experiments/limits.py` σ = 1.8 takes most
of what a learned learning rate of SGD loses to the best fixed one. Over-relaxed proximal point
iterations converge for σ in (0, 2): Eckstein and Bertsekas (1992).
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from apo_core.meta_gradient import MetaGradient, MetaProblem
from apo_core.types import Tensors

STEP_HALVINGS = 100  # 1e-30: a step that is still too long then has overflowed
MOVE_HALVINGS = 10  # 1e-3 of the move: nearly none
RADIUS_FACTOR = 2.0  # gradients of mini-batches differ, and steps must be able to grow


@final
class TrustRegion:
    """s, r and a count; without a `trust_factor` the steps are as they come.

    Args:
        device: of the parameters.

    Attributes:
        scale: s in (0, 1].
        radius: r, (), infinite before the first meta-step.
        halvings: how often a move of φ was halved.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = 1.0
        self.radius = torch.tensor(torch.inf, device=device)
        self.halvings = 0
        self._ceiling: Tensor | None = None

    def fit_step(self, problem: MetaProblem) -> MetaGradient:
        """Q and its gradient at the largest s within the region.

        Where g, Δ or J_B(θ) is not finite s stays: no step is too long for such a mini-batch.
        """
        factor = problem.objective.trust_factor
        self._ceiling = None
        if factor is None:
            return problem.gradient(self.scale)
        value = problem.current_loss()
        allowed = (factor - 1.0) * value.abs()
        standing = value if problem.objective.loss == "exact" else torch.zeros_like(value)
        scale = min(1.0, 2.0 * self.scale)
        found = problem.gradient(scale)
        if not (found.looked_ahead and bool(value.isfinite())):
            return found
        if not bool(found.terms.total - standing <= allowed):
            for _ in range(STEP_HALVINGS):
                scale *= 0.5
                if bool(problem.terms(scale).total - standing <= allowed):
                    break
            found = problem.gradient(scale)
        self.scale, self._ceiling = scale, found.terms.total + allowed
        return found

    @torch.no_grad()
    def shorten_move(self, problem: MetaProblem, phi: Tensors, before: Tensors) -> None:
        """Halve the move of φ, in place, until Q has risen by no more than allowed."""
        if self._ceiling is None:
            return
        for _ in range(MOVE_HALVINGS):
            if bool(problem.terms(self.scale).total <= self._ceiling):
                return
            torch._foreach_lerp_(phi, before, 0.5)
            self.halvings += 1
        torch._foreach_copy_(phi, before)

    def within_radius(self, moves: Tensors, length: Tensor, renew: bool) -> Tensors:
        """Δ made no longer than r.

        Args:
            moves: Δ.
            length: how far θ would move, ().
            renew: whether this step, as it is taken, sets r anew.
        """
        shrink = torch.where(length > self.radius, self.radius / length, 1.0)
        if renew:  # a length that is not finite is a step that is not taken
            radius = RADIUS_FACTOR * shrink * length
            self.radius = torch.where(length.isfinite(), radius, self.radius)
        return list(torch._foreach_mul(moves, shrink))

    def numbers(self) -> dict[str, float]:
        """What a log and a checkpoint hold."""
        return {
            "trust_scale": self.scale,
            "trust_radius": float(self.radius),
            "halvings": float(self.halvings),
        }

    def load(self, numbers: dict[str, float]) -> None:
        """Go on with the numbers of another."""
        self.scale, self.halvings = numbers["trust_scale"], int(numbers["halvings"])
        self.radius.fill_(numbers["trust_radius"])
