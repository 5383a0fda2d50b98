"""Data parallel training with DistributedDataParallel over gloo, against one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import apo_core as apo
from apo_core.distributed import mean_over_ranks
from verification.tolerances import ROUNDING, assert_close

STEPS = 100
BATCH = 8  # examples of B, and of B', in all ranks together

RULES: dict[str, Callable[[nn.Module], apo.UpdateRule]] = {
    "sgd": lambda model: apo.rules.SGD(model, lr=0.05),
    "adam": lambda model: apo.rules.Adam(model, lr=0.01, eps=1e-3, learn=("lr", "eps")),
    "ekfac": lambda model: apo.rules.Preconditioned(model, apo.EKFAC, 0.2),
}


def batches() -> tuple[Tensor, Tensor, Tensor]:
    """x of B, labels of B, x of B' for every step."""
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, STEPS, BATCH, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (STEPS, BATCH), generator=generator), other


def train(rule: str, model: nn.Module, part: slice) -> tuple[list[Tensor], list[Tensor]]:
    """θ and φ after training on `part` of every batch, a meta-step at every step."""
    built = RULES[rule](model)
    optimizer = apo.APO(
        model,
        built,
        apo.ProximalObjective("kl", fsd_weight=0.3, wsd_weight=0.1),
        torch.optim.SGD(built.parameters(), lr=0.01),
        interval=1,
    )
    for x, y, other in zip(*batches(), strict=True):
        optimizer.zero_grad()
        cross_entropy(model(x[part]), y[part]).backward()
        optimizer.meta_step(
            loss=lambda x=x, y=y: cross_entropy(model(x[part]), y[part]),
            outputs=lambda other=other: model(other[part]),
        )
        optimizer.step()
    assert optimizer.meta_steps == STEPS
    return [p.detach() for p in model.parameters()], [p.detach() for p in built.parameters()]


def network() -> nn.Sequential:
    """A small classifier in float64, the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def work(rank: int, ranks: int, rule: str, folder: str) -> None:
    """One rank: train on its share, and leave θ and φ in the folder."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=ranks
    )
    share = BATCH // ranks
    part = slice(rank * share, (rank + 1) * share)
    result = train(rule, DistributedDataParallel(network()), part)
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("rule", "ranks"), [("sgd", 4), ("adam", 2), ("ekfac", 2)])
def test_ranks_agree_bit_for_bit_and_equal_one_process(
    rule: str, ranks: int, tmp_path: Path
) -> None:
    torch.multiprocessing.spawn(work, (ranks, rule, str(tmp_path)), nprocs=ranks)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    for theta, phi in results[1:]:
        assert all(map(torch.equal, phi, results[0][1]))
        assert all(map(torch.equal, theta, results[0][0]))
    alone = train(rule, network(), slice(None))
    for ours, theirs, what in zip(results[0], alone, ("θ", "φ"), strict=True):
        together = torch.cat([t.flatten() for t in ours]).numpy()
        single = torch.cat([t.flatten() for t in theirs]).numpy()
        # Sums over ranks are rounded in another order; each of the steps carries it on, with a
        # factor near 1 (the loss curves by less than 1, and rates stay below 1).
        assert_close(together, single, ROUNDING, iterations=STEPS, size=BATCH * 5, what=what)


def test_a_plain_model_takes_no_part_in_it() -> None:
    """Without DistributedDataParallel nothing is reduced, also where a process group exists."""
    tensors = [torch.ones(2), torch.zeros(())]
    assert mean_over_ranks(network(), tensors) is tensors
