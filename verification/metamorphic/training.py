"""A short run of Algorithm 1 whose every ingredient can be transformed, and what it leaves.

Two runs that are equal in exact arithmetic differ by rounding, which later steps amplify. How much
is measured: the run is repeated with θ and the inputs moved by a relative h = 1e-7, entry by entry
at random, and `amplification` is √n times the largest relative change over h, n being the number of
entries that moved. A rounding of eps anywhere in between is such a move of eps, in a direction that
need not be the worst for one entry but is for none √n times better.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import apo_core as apo
from verification.engine.scenes import RULES as PLAIN_RULES
from verification.tolerances import FUNCTION, assert_close

STEPS, EXAMPLES, IN, HIDDEN, OUT = 4, 5, 3, 4, 2
H = 1e-7

RULES: dict[str, Callable[[nn.Module], apo.UpdateRule]] = PLAIN_RULES | {
    "kfac": lambda model: apo.rules.KFAC(model, lr=0.05, damping=0.1),
    "kfac per layer": lambda model: apo.rules.KFAC(model, lr=0.05, damping=0.1, per_layer=True),
}

State = dict[str, Tensor]


class Batches(NamedTuple):
    """B and B' of one step."""

    x: Tensor
    y: Tensor
    x_other: Tensor


def network(names: Sequence[str] = ("first", "last")) -> nn.Module:
    """tanh between two Linear layers, which are registered in the order of `names`."""

    class Network(nn.Module):
        """last(tanh(first(x)))."""

        first: nn.Linear
        last: nn.Linear

        def forward(self, x: Tensor) -> Tensor:
            """Logits, (N, OUT)."""
            return self.last(torch.tanh(self.first(x)))

    layers = {"first": nn.Linear(IN, HIDDEN), "last": nn.Linear(HIDDEN, OUT)}
    model = Network()
    for name in names:
        model.add_module(name, layers[name])
    return model.double()


@final
@dataclass(frozen=True)
class Setting:
    """All that a run starts from.

    Attributes:
        rule: a name of `RULES`.
        theta: the parameters, by name.
        batches: of each step.
        fsd_weight: λ_FSD.
        wsd_weight: λ_WSD.
        loss_scale: c, which multiplies the loss.
        order: in which the layers are registered.
        prepare: changes φ before the run.
        meta_lr: of one of φ's parameters, by its name.
    """

    rule: str
    theta: State
    batches: list[Batches]
    fsd_weight: float = 0.3
    wsd_weight: float = 0.1
    loss_scale: float = 1.0
    order: tuple[str, ...] = ("first", "last")
    prepare: Callable[[apo.UpdateRule], None] = field(default=lambda rule: None)
    meta_lr: Callable[[str], float] = field(default=lambda name: 0.02)


class Result(NamedTuple):
    """What a run leaves.

    Attributes:
        terms: the addends of Q at each step, (STEPS, 3).
        slopes: dQ/dφ of the first step, by the name of φ.
        theta: the parameters at the end, by name.
        phi: φ at the end, by name.
    """

    terms: Tensor
    slopes: State
    theta: State
    phi: State

    @property
    def slope_norm(self) -> Tensor:
        """‖dQ/dφ‖, which an orthogonal change of φ's coordinates keeps."""
        return torch.cat([s.reshape(-1) for s in self.slopes.values()]).norm()


def setting(rule: str, seed: int, examples: int = EXAMPLES) -> Setting:
    """Random parameters and mini-batches, float64."""
    torch.manual_seed(seed)
    theta = {name: p.detach().clone() for name, p in network().named_parameters()}
    batches = [
        Batches(
            torch.randn(examples, IN, dtype=torch.float64),
            torch.randint(OUT, (examples,)),
            torch.randn(examples, IN, dtype=torch.float64),
        )
        for _ in range(STEPS)
    ]
    return Setting(rule, theta, batches)


