"""Data parallel training with DistributedDataParallel and FSDP2 over gloo, against one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import apo_core as apo
from apo_core.distributed import local, mean_over_ranks, whole
from verification.tolerances import ROUNDING, assert_close

STEPS = 100
BATCH = 8  # examples of B, and of B', in all ranks together

RULES: dict[str, Callable[[nn.Module], apo.UpdateRule]] = {
    "sgd": lambda model: apo.rules.SGD(model, lr=0.05),
    "adam": lambda model: apo.rules.Adam(model, lr=0.01, eps=1e-3, learn=("lr", "eps")),
    "too large": lambda model: apo.rules.SGD(model, lr=30.0),  # the trust region makes it small
    "ekfac": lambda model: apo.rules.Preconditioned(model, apo.EKFAC, 0.2),
    "any optimizer": lambda model: apo.rules.LearningRate(
        model, torch.optim.NAdam(model.parameters(), lr=0.01)
    ),
}


def batches() -> tuple[Tensor, Tensor, Tensor]:
    """x of B, labels of B, x of B' for every step."""
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, STEPS, BATCH, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (STEPS, BATCH), generator=generator), other


def network() -> nn.Sequential:
    """A small classifier in float64, the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def sharded(model: nn.Sequential) -> nn.Module:
    """Each layer's parameters in shards over the ranks, by FSDP2: 3 + 2 rows, or 2 + 2 + 1 + 0."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


WRAPPERS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "alone": lambda model: model,
    "ddp": DistributedDataParallel,
    "fsdp2": sharded,
}


def build(rule: str, wrapper: str, loss: str) -> apo.APO:
    """The rule on the plain network, and an APO on the wrapped one."""
    model = network()
    built = RULES[rule](model)
    objective = apo.ProximalObjective("kl", fsd_weight=0.3, wsd_weight=0.1, loss=loss)  # pyright: ignore[reportArgumentType]
    objective.trust_factor = 1.1 if rule == "too large" else None
    return apo.APO(
        WRAPPERS[wrapper](model),
        built,
        objective,
        torch.optim.SGD(built.parameters(), lr=0.01),
        interval=2 if rule == "too large" else 1,
    )


