"""P: the linear map from a gradient to a step that APO learns."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn

from apo_core.types import phi_dtype


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


Structure: TypeAlias = Callable[[Tensor, float], Preconditioner]
"""(parameter, initial_scale) -> P: a class of preconditioners, or a `functools.partial` of one that
fixes its options, such as `functools.partial(BlockEKFAC, block=64)`."""


def structure_class(structure: object) -> type[Preconditioner]:
    """The class that `structure` builds, its options aside.

    Raises:
        TypeError: it is neither a class of preconditioners nor a `functools.partial` of one.
    """
    kind = structure.func if isinstance(structure, functools.partial) else structure
    if not (isinstance(kind, type) and issubclass(kind, Preconditioner)):
        raise TypeError(
            "`structure` must be a class of preconditioners (EKFAC, Diagonal or Dense), "
            f"got {structure!r}; give options by functools.partial(BlockEKFAC, block=64)."
        )
    return kind


def phi_like(parameter: Tensor) -> dict[str, Any]:
    """The dtype and device of φ for `parameter`, as keywords."""
    return {"dtype": phi_dtype(parameter.dtype), "device": parameter.device}


def require_count(name: str, value: object, meaning: str) -> int:
    """`value` if it is an integer of at least 1, else a ValueError that names it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"`{name}` must be an integer of at least 1, got {value!r}; it is {meaning}."
        )
    return value


def require_scale(initial_scale: float) -> float:
    """`initial_scale` if it is positive and finite, else a ValueError."""
    if not (math.isfinite(initial_scale) and initial_scale > 0):
        raise ValueError(
            f"`initial_scale` must be positive and finite (P = initial_scale² I at the start), "
            f"got {initial_scale}; the square root of a learning rate that works is a safe choice."
        )
    return float(initial_scale)
