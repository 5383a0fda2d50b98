"""P: the linear map from a gradient to a step that APO learns."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn


class Preconditioner(nn.Module, ABC):
    """g -> Pg for the gradient of one parameter (or, if `joint`, of all of them as one vector).

    Its `nn.Parameter`s are φ. Calling it applies it (`nn.Module.apply` is taken, by torch).

    Attributes:
        joint: whether one instance acts on all parameters, concatenated row-major.
    """

    joint: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def accepts(owner: nn.Module, parameter: Tensor) -> bool:
        """Whether the structure is meant for `parameter` of the layer `owner`."""

    @abstractmethod
    def forward(self, grad: Tensor) -> Tensor:
        """Pg, of the shape of `grad`."""

    @abstractmethod
    def dense(self) -> Tensor:
        """P as a matrix (n, n) on `grad.reshape(-1)`, row-major; for tests and oracles."""


def require_scale(initial_scale: float) -> float:
    """`initial_scale` if it is positive and finite, else a ValueError."""
    if not (math.isfinite(initial_scale) and initial_scale > 0):
        raise ValueError(
            f"`initial_scale` must be positive and finite (P = initial_scale² I at the start), "
            f"got {initial_scale}; the square root of a learning rate that works is a safe choice."
        )
    return float(initial_scale)
