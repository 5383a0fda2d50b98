"""KFAC with sampled output gradients: for many outputs, and for binary pixels.

`experiments.baselines.KFAC` takes the expectation over the model's distribution exactly, one
backward pass an output: 784 for an autoencoder of MNIST. Here one target is drawn from it for each
example, as Martens and Grosse (2015) do: one backward pass, whatever the number of outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import nn

from experiments.baselines import FisherType, KFACLinearOperator, KroneckerFactored
from experiments.problems import Batch, LossName, Problem
from experiments.recipes import Recipe


@final
class SampledKFAC(KroneckerFactored):
    """The expectation by one target for each example, drawn from the model.

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
        super().__init__(
            model,
            curvature_batch,
            loss_name,
            lr=lr,
            damping=damping,
            momentum=momentum,
            interval=interval,
        )

    def curvature(self, batch: Batch) -> tuple[KFACLinearOperator, float]:
        """The factors at drawn targets; BCEWithLogitsLoss is a mean over outputs, ours a sum."""
        inputs = batch[0]
        outputs = self.model(inputs[:1]).shape[1]
        binary = self.loss_name == "bernoulli"
        # The Fisher does not look at the targets; curvlinops takes only those of its own form.
        targets = inputs.new_zeros(len(inputs), outputs)
        curvature = KFACLinearOperator(
            self.model,
            nn.BCEWithLogitsLoss() if binary else nn.CrossEntropyLoss(),
            self._params,
            [(inputs, targets if binary else targets[:, 0].long())],
            check_deterministic=False,
            seed=self._rebuilt * self.interval,
            fisher_type=FisherType.MC,
            separate_weight_and_bias=False,
            num_per_example_loss_terms=1,
            num_data=len(inputs),
        )
        return curvature, float(outputs) if binary else 1.0


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
