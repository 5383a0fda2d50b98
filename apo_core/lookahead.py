"""Looking ahead without leaving a trace: parameters, buffers and random state come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from apo_core.distributed import is_sharded, local
from apo_core.types import Tensors


@contextmanager
def lookahead(params: Tensors, updates: Tensors) -> Iterator[None]:
    """θ' = θ + updates, in place; θ is back bit for bit afterwards, also after an exception.

    Args:
        params: the model's parameters θ, overwritten inside the context.
        updates: one tensor of the same shape for each (of a DTensor: of its shard), without a
            graph.
    """
    with torch.no_grad():
        theta = local(params)
        current = [p.detach().clone() for p in theta]
        torch._foreach_add_(theta, updates)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(theta, current)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Run passes of `model` whose buffers (BatchNorm statistics) and random draws do not count.

    Yields a function that rewinds torch's random state to where it stood on entry, so that two
    passes see the same dropout mask. Buffers and random state are put back on exit.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    buffers = list(model.buffers())
    saved = [b.detach().clone() for b in buffers]
    on_cpu = torch.get_rng_state()
    on_cuda = [torch.cuda.get_rng_state(device) for device in devices]

    def rewind() -> None:
        torch.set_rng_state(on_cpu)
        for device, state in zip(devices, on_cuda, strict=True):
            torch.cuda.set_rng_state(state, device)

    try:
        yield rewind
    finally:
        rewind()
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)


def gradient(
    value: Tensor | Sequence[Tensor],
    params: Tensors,
    grad_outputs: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """∂value/∂params, zeros where `value` does not depend on one; `.grad` is left as it was.

    Under FSDP2 this rank's shards of the mean over the ranks.
    """
    if any(map(is_sharded, params)):
        assert isinstance(value, Tensor)
        return _sharded_gradient(value, params)
    return list(
        torch.autograd.grad(value, params, grad_outputs, allow_unused=True, materialize_grads=True)
    )


def _sharded_gradient(value: Tensor, params: Tensors) -> list[Tensor]:
    """By a backward pass into `.grad`: FSDP2's hooks see no other, and reduce what they see."""
    kept = [p.grad for p in params]
    try:
        for p in params:
            p.grad = None
        value.backward()
        return local([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
    finally:
        for p, grad in zip(params, kept, strict=True):
            p.grad = grad
