"""What a piece of work costs: wall time, products, and the peak of its memory."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Work = Callable[[], object]

LEAST_ROUNDS = 3


def products(work: Work) -> int:
    """The multiplications and additions of the matrix products and convolutions in `work`."""
    in_place = {torch.ops.aten.addmm_: _addmm_}  # which torch does not count, unlike addmm
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        work()
    return counter.get_total_flops()


def _addmm_(total: torch.Size, left: torch.Size, right: torch.Size, **_: object) -> int:
    """Of (rows, inner) times (inner, columns)."""
    return 2 * left[0] * left[1] * right[1]


def interleaved(
    pieces: Mapping[str, Work], rounds: int, seconds: float, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every piece in every round; a round runs all of them once, in their order.

    What disturbs the machine for longer than a round disturbs all pieces alike, so that the ratios
    of one round hold. One round before the first is not timed.

    Args:
        pieces: by name.
        rounds: how many, at most.
        seconds: after so many no further round begins, once there are three.
        device: a torch device string, waited for before and after every piece.
    """
    times: dict[str, list[float]] = {name: [] for name in pieces}
    for work in pieces.values():
        work()
    end = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name, work in pieces.items():
            _wait(device)
            start = time.perf_counter()
            work()
            _wait(device)
            times[name].append(time.perf_counter() - start)
    return times


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@final
class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside the block hold at once, as `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            key = storage._cdata
            if key not in given and key not in self._held:
                self._held[key] = storage.nbytes()
                weakref.finalize(storage, self._held.pop, key, 0)
                self.peak = max(self.peak, sum(self._held.values()))
        return result


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
