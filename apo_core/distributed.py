"""Data parallel training: φ stays the same on every rank at one all-reduce a meta-gradient."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def without_synchronization(model: nn.Module) -> AbstractContextManager[None]:
    """Forward passes of a DistributedDataParallel model that no backward pass of its own follows.

    The gradients at θ' are taken by `torch.autograd.grad`, which DDP's hooks do not see.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def mean_over_ranks(model: nn.Module, tensors: list[Tensor]) -> list[Tensor]:
    """The mean of each tensor over the ranks of a DistributedDataParallel model, bit-equal on all.

    One all-reduce of all numbers together; the tensors themselves for any other model. A mean over
    ranks is the mean over the global batch if all ranks have batches of one size.
    """
    if not isinstance(model, DistributedDataParallel):
        return tensors
    flat = torch.cat([t.reshape(-1) for t in tensors])
    # A sum: gloo has no mean.
    torch.distributed.all_reduce(flat, group=model.process_group)
    flat /= torch.distributed.get_world_size(model.process_group)
    pieces = flat.split([t.numel() for t in tensors])
    return [piece.view(t.shape).to(t.dtype) for piece, t in zip(pieces, tensors, strict=True)]
