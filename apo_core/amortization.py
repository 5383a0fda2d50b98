"""How far an amortized rule is from the best rule of its form: Q̂(φ) − min Q̂, over mini-batches.

symbol   here        meaning
φ, φ*                the rule's parameters, and those that minimize the mean of Q̂
Q̂        `mean`      the mean over the mini-batches of gᵀΔ + λ_FSD/2 ΔᵀGΔ + λ_WSD/2 ‖Δ‖²
g                    ∇J_B(θ) of each mini-batch, taken once
Δ                    u(θ, φ, g) − θ

Source: P22 eq. 43; Theorem 1 has the least Q̂ of the dense preconditioner.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apo_core.distributed import is_sharded, mean_over_ranks, without_synchronization
from apo_core.lookahead import undisturbed
from apo_core.meta_gradient import MetaProblem
from apo_core.objective import ProximalObjective
from apo_core.optimizer import APO
from apo_core.outputs import require_scalar
from apo_core.types import Closure, OutputsClosure, Tensors, trainable_parameters
from apo_core.update_rule import UpdateRule

ROUND = 50  # iterations of L-BFGS from one restart to the next


class AmortizationGap(NamedTuple):
    """What the rule attains and what its form could attain, at the present θ.

    Q̂ is 0 for no step at all, so `gap / -best` is the share of the attainable that is not attained.

    Args:
        q: the mean of Q̂ at φ.
        best: the least mean of Q̂ that was found; a local minimum where Q̂ is not convex in φ.
        gap: q − best ≥ 0.
        converged: whether a round of L-BFGS from `phi` found nothing lower that rounding shows.
        phi: φ*, as `dict(rule.named_parameters())`.
    """

    q: float
    best: float
    gap: float
    converged: bool
    phi: dict[str, Tensor]


def amortization_gap(
    optimizer: APO,
    batches: Sequence[tuple[Closure, OutputsClosure | None]],
    *,
    steps: int = 1000,
    objective: ProximalObjective | None = None,
) -> AmortizationGap:
    """Q̂(φ) − min_φ Q̂ at the present θ, the minimum by L-BFGS over a copy of φ.

    ```python
    pairs = [(partial(loss, batch), partial(outputs, other)) for batch, other in samples]
    q, best, gap, converged, phi = apo.amortization_gap(optimizer, pairs)
    ```

    θ, φ, the states, `.grad`, buffers and the random state stay as they are. An evaluation costs
    on every mini-batch what a meta-step costs. Where λ_WSD = 0, and the mini-batches' G leave a
    direction free, Q̂ may fall for ever: then `best` is what `steps` reached.

    Args:
        optimizer: as it is trained.
        batches: (loss, outputs) of each mini-batch pair, closures as for `APO.meta_step`.
        steps: the most iterations of L-BFGS.
        objective: what to minimize; None for Q̂: the optimizer's discrepancy and weights with the
            linear loss and the quadratic FSD. `optimizer.objective` is Q itself, whole steps taken:
            a trust region is left out.

    Raises:
        TypeError: `optimizer` is no APO.
        ValueError: no mini-batch, no step, or an objective that is not finite at φ.
        RuntimeError: the model is sharded (FSDP2).
    """
    if not isinstance(optimizer, APO):
        raise TypeError(f"`optimizer` must be an apo_core.APO, got {type(optimizer).__name__}.")
    if not batches:
        raise ValueError("`batches` must hold at least one pair of closures, got none.")
    if not (isinstance(steps, int) and steps >= 1):
        raise ValueError(f"`steps` must be an integer of at least 1, got {steps!r}.")
    mean = _Mean(optimizer, batches, objective or _quadratic_model(optimizer.objective))
    with mean.kept_gradients():
        q = value = mean.evaluate()
        if not math.isfinite(q):
            raise ValueError(
                f"`batches` must give a finite objective at the present φ, got {q}; check the "
                "mini-batches, or lower the learning rate."
            )
        converged = False
        for start in range(0, steps, ROUND):
            last = value
            value, converged = mean.descend(last, min(ROUND, steps - start))
            if converged or not value < last:
                break
    phi = {name: p.detach() for name, p in mean.rule.named_parameters()}
    return AmortizationGap(q, value, q - value, converged, phi)


def _quadratic_model(objective: ProximalObjective) -> ProximalObjective:
    """Q̂: the same divergence and weights, the loss linear, the FSD quadratic."""
    return ProximalObjective(
        objective.discrepancy, objective.fsd_weight, objective.wsd_weight, "linear", "quadratic"
    )


class _Mean:
    """The mean of an objective over mini-batches, as a function of a copy of φ.

    Attributes:
        rule: the copy, on the optimizer's own model.
        rounding: what rounding may do to the mean at the last evaluation.
    """

    def __init__(
        self,
        optimizer: APO,
        batches: Sequence[tuple[Closure, OutputsClosure | None]],
        objective: ProximalObjective,
    ) -> None:
        self.model, self.objective, self.batches = optimizer.model, objective, batches
        self.rule = _copied(optimizer.rule, self.model)
        self.phi: Tensors = [p for p in self.rule.parameters() if p.requires_grad]
        self.state = optimizer.rule_state if self.rule.lookahead_from_state else {}
        self.named = trainable_parameters(self.model)
        if any(map(is_sharded, self.named.values())):
            raise RuntimeError(
                "`optimizer.model` must not be sharded, got DTensor parameters; measure the gap on "
                "one process that holds the whole model."
            )
        self.grads = [self._gradient(loss) for loss, _ in batches]
        self.rounding = 0.0

    def evaluate(self) -> float:
        """The mean at φ, and its gradient in `.grad` of φ; infinite where it is not finite."""
        total, size = 0.0, 0.0
        slopes = [torch.zeros_like(p) for p in self.phi]
        share = 1.0 / len(self.batches)
        for grads, (loss, outputs) in zip(self.grads, self.batches, strict=True):
            for p, g in zip(self.named.values(), grads, strict=True):
                p.grad = g
            found = MetaProblem(
                self.model, self.rule, self.objective, self.named, self.state, loss, outputs
            ).gradient()
            if found.trouble is not None:
                return math.inf
            total += share * float(found.terms.total)
            size += share * sum(abs(float(term)) for term in found.terms)
            torch._foreach_add_(slopes, list(found.gradients.values()), alpha=share)
        for p, slope in zip(self.phi, slopes, strict=True):
            p.grad = slope
        first = next(iter(self.named.values()))
        # Rounding errors of n terms are as good as independent: they add up as √n.
        entries = sum(p.numel() for p in self.named.values())
        self.rounding = math.sqrt(entries) * torch.finfo(first.dtype).eps * size
        return total

    def descend(self, start: float, iterations: int) -> tuple[float, bool]:
        """The least mean that so many iterations of L-BFGS meet, and whether none is below `start`.

        φ moves there. Every call begins with a fresh memory, that is with steepest descent.
        """
        least, rounding, sound = start, 0.0, True
        kept = [p.detach().clone() for p in self.phi]
        solver = torch.optim.LBFGS(
            self.phi,
            max_iter=iterations,
            max_eval=2 * iterations + 25,  # a search that runs out of them goes back to its start
            history_size=ROUND,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> float:
            nonlocal least, rounding, sound
            value = self.evaluate()
            sound = sound and math.isfinite(value)
            if value <= least:
                least, rounding = value, self.rounding
                torch._foreach_copy_(kept, [p.detach() for p in self.phi])
            return value

        solver.step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            torch._foreach_copy_(self.phi, kept)
        return least, sound and start - least <= rounding

    @contextmanager
    def kept_gradients(self) -> Iterator[None]:
        """`.grad` of the model's parameters may be replaced inside, and is what it was after."""
        kept = [p.grad for p in self.named.values()]
        try:
            yield
        finally:
            for p, grad in zip(self.named.values(), kept, strict=True):
                p.grad = grad

    def _gradient(self, loss: Closure) -> list[Tensor | None]:
        """g of a mini-batch, None for a parameter that it does not reach; the mean over ranks."""
        params: Tensors = list(self.named.values())
        with undisturbed(self.model), without_synchronization(self.model), torch.enable_grad():
            grads = torch.autograd.grad(require_scalar(loss(), "loss"), params, allow_unused=True)
        means = iter(mean_over_ranks(self.model, [g for g in grads if g is not None]))
        return [None if g is None else next(means) for g in grads]


def _copied(rule: UpdateRule, model: nn.Module) -> UpdateRule:
    """A copy with its own φ, on the very same model where it holds a part of it."""
    shared = [*model.modules(), *model.parameters(), *model.buffers()]
    return copy.deepcopy(rule, {id(part): part for part in shared})
