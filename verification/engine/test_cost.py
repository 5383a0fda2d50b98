"""P22 section 4.5: what a meta-step costs, counted in floating point operations and bytes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, final

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import apo_core as apo

WIDTHS = (7, 5, 4, 3)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for wide, next_wide in pairwise(widths):
        layers += [nn.Linear(wide, next_wide), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def operations(work: Callable[[], object]) -> int:
    """The multiplications and additions of the matrix products in `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("other", [1, 3])
@pytest.mark.parametrize("form", ["exact", "linear"])
def test_a_meta_step_takes_three_forward_and_two_backward_passes(
    batch: int, other: int, form: Literal["exact", "linear"]
) -> None:
    """Outputs at θ, loss at θ' and outputs at θ'; the last two each with a backward pass.

    The linear loss needs no pass of its own: two forward passes and one backward pass are left.
    A forward pass costs F = 2 N Σ in·out, a backward pass 2 F less the first layer's share, whose
    input needs no gradient. P22 counts one backward pass "through the unrolled graph": that graph
    holds two forward passes at θ', and going back through it costs as much as two backward passes.
    """
    model = mlp(*WIDTHS)
    rule = apo.rules.SGD(model, lr=0.1)
    optimizer = apo.APO(
        model,
        rule,
        apo.ProximalObjective("squared_error", 1.0, loss=form),
        torch.optim.RMSprop(rule.parameters()),
    )
    x, y, x_other = torch.randn(batch, 7), torch.randn(batch, 3), torch.randn(other, 7)

    def loss() -> Tensor:
        return (model(x) - y).square().mean()

    products = [a * b for a, b in pairwise(WIDTHS)]
    forward, first = 2 * sum(products), 2 * products[0]  # of one example
    loss().backward()
    assert operations(lambda: model(x)) == batch * forward
    assert operations(lambda: loss().backward()) == batch * (3 * forward - first)
    measured = operations(lambda: optimizer.meta_step(loss=loss, outputs=lambda: model(x_other)))
    of_loss = batch * (3 * forward - first) if form == "exact" else 0
    assert measured == of_loss + other * (4 * forward - first)
    assert operations(optimizer.step) == 0


@final
class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in inputs:
                storage = leaf.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, 0)
                    self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize(("structure", "copies"), [("rate", 4.0), ("diagonal", 4.0)])
def test_a_meta_step_holds_four_more_copies_of_the_model(structure: str, copies: float) -> None:
    """θ kept aside while θ' stands in its place, Δ, q, and one fresh gradient beside q.

    P22 counts "twice the model memory", which is θ and θ' alone. Wide layers and a batch of two
    make activations (counted as well) less than 2% of a copy of the model.
    """
    model = mlp(300, 300, 300, 300)
    rule: apo.UpdateRule = (
        apo.rules.SGD(model, lr=0.1)
        if structure == "rate"
        else apo.rules.Preconditioned(model, apo.Diagonal, 0.1)
    )
    optimizer = apo.APO(
        model,
        rule,
        apo.ProximalObjective("squared_error", 1.0),
        torch.optim.RMSprop(rule.parameters()),
    )
    x, y = torch.randn(2, 300), torch.randn(2, 300)

    def loss() -> Tensor:
        return (model(x) - y).square().mean()

    loss().backward()
    optimizer.meta_step(loss=loss, outputs=lambda: model(x))  # the meta-optimizer's state exists
    with PeakBytes() as memory:
        optimizer.meta_step(loss=loss, outputs=lambda: model(x))
    model_bytes = sum(p.nbytes for p in model.parameters())
    assert memory.peak / model_bytes == pytest.approx(copies, abs=0.02)
