"""KFAC with sampled output gradients: for many outputs, and for binary pixels.

`experiments.baselines.KFAC` takes the expectation over the model's distribution exactly, one
backward pass an output: 784 for an autoencoder of MNIST. Here one target is drawn from it for each
example, as Martens and Grosse (2015) do: one backward pass, whatever the number of outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from experiments.baselines import FisherType, KFACInverseLinearOperator, KFACLinearOperator
from experiments.problems import Batch, LossName, Problem
from experiments.recipes import Recipe

NORM_CONSTRAINT = 1e-3  # κ, as in `baselines.KFAC`


@final
class SampledKFAC(torch.optim.Optimizer):
    """θ ← θ − η v, v ← μ v + ν d, d = (A ⊗ B + λI)⁻¹ g, one block a layer, weight and bias jointly.

    symbol   meaning
    A, B     a layer's KFAC factors: the mean of a aᵀ of its inputs (with a 1 for the bias) and of
             Ds Dsᵀ of its output gradients, at one target for each example drawn from the model
    λ        `damping`, of the product A ⊗ B
    μ, η     `momentum`, `lr`
    ν        min(1, √(κ / η² dᵀg)), κ = 1e-3, which bounds the step's length in the damped metric

    Differs from Martens and Grosse (2015) as `baselines.KFAC` does: the factors are rebuilt every
    `interval` steps from one fresh sample of examples, the damping is exact, and the step size
    is fixed and bounded, not learned.

    Args:
        model: Linear and Conv2d layers hold all its parameters.
        curvature_batch: draws (inputs, ...) for the factors.
        loss_name: "cross_entropy" or "bernoulli", of the loss whose gradients it is given.
        lr: η > 0.
        damping: λ > 0.
        momentum: μ in [0, 1).
        interval: steps from one rebuilding to the next.

    Raises:
        ValueError: the loss is another, a rate or damping is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        curvature_batch: Callable[[], Batch],
        loss_name: LossName,
        lr: float,
        damping: float,
        momentum: float = 0.9,
        interval: int = 10,
    ) -> None:
        if loss_name == "squared_error":
            raise ValueError(
                "`loss_name` must be 'cross_entropy' or 'bernoulli', got 'squared_error'; "
                "`baselines.KFAC` has its exact Fisher."
            )
        if lr <= 0 or damping <= 0:
            raise ValueError(f"`lr` and `damping` must be positive, got {lr} and {damping}.")
        super().__init__(model.parameters(), {"lr": lr, "momentum": momentum})
        self.model = model
        self.curvature_batch = curvature_batch
        self.loss_name: LossName = loss_name
        self.damping = damping
        self.interval = interval
        self._steps = 0
        self._inverse: KFACInverseLinearOperator | None = None
        self._scale = 1.0

    def rebuild(self) -> None:
        """Take the Kronecker factors at the present θ, from a fresh sample, and invert them."""
        inputs = self.curvature_batch()[0]
        with torch.enable_grad():
            outputs = self.model(inputs[:1]).shape[1]
            binary = self.loss_name == "bernoulli"
            # The Fisher does not look at the targets; curvlinops takes only those of its own form.
            targets = inputs.new_zeros(len(inputs), outputs)
            curvature = KFACLinearOperator(
                self.model,
                nn.BCEWithLogitsLoss() if binary else nn.CrossEntropyLoss(),
                [p for group in self.param_groups for p in group["params"]],
                [(inputs, targets if binary else targets[:, 0].long())],
                check_deterministic=False,
                seed=self._steps,
                fisher_type=FisherType.MC,
                separate_weight_and_bias=False,
                num_per_example_loss_terms=1,
                num_data=len(inputs),
            )
            curvature.compute_kronecker_factors()
        # BCEWithLogitsLoss is a mean over outputs, ours a sum: scale·C + λI = scale·(C + λ/scale·I)
        self._scale = float(outputs) if binary else 1.0
        self._inverse = KFACInverseLinearOperator(
            curvature, damping=self.damping / self._scale, use_exact_damping=True
        )

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
        if self._steps % self.interval == 0:
            self.rebuild()
        (group,) = self.param_groups
        params: list[nn.Parameter] = group["params"]
        grads = [p.grad for p in params if p.grad is not None]
        directions = self.precondition(grads)
        product = sum((d * g).sum().item() for d, g in zip(directions, grads, strict=True))
        length = group["lr"] ** 2 * product  # η² dᵀg ≥ 0
        shrink = min(1.0, math.sqrt(NORM_CONSTRAINT / length)) if length > 0 else 1.0
        for p, direction in zip(params, directions, strict=True):
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffer.mul_(group["momentum"]).add_(direction, alpha=shrink)
            p.add_(buffer, alpha=-group["lr"])
        self._steps += 1
        return loss


@final
@dataclass(frozen=True)
class KFACSampled(Recipe):
    """`SampledKFAC`, rebuilt every `interval` steps."""

    lr: float
    damping: float
    momentum: float = 0.9
    interval: int = 10

    def build(self, model: nn.Module, problem: Problem) -> torch.optim.Optimizer:
        """Sampled factors from the problem's curvature stream."""
        return SampledKFAC(
            model,
            partial(problem.batch, "curvature"),
            problem.loss_name,
            self.lr,
            self.damping,
            self.momentum,
            self.interval,
        )

    def text(self) -> str:
        """η and the damping."""
        return f"η = {self.lr:.4g}, damping = {self.damping:.4g}"
