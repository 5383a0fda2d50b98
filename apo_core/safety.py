"""What is not finite reaches neither θ nor φ: it is skipped, counted and reported."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from apo_core.types import State, Tensors


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """‖·‖ of each tensor, (tensors,), in at least float32: no synchronization.

    Where one is not finite, an entry is not, or is so large that its square would not be.
    """
    narrow = all(t.dtype != torch.float64 for t in tensors)
    # 16-bit norms would overflow long before the squares do in float32.
    return torch.stack(torch._foreach_norm(list(tensors), 2, torch.float32 if narrow else None))


def first_not_finite(names: Sequence[str], tensors: Tensors) -> str | None:
    """The name of the first tensor whose norm is not finite, or None."""
    finite = norms_of(tensors).isfinite().tolist()
    return None if all(finite) else names[finite.index(False)]


def masked(finite: Tensor, tensors: Tensors) -> Tensors:
    """The tensors where `finite`, else zeros; decided on the device."""
    if finite.device.type == "cpu" and bool(finite):
        return tensors
    return [torch.where(finite, t, 0.0) for t in tensors]


def choose_state(finite: Tensor, new: State, old: State) -> State:
    """`new` where `finite`, else `old`; on the device, but where the state has just begun to be."""
    if finite.device.type == "cpu":
        return new if bool(finite) else old
    shapes = [{name: [t.shape for t in ts] for name, ts in state.items()} for state in (new, old)]
    if shapes[0] != shapes[1]:
        return new if bool(finite) else old
    return {
        name: [torch.where(finite, a, b) for a, b in zip(tensors, old[name], strict=True)]
        for name, tensors in new.items()
    }


def warn_of_step(what: str) -> None:
    """A step was left out."""
    warnings.warn(
        f"a step was skipped since {what} was not finite; θ and the rule's state stayed as they "
        "were. Check the mini-batch and the loss. Later ones are only counted, in "
        "`skipped_steps`.",
        RuntimeWarning,
        stacklevel=4,
    )


def warn_of_meta_step(what: str) -> None:
    """A meta-step was left out."""
    warnings.warn(
        f"a meta-step was skipped since {what} was not finite, so φ stayed as it was; where the "
        "lookahead diverged, lower the initial learning rate or `initial_scale`, or raise "
        "`wsd_weight`. Later ones are only counted, in `skipped_meta_steps`.",
        RuntimeWarning,
        stacklevel=4,
    )
