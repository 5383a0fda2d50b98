"""What the network returns on B', in any form, and D_F of it, summed over the outputs.

symbol   here        meaning
z₀, z    `current`,  the outputs at θ and at θ', each (batch, ..., outputs)
         `ahead`
ρ        `rho`       one divergence for every output, or one for each name
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from apo_core.discrepancies import Discrepancy, resolve_discrepancy
from apo_core.types import Masked

Name: TypeAlias = str | int | None
"""Of one output: its key in a mapping, its place in a sequence, None where there is but one."""

Entries: TypeAlias = dict[Name, tuple[Tensor, Tensor | None]]
"""Every output with its mask or None."""

Divergence: TypeAlias = Callable[[Tensor, Tensor], Tensor]

Divergences: TypeAlias = Divergence | dict[str | int, Divergence]
"""One for every output, or one for each name: the outputs without one do not count."""


def resolve_divergences(
    discrepancy: str | Divergence | Mapping[str | int, str | Divergence],
) -> Divergences:
    """What the user named, as callables (outputs at θ', outputs at θ) -> ().

    Raises:
        ValueError: an unknown name, an empty mapping.
        TypeError: neither a name nor callable.
    """
    if not isinstance(discrepancy, Mapping):
        return resolve_discrepancy(discrepancy)
    if not discrepancy:
        raise ValueError(
            "`discrepancy` must name at least one output, got an empty mapping; set fsd_weight=0 "
            "to leave the FSD out."
        )
    return {name: resolve_discrepancy(rho) for name, rho in discrepancy.items()}


def entries_of(outputs: object, rho: Divergences) -> Entries:
    """The outputs that have a divergence, checked by their shapes alone.

    Raises:
        ValueError: nothing, or no entry of a name; a mask of another shape.
        TypeError: an output is no tensor (batch, ..., outputs).
    """
    items = _items(outputs)
    if not isinstance(rho, dict):
        return {name: _entry(name, item) for name, item in items.items()}
    missing = [name for name in rho if name not in items]
    if missing:
        raise ValueError(
            f"`outputs` must have an entry {missing[0]!r}, for which `discrepancy` has a "
            f"divergence, got {type(outputs).__name__} with {list(items)}; name the entries as "
            "the model does."
        )
    return {name: _entry(name, items[name]) for name in rho}


def divergence_values(rho: Divergences, ahead: Entries, current: Entries) -> list[Tensor]:
    """D_F(z, z₀) of each output, (); masks as they were at θ.

    Raises:
        ValueError: names or shapes differ, or a divergence is no scalar.
        TypeError: a divergence that is no `Discrepancy` meets a mask.
    """
    if list(ahead) != list(current):
        raise ValueError(
            f"`outputs` must return the same entries twice, got {list(current)} at θ and "
            f"{list(ahead)} at θ'."
        )
    values = []
    for name, (z0, mask) in current.items():
        z = ahead[name][0]
        if z.shape != z0.shape:
            raise ValueError(
                f"{label(name)} must return one shape, got {tuple(z0.shape)} at θ and "
                f"{tuple(z.shape)} at θ'; draw the mini-batch B' outside the closure."
            )
        value = _compare(rho, name, widened(z), widened(z0), mask)
        values.append(require_scalar(value, "discrepancy"))
    return values


def widened(tensor: Tensor) -> Tensor:
    """In float32 what has 16 bits: small differences of them have no digits there."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def label(name: Name) -> str:
    """How messages call the output."""
    return "`outputs`" if name is None else f"`outputs[{name!r}]`"


def require_sound_masks(entries: Entries) -> None:
    """Masks that leave something; one synchronization if there is a mask, else none.

    Raises:
        ValueError: a weight is negative or not finite, or none is positive.
    """
    masks = [mask for _, mask in entries.values() if mask is not None]
    sound = [(mask >= 0).all() & (mask > 0).any() & mask.isfinite().all() for mask in masks]
    if masks and not bool(torch.stack(sound).all()):
        raise ValueError(
            "the mask of `outputs` must be bool or finite non-negative weights, some of them "
            "positive, got another; leave out a mini-batch of padding alone."
        )


def require_scalar(value: object, name: str) -> Tensor:
    """What a closure returned, ().

    Raises:
        ValueError: it is no tensor of one number.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"`{name}` must return a scalar tensor, got {got}; reduce over the batch with mean()."
        )
    return value.reshape(())


def _items(outputs: object) -> dict[Name, object]:
    """What the closure returned, by name."""
    items: dict[Name, object]
    if isinstance(outputs, Mapping):
        items = dict(outputs)
    elif isinstance(outputs, Sequence) and not isinstance(outputs, Masked | str):
        items = dict(enumerate(outputs))
    else:
        return {None: outputs}
    if not items:
        raise ValueError(
            f"`outputs` must return at least one tensor, got an empty {type(outputs).__name__}."
        )
    return items


def _entry(name: Name, value: object) -> tuple[Tensor, Tensor | None]:
    """One output with its mask, checked."""
    z, mask = value if isinstance(value, Masked) else (value, None)
    if not isinstance(z, Tensor) or z.dim() == 0:
        got = "a 0-d tensor" if isinstance(z, Tensor) else type(z).__name__
        raise TypeError(
            f"{label(name)} must return a tensor (batch, ..., outputs), got {got}; return the "
            "logits or predictions of every example, and of several outputs a tuple, a list or a "
            "mapping; a mapping as `discrepancy` chooses among them."
        )
    if isinstance(value, Masked):
        got = tuple(value.mask.shape) if isinstance(value.mask, Tensor) else None
        if not got or got != tuple(z.shape[: len(got)]):
            raise ValueError(
                f"the mask of {label(name)} must be a tensor with the first dimensions of the "
                f"outputs' shape {tuple(z.shape)}, got {got or type(value.mask).__name__}; give "
                "one weight an example or a token."
            )
    return z, mask


def _compare(rho: Divergences, name: Name, z: Tensor, z0: Tensor, mask: Tensor | None) -> Tensor:
    """D_F(z, z₀) of one output."""
    if isinstance(rho, dict):
        assert name is not None
        rho = rho[name]
    if mask is None:
        return rho(z, z0)
    if not isinstance(rho, Discrepancy):
        raise TypeError(
            "`discrepancy` must be a Discrepancy where `outputs` are Masked, got "
            f"{type(rho).__name__}; subclass apo_core.Discrepancy and write per_example()."
        )
    return rho.masked(z, z0, mask)
