"""Data parallel training: φ stays the same on every rank at one all-reduce a meta-gradient.

With DistributedDataParallel every rank holds all of θ and g. With FSDP2 (`fully_shard`) a
parameter is a DTensor of which a rank holds a shard; there

what             elementwise rules (SGD, RMSprop, Adam)   all others
θ, g, state, Δ   of the shard                             whole on every rank, gathered at each step
q = ∇_θ' Q       of the shard                             gathered at a meta-step
dQ/dφ            the sum of the shards' parts             the same on every rank

so that one all-reduce of |φ| + 3 numbers gives every rank the bit-equal meta-gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apo_core.types import Tensors


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; told by its method, since importing the class is slow."""
    return hasattr(tensor, "full_tensor")


def local(tensors: Sequence[Tensor]) -> Tensors:
    """This rank's shard of every DTensor, sharing its memory; any other tensor itself."""
    return [t.to_local() if is_sharded(t) else t for t in tensors]  # pyright: ignore[reportAttributeAccessIssue]


def whole(tensors: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> Tensors:
    """Every DTensor gathered on every rank; any other tensor itself.

    Args:
        tensors: DTensors, or with `like` this rank's shards.
        like: the DTensors whose layout the shards have.
    """
    if like is not None and any(map(is_sharded, like)):
        from torch.distributed.tensor import DTensor

        tensors = [
            DTensor.from_local(
                t, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            )
            if isinstance(p, DTensor)
            else t
            for t, p in zip(tensors, like, strict=True)
        ]
    return [t.full_tensor() if is_sharded(t) else t for t in tensors]  # pyright: ignore[reportAttributeAccessIssue]


def own_shards(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> Tensors:
    """What this rank holds of whole tensors, where `like` are the DTensors that have the layout."""
    if not any(map(is_sharded, like)):
        return list(tensors)
    from torch.distributed.tensor import DTensor, distribute_tensor

    return [
        # Every rank holds the same whole: nothing is sent.
        distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None).to_local()
        if isinstance(p, DTensor)
        else t
        for t, p in zip(tensors, like, strict=True)
    ]


def shards(model: nn.Module) -> int:
    """Into how many shards FSDP2 splits the parameters; 1 without it."""
    mesh = _mesh(model)
    if mesh is None:
        return 1
    places = enumerate(_first(model).placements)
    return math.prod(mesh.size(d) for d, place in places if place.is_shard())


def without_synchronization(model: nn.Module) -> AbstractContextManager[None]:
    """Forward passes of a DistributedDataParallel model that no backward pass of its own follows.

    The gradients at θ' are taken by `torch.autograd.grad`, which DDP's hooks do not see.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def mean_over_ranks(model: nn.Module, tensors: list[Tensor]) -> list[Tensor]:
    """The mean of each tensor over the ranks that train `model` together, bit-equal on all.

    One all-reduce of all numbers together (two with a mesh of two dimensions); the tensors
    themselves for a model of one process. A mean over ranks is the mean over the global batch if
    all ranks have batches of one size.
    """
    groups = _groups(model)
    if not groups:
        return tensors
    flat = torch.cat([t.reshape(-1) for t in tensors])
    for group in groups:
        # A sum: gloo has no mean.
        torch.distributed.all_reduce(flat, group=group)
        flat /= torch.distributed.get_world_size(group)
    pieces = flat.split([t.numel() for t in tensors])
    return [piece.view(t.shape).to(t.dtype) for piece, t in zip(pieces, tensors, strict=True)]


def sum_over_shards(model: nn.Module, value: Tensor) -> Tensor:
    """What the shards' parts of a sum over all entries add up to; the sum itself without FSDP2."""
    parts = shards(model)
    return value if parts == 1 else parts * mean_over_ranks(model, [value])[0]


def on_all_ranks(model: nn.Module, flag: Tensor) -> Tensor:
    """Whether the 0-d bool holds on every rank; only FSDP2's ranks can differ, and are asked."""
    if _mesh(model) is None:
        return flag
    number = flag.to(torch.int32)
    for group in _groups(model):
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MIN, group=group)
    return number.bool()


def _first(model: nn.Module) -> Any:
    return next(model.parameters())


def _mesh(model: nn.Module) -> Any:
    """FSDP2's mesh of ranks, or None."""
    first = _first(model)
    return first.device_mesh if is_sharded(first) else None


def _groups(model: nn.Module) -> list[Any]:
    """The process groups over which a mean is taken, one after the other."""
    if isinstance(model, DistributedDataParallel):
        return [model.process_group]
    mesh = _mesh(model)
    return [] if mesh is None else [mesh.get_group(d) for d in range(mesh.ndim)]
