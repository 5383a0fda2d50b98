"""The baselines that torch.optim lacks: KFAC and Shampoo, from well-kept libraries.

KFAC: the Kronecker factors, their eigenvalues and the damped inverse are those of curvlinops
(`KFACLinearOperator`, `KFACInverseLinearOperator`); the loop around them is here.
Shampoo: `pytorch_optimizer.Shampoo`, with the settings under which it is Algorithm 1 of Gupta et
al. (2018).
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
from pytorch_optimizer import Shampoo
from torch import Tensor, nn

from experiments.problems import Batch, LossName

with warnings.catch_warnings():
    # linear_operator, which curvlinops imports, compiles with the deprecated torch.jit.script
    warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
    from curvlinops import FisherType, KFACInverseLinearOperator, KFACLinearOperator

NORM_CONSTRAINT = 1e-3


class KroneckerFactored(torch.optim.Optimizer, ABC):
    """θ ← θ − η v, v ← μ v + ν d, d = (A ⊗ B + λI)⁻¹ g, one block a layer, weight and bias jointly.

    symbol   meaning
    A, B     a layer's KFAC factors: E[a aᵀ] of its inputs (with a 1 for the bias) and E[Ds Dsᵀ] of
             its output gradients; how that expectation is taken, a subclass says
    λ        `damping`, added to the product A ⊗ B by way of the factors' eigenvalues
    μ, η     `momentum`, `lr`
    ν        min(1, √(κ / η² dᵀg)): κ, `norm_constraint`, bounds a step's length in the metric of
             the damped curvature (Ba et al., 2017); without it the first steps explode

    Differs from Martens and Grosse (2015): every `interval` steps the factors are rebuilt from a
    fresh sample of examples, where they average over past mini-batches; the damping is exact,
    where they damp each factor; the step size is fixed and bounded, not learned.

    The inverse is no part of `state_dict`: after loading it is rebuilt at the next step.

    Args:
        model: Linear (and Conv2d) layers hold all its parameters.
        curvature_batch: draws (inputs, targets) for the factors.
        loss_name: of the loss whose gradients it is given.
        lr: η > 0.
        damping: λ > 0.
        momentum: μ in [0, 1).
        interval: steps from one rebuilding to the next.
        norm_constraint: κ > 0; math.inf for none.

    Raises:
        ValueError: a rate or damping is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        curvature_batch: Callable[[], Batch],
        loss_name: LossName,
        *,
        lr: float,
        damping: float,
        momentum: float = 0.9,
        interval: int = 10,
        norm_constraint: float = NORM_CONSTRAINT,
    ) -> None:
        if lr <= 0 or damping <= 0:
            raise ValueError(f"`lr` and `damping` must be positive, got {lr} and {damping}.")
        super().__init__(model.parameters(), {"lr": lr, "momentum": momentum})
        self.model = model
        self.curvature_batch = curvature_batch
        self.loss_name: LossName = loss_name
        self.damping = damping
        self.interval = interval
        self.norm_constraint = norm_constraint
        self._rebuilt = 0
        self._since_rebuild: int | None = None
        self._inverse: KFACInverseLinearOperator | None = None
        self._scale = 1.0

    @abstractmethod
    def curvature(self, batch: Batch) -> tuple[KFACLinearOperator, float]:
        """Curvlinops' factors at the present θ, of a loss that is ours divided by the number."""

    @property
    def _params(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def rebuild(self) -> None:
        """Take the Kronecker factors at the present θ, from a fresh sample, and invert them."""
        with torch.enable_grad():
            curvature, self._scale = self.curvature(self.curvature_batch())
            curvature.compute_kronecker_factors()
        # scale·C + λI = scale·(C + λ/scale·I)
        self._inverse = KFACInverseLinearOperator(
            curvature, damping=self.damping / self._scale, use_exact_damping=True
        )
        self._rebuilt += 1
        self._since_rebuild = 0

    def precondition(self, grads: list[Tensor]) -> list[Tensor]:
        """(A ⊗ B + λI)⁻¹ g with the factors of the last rebuilding."""
        if self._inverse is None:
            self.rebuild()
        assert self._inverse is not None
        product: Any = self._inverse @ grads  # a list of tensors, as `grads` is one
        return [p / self._scale for p in product]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients in `.grad`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._since_rebuild is None or self._since_rebuild >= self.interval:
            self.rebuild()
        params = self._params
        grads = [p.grad for p in params if p.grad is not None]
        directions = self.precondition(grads)
        group = self.param_groups[0]
        product = sum((d * g).sum().item() for d, g in zip(directions, grads, strict=True))
        length = group["lr"] ** 2 * product  # η² dᵀg ≥ 0
        shrink = min(1.0, math.sqrt(self.norm_constraint / length)) if length > 0 else 1.0
        for p, direction in zip(params, directions, strict=True):
            state = self.state[p]
            if "momentum_buffer" in state:
                state["momentum_buffer"].mul_(group["momentum"]).add_(direction, alpha=shrink)
            else:
                state["momentum_buffer"] = shrink * direction
            p.add_(state["momentum_buffer"], alpha=-group["lr"])
        assert self._since_rebuild is not None
        self._since_rebuild += 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load learning rate and momentum; the factors are rebuilt at the next step."""
        super().load_state_dict(state_dict)
        self._since_rebuild, self._inverse = None, None


@final
class KFAC(KroneckerFactored):
    """The expectation over the model's distribution taken exactly: a backward pass an output.

    The curvature is that of the mean loss ½‖z − t‖² (whose Fisher is that of N(z, I)) or of the
    cross-entropy; curvlinops' MSELoss, a mean over outputs without the ½, is rescaled to it.
    """

    def curvature(self, batch: Batch) -> tuple[KFACLinearOperator, float]:
        """The factors of the exact Fisher; MSELoss is 2/outputs times our ½‖z − t‖²."""
        inputs, targets = batch
        classes = self.loss_name == "cross_entropy"
        curvature = KFACLinearOperator(
            self.model,
            nn.CrossEntropyLoss() if classes else nn.MSELoss(),
            self._params,
            [(inputs, targets)],
            check_deterministic=False,
            fisher_type=FisherType.TYPE2,
            separate_weight_and_bias=False,
            num_per_example_loss_terms=1,
            num_data=len(inputs),
        )
        return curvature, 1.0 if classes else targets[0].numel() / 2


def shampoo(model: nn.Module, *, lr: float, interval: int = 1) -> torch.optim.Optimizer:
    """W ← W − η L^{−1/4} ∇W R^{−1/4}, L = εI + Σ ∇W ∇Wᵀ, R = εI + Σ ∇Wᵀ ∇W, ε = 1e-4.

    A bias has one factor, to the power −1/2. Of the library's two versions this is the literal
    Algorithm 1; `ScalableShampoo` grafts the norm of SGD's step, and its default leaves the
    preconditioner at the identity for 1000 steps. Momentum stays 0: the library's feeds the
    preconditioned direction back into the statistics.

    Source: Gupta et al. (2018), Algorithm 1.

    Args:
        model: whose parameters it moves.
        lr: η > 0.
        interval: steps from one inverse root (an SVD of each factor) to the next; before the
            first, at step `interval`, the parameters stay.
    """
    return Shampoo(
        model.parameters(),
        lr=lr,
        momentum=0.0,
        matrix_eps=1e-4,
        preconditioning_compute_steps=interval,
    )