def build(start: Setting) -> apo.APO:
    """The model at θ, the rule at φ and SGD over it, in the dtype of `start.theta`."""
    model = network(start.order).to(start.theta["first.weight"].dtype)
    model.load_state_dict(OrderedDict(start.theta))
    rule = RULES[start.rule](model)
    start.prepare(rule)
    groups = [
        {"params": [p], "lr": start.meta_lr(name)}
        for name, p in rule.named_parameters()
        if p.requires_grad
    ]
    objective = apo.ProximalObjective("kl", start.fsd_weight, start.wsd_weight)
    return apo.APO(model, rule, objective, torch.optim.SGD(groups), interval=1)


def run(start: Setting) -> Result:
    """Algorithm 1 with a meta-step at every step; K-FAC observes every mini-batch."""
    optimizer = build(start)
    model, rule = optimizer.model, optimizer.rule
    terms, slopes = [], {}
    for x, y, x_other in start.batches:

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            return start.loss_scale * cross_entropy(model(x), y)

        optimizer.zero_grad()
        if isinstance(rule, apo.rules.KFAC):
            with rule.observe(model):
                loss().backward()
        else:
            loss().backward()
        found = optimizer.meta_step(loss=loss, outputs=lambda x=x_other: model(x))
        terms.append(torch.stack(found))
        slopes = slopes or {
            name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None
        }
        optimizer.step()
    return Result(torch.stack(terms), slopes, values(model), values(rule))


def values(module: nn.Module) -> State:
    """Copies of the parameters, by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def compare(
    actual: Result,
    expected: Result,
    start: Setting,
    *,
    phi: bool = True,
    dtype: type = np.float64,
    solve: float = 1.0,
) -> None:
    """Q, dQ/dφ, θ and φ of both runs are equal but for rounding in `dtype`.

    Args:
        actual: of the transformed run, mapped back.
        expected: of the run from `start`.
        start: for the amplification.
        phi: whether φ and dQ/dφ are in the same coordinates; if not, ‖dQ/dφ‖ is compared.
        dtype: that `actual` is computed in.
        solve: condition number of what a step inverts, where no move of θ and x shows it.
    """
    condition = amplification(start, expected)
    pairs = {"Q": (actual.terms, expected.terms), "θ": _flat(actual.theta, expected.theta)}
    if phi:
        pairs["φ"] = _flat(actual.phi, expected.phi)
        pairs["dQ/dφ"] = _flat(actual.slopes, expected.slopes)
    else:
        pairs["‖dQ/dφ‖"] = (actual.slope_norm, expected.slope_norm)
    for what, (a, e) in pairs.items():
        assert_close(
            a.numpy(),
            e.to(a.dtype).numpy(),
            FUNCTION.at(dtype),
            condition=solve * condition[what],
            size=max(len(start.batches[0].y), HIDDEN),
            iterations=STEPS,
            what=f"{what} of {start.rule}",
        )


def amplification(start: Setting, expected: Result) -> dict[str, float]:
    """How much a relative change of θ and the inputs changes Q, dQ/dφ, θ and φ, at least 1."""
    generator = torch.Generator().manual_seed(0)

    def moved(t: Tensor) -> Tensor:
        return t * (1 + H * torch.randn(t.shape, generator=generator, dtype=t.dtype).sign())

    worst: dict[str, float] = {}
    entries = sum(t.numel() for t in start.theta.values())
    for _ in range(2):
        near = run(
            replace(
                start,
                theta={name: moved(t) for name, t in start.theta.items()},
                batches=[Batches(moved(b.x), b.y, moved(b.x_other)) for b in start.batches],
            )
        )
        for what, a, e in (
            ("Q", near.terms, expected.terms),
            ("dQ/dφ", *_flat(near.slopes, expected.slopes)),
            ("‖dQ/dφ‖", near.slope_norm, expected.slope_norm),
            ("θ", *_flat(near.theta, expected.theta)),
            ("φ", *_flat(near.phi, expected.phi)),
        ):
            change = float((a - e).norm() / e.norm()) / H
            worst[what] = max(1.0, worst.get(what, 0.0), math.sqrt(entries) * change)
    return worst


def _flat(left: State, right: State) -> tuple[Tensor, Tensor]:
    """Both as one vector, in the order of `right`."""
    return (
        torch.cat([left[name].reshape(-1) for name in right]),
        torch.cat([t.reshape(-1) for t in right.values()]),
    )