def train(
    optimizer: apo.APO, part: slice, steps: int = STEPS
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """θ, φ and the last addends of Q after so many steps on `part` of every batch."""
    model = optimizer.model
    terms: apo.ProximalTerms | None = None
    for x, y, other in islice(zip(*batches(), strict=True), steps):
        optimizer.zero_grad()
        cross_entropy(model(x[part]), y[part]).backward()
        if optimizer.meta_due:
            terms = optimizer.meta_step(
                loss=lambda x=x, y=y: cross_entropy(model(x[part]), y[part]),
                outputs=lambda other=other: model(other[part]),
            )
        optimizer.step()
    assert optimizer.meta_steps == steps // optimizer.interval
    assert optimizer.skipped_steps == 0
    assert terms is not None
    theta = whole([p.detach() for p in model.parameters()])
    return theta, [p.detach() for p in optimizer.rule.parameters()], list(terms)


@contextmanager
def rank_of(ranks: int, rank: int, folder: str) -> Iterator[slice]:
    """A process group over gloo; this rank's share of every batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=ranks
    )
    share = BATCH // ranks
    yield slice(rank * share, (rank + 1) * share)
    torch.distributed.destroy_process_group()


# (rule, wrapper, loss), by the number of ranks; processes are dear, so each trains several, and
# FSDP2's many collectives are dear over gloo.
CASES = {
    2: [
        ("adam", "ddp", "exact"),
        ("ekfac", "ddp", "linear"),
        ("sgd", "fsdp2", "linear"),
        ("ekfac", "fsdp2", "exact"),
        ("any optimizer", "fsdp2", "exact"),
        ("too large", "fsdp2", "exact"),
    ],
    4: [("sgd", "ddp", "exact"), ("adam", "fsdp2", "exact")],
}
CASE_STEPS = {"ddp": STEPS, "fsdp2": 20}


def work(rank: int, ranks: int, folder: str) -> None:
    """One rank: train on its share in every case, and leave θ, φ and Q in the folder."""
    with rank_of(ranks, rank, folder) as part:
        results = [train(build(*case), part, CASE_STEPS[case[1]]) for case in CASES[ranks]]
        torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("ranks", CASES)
def test_ranks_agree_bit_for_bit_and_equal_one_process(ranks: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (ranks, str(tmp_path)), nprocs=ranks)
    on_rank = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    for (rule, wrapper, loss), *results in zip(CASES[ranks], *on_rank, strict=True):
        for other in results[1:]:
            for mine, theirs in zip(results[0], other, strict=True):
                assert all(map(torch.equal, mine, theirs)), (rule, wrapper)
        alone = train(build(rule, "alone", loss), slice(None), CASE_STEPS[wrapper])
        for ours, theirs, what in zip(results[0], alone, ("θ", "φ", "Q"), strict=True):
            together = torch.cat([t.flatten() for t in ours]).numpy()
            single = torch.cat([t.flatten() for t in theirs]).numpy()
            # Sums over ranks are rounded in another order; each of the steps carries it on, with
            # a factor near 1 (the loss curves by less than 1, and rates stay below 1).
            label = f"{what} of {rule} by {wrapper}"
            assert_close(together, single, ROUNDING, iterations=STEPS, size=BATCH * 5, what=label)


def spoil(rank: int, part: slice) -> None:
    """One gradient in the first rank's shard alone becomes NaN: every rank skips."""
    optimizer = build("adam", "fsdp2", "exact")
    model, (x, y, _) = optimizer.model, next(zip(*batches(), strict=True))
    cross_entropy(model(x[part]), y[part]).backward()
    first = next(model.parameters())
    before = [t.clone() for t in whole([p.detach() for p in model.parameters()])]
    assert first.grad is not None
    if rank == 0:
        local([first.grad])[0].fill_(torch.nan)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        optimizer.meta_step(
            loss=lambda: cross_entropy(model(x[part]), y[part]), outputs=lambda: model(x[part])
        )
        optimizer.step()
    assert (optimizer.skipped_steps, optimizer.skipped_meta_steps) == (1, 1)
    assert all(map(torch.equal, before, whole([p.detach() for p in model.parameters()])))


def resume(rank: int, part: slice, folder: str) -> None:
    """A rank that loads what it saved, its shards of the state among it, goes on bit for bit."""
    first = build("adam", "fsdp2", "exact")
    train(first, part, 3)
    path = f"{folder}/{rank}.pt"
    torch.save(first.state_dict(), path)
    second = build("adam", "fsdp2", "exact")
    theta, copy = (local([p.detach() for p in a.model.parameters()]) for a in (first, second))
    torch._foreach_copy_(copy, theta)
    second.load_state_dict(torch.load(path, weights_only=True))
    ends = []
    for optimizer in (first, second):
        optimizer.meta_steps = 0
        ends.append(train(optimizer, part, 3))
    for one, other in zip(*ends, strict=True):
        assert all(map(torch.equal, one, other))


class Entrywise(apo.UpdateRule):
    """Δ = −φ ⊙ g with φ made like the parameters, and so a DTensor after `fully_shard`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.phi = nn.ParameterList([torch.ones_like(p) for p in model.parameters()])

    def init_state(self, params: list[Tensor]) -> dict[str, list[Tensor]]:
        return {}

    def forward(
        self, params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]]
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        return [-phi * g for phi, g in zip(self.phi, grads, strict=True)], state


def refuse() -> None:
    """What FSDP2 does not allow is told when the optimizer is built."""
    model = sharded(network())
    rule = apo.rules.SGD(model)
    meta_optimizer = torch.optim.SGD(rule.parameters(), lr=0.1)
    for arguments in ({"loss": "quadratic"}, {"fsd": "quadratic", "fsd_weight": 1.0}):
        objective = apo.ProximalObjective(**arguments)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="`objective` must be exact, or have the linear"):
            apo.APO(model, rule, objective, meta_optimizer)
    late = Entrywise(model)
    meta_optimizer = torch.optim.SGD(late.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`rule` must be built before `fully_shard`, got a Entry"):
        apo.APO(model, late, apo.ProximalObjective(), meta_optimizer)


def under_fsdp2(rank: int, ranks: int, folder: str) -> None:
    """One after the other, in one group of processes."""
    with rank_of(ranks, rank, folder) as part:
        spoil(rank, part)
        resume(rank, part, folder)
        refuse()


def test_fsdp2_skips_together_resumes_and_refuses(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(under_fsdp2, (2, str(tmp_path)), nprocs=2)


def test_a_plain_model_takes_no_part_in_it() -> None:
    """Without DistributedDataParallel nothing is reduced, also where a process group exists."""
    tensors = [torch.ones(2), torch.zeros(())]
    assert mean_over_ranks(network(), tensors) is tensors
