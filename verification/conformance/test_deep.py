"""The whole kit on random networks, mini-batches, dtypes and sizes of gradients.

    nox -s conformance -- --rule=package.module:Class

puts a third party's rule here; without `--rule` a handful of the engine's rules run.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import apo_core as apo
from apo_core.testing import CHECKS, Build, Result, Trial, check_update_rule
from apo_core.testing.trial import clones
from verification.conformance.conftest import load
from verification.conformance.models import NETWORKS, Network, Perceptron, network, task
from verification.profiles import share


class Case(NamedTuple):
    """One setting for a check."""

    kind: str
    width: int
    bias: bool
    examples: int
    dtype: torch.dtype
    decade: int
    fsd_weight: float
    seed: int

    @property
    def network(self) -> Network:
        """The kind, a perceptron at the drawn width."""
        if self.kind != "perceptron":
            return NETWORKS[self.kind]
        return NETWORKS[self.kind]._replace(make=lambda: Perceptron(3, self.width, self.bias))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype = draw(st.sampled_from([torch.float64, torch.float32]), label="dtype")
    # A rule may form its step as a difference of parameters, which float32 resolves to 1e-7.
    decades = 8 if dtype == torch.float64 else 3
    return Case(
        kind=draw(st.sampled_from(sorted(NETWORKS)), label="network"),
        width=draw(st.integers(1, 5), label="width"),
        bias=draw(st.booleans(), label="bias"),
        examples=draw(st.integers(2, 6), label="examples"),  # BatchNorm needs two
        dtype=dtype,
        decade=draw(st.integers(-decades, decades), label="decade of the gradients"),
        fsd_weight=draw(st.sampled_from([0.0, 0.3]), label="λ_FSD"),
        seed=draw(st.integers(0, 2**16), label="seed"),
    )


SMALLEST = Case("perceptron", 1, False, 2, torch.float64, 0, 0.3, 0)


@functools.cache
def reason_against(build: Build, check: str) -> str | None:
    """Why the check says nothing about the rule, or None."""
    result = run(build, check, SMALLEST)
    return result.reason if result.outcome == "skipped" else None


def run(build: Build, check: str, case: Case) -> Result:
    model = network(case.network, case.seed, case.dtype)
    objective = apo.ProximalObjective("kl", case.fsd_weight, 0.1)
    settings = {"seed": case.seed, "examples": case.examples, "dtype": case.dtype}
    return check_update_rule(
        build,
        model,
        task(case.network, objective, **settings),
        seed=case.seed,
        checks=[check],
        gradient_scale=10.0**case.decade,
    )[check]


@pytest.mark.parametrize("check", CHECKS)
@share(0.05)
@given(case=cases())
def test_a_rule_conforms_everywhere(build: Build, check: str, case: Case) -> None:
    reason = reason_against(build, check)
    if reason is not None:
        pytest.skip(reason)
    run(build, check, case)


def test_two_processes_take_the_same_steps(
    build: Build, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """With DistributedDataParallel over gloo θ and φ are bit-equal on both ranks."""
    name = request.config.getoption("--rule")
    if name is None:
        pytest.skip("test_distributed has the engine's rules in several processes")
    torch.multiprocessing.spawn(train, (name, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(map(torch.equal, first, second)), (
        "θ and φ must be the same on every rank: a step may depend on θ, g, φ and the state alone"
    )


def train(rank: int, name: str, folder: str) -> None:
    """One rank: five steps on mini-batches of its own, then θ and φ into the folder."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=2
    )
    kind = NETWORKS["perceptron"]
    model: nn.Module = DistributedDataParallel(network(kind))
    rule = load(name)(model)
    work = task(kind, apo.ProximalObjective("kl", 0.3, 0.1), seed=rank)
    trial = Trial(rule, model, torch.Generator(), given=work)
    trial.train(trial.optimizer(work), work, steps=5)
    torch.save(clones([*model.parameters(), *rule.parameters()]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
