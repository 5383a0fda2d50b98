"""Every range of the engine's numbers ends exactly where the documentation says."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

import apo_core as apo

WEIGHT = torch.ones(2, 2, dtype=torch.float64)


def model() -> nn.Module:
    return nn.Linear(2, 2)


def trained(interval: int = 10, update_scale: float = 1.0, warm: int | None = None) -> apo.APO:
    """An APO of these settings."""
    net = model()
    rule = apo.rules.SGD(net, 0.1)
    solver = torch.optim.SGD(rule.parameters(), 0.1)
    warmup = None
    if warm is not None:
        warmup = apo.Warmup(torch.optim.SGD(net.parameters(), 0.1), warm)
    objective = apo.ProximalObjective()
    return apo.APO(net, rule, objective, solver, interval, update_scale, warmup)


class Range(NamedTuple):
    """What takes a number, the last numbers that it takes, and the first that it refuses."""

    name: str
    make: Callable
    inside: tuple[float, ...]
    outside: tuple[float, ...]


def above(x: float) -> float:
    """The next float64."""
    return math.nextafter(x, math.inf)


def below(x: float) -> float:
    """The float64 before."""
    return math.nextafter(x, -math.inf)


LARGEST = below(math.inf)
SHARE = ((0.0, below(1.0)), (below(0.0), 1.0, math.nan))  # [0, 1)
COUNT = ((1,), (0, 1.0))
NON_NEGATIVE = ((0.0, LARGEST), (below(0.0), math.inf, math.nan))
POSITIVE = ((above(0.0), LARGEST), (0.0, math.inf, math.nan))
RANGES = [
    Range("fsd_weight", lambda x: apo.ProximalObjective("kl", fsd_weight=x), *NON_NEGATIVE),
    Range("wsd_weight", lambda x: apo.ProximalObjective("kl", wsd_weight=x), *NON_NEGATIVE),
    Range(
        "trust_factor",
        lambda x: apo.ProximalObjective(trust_factor=x),
        (above(1.0), LARGEST),
        (1.0, math.inf, math.nan),
    ),
    Range("interval", lambda x: trained(interval=x), *COUNT),
    Range("update_scale", lambda x: trained(update_scale=x), (above(0.0), below(2.0)), (0.0, 2.0)),
    Range("warmup.steps", lambda x: trained(warm=x), (0,), (-1,)),
    Range("momentum", lambda x: apo.rules.SGD(model(), 0.1, momentum=x), *SHARE),
    Range("smoothing", lambda x: apo.rules.RMSprop(model(), smoothing=x), *SHARE),
    Range("smoothing", lambda x: apo.rules.KFAC(model(), smoothing=x), *SHARE),
    Range("interval", lambda x: apo.rules.KFAC(model(), interval=x), *COUNT),
    Range("betas", lambda x: apo.rules.Adam(model(), betas=(x, 0.9)), *SHARE),
    Range("betas", lambda x: apo.rules.Adam(model(), betas=(0.9, x)), *SHARE),
    Range("weight_decay", lambda x: apo.rules.Adam(model(), weight_decay=x), *NON_NEGATIVE),
    Range("lr", lambda x: apo.rules.SGD(model(), x), *POSITIVE),
    Range("eps", lambda x: apo.rules.Adam(model(), eps=x), *POSITIVE),
    Range("initial_scale", lambda x: apo.Diagonal(WEIGHT, x), *POSITIVE),
    Range("rank", lambda x: apo.LowRank(WEIGHT, rank=x), *COUNT),
    Range("block", lambda x: apo.BlockDiagonal(WEIGHT, block=x), *COUNT),
    Range("parts", lambda x: apo.Stacked(WEIGHT, parts=x), *COUNT),
]


@pytest.mark.parametrize("case", RANGES, ids=lambda case: case.name)
def test_a_range_takes_its_last_numbers_and_refuses_the_next(case: Range) -> None:
    for value in case.inside:
        case.make(value)
    for value in case.outside:
        with pytest.raises(ValueError, match=f"`{case.name}` must "):
            case.make(value)
