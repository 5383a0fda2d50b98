"""Optimizers whose steps are timed: each as the pieces of which its steps consist.

piece       what it is                                              pieces a step
step        forward, backward, the optimizer's step                 1 less what others stand for
meta        a meta-step of APO, or TorchOpt's, at the same g        1/K
observed    a step whose backward pass K-FAC observes               0.9/K in place of a step
renewed     the same with new eigenbases                            0.1/K in place of a step
ten steps   ten steps, one of which has new eigenbases or roots     1/10 in place of ten steps

Learning rates and meta-learning rates are tiny: the cost does not depend on them, and nothing
diverges.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, final

import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import apo_core as apo
from experiments.metering import Work, products

TINY = 1e-8
NEVER = 10**9  # observations


def shares(pieces: Iterable[str], interval: int) -> dict[str, float]:
    """How many of each piece there are to one step, for a meta-step every `interval` steps."""
    known = {
        "meta": 1 / interval,
        "observed": 0.9 / interval,
        "renewed": 0.1 / interval,
        "ten steps": 0.1,
    }
    found = {piece: known[piece] for piece in pieces if piece in known}
    if "ten steps" not in found:
        found["step"] = 1.0 - found.get("observed", 0.0) - found.get("renewed", 0.0)
    return found


@final
@dataclass(frozen=True)
class Task:
    """A network with its mini-batches B and B'."""

    model: nn.Module
    x: Tensor
    y: Tensor
    other: Tensor

    def loss(self) -> Tensor:
        """J_B, 0-d."""
        return cross_entropy(self.model(self.x), self.y)

    def outputs(self) -> Tensor:
        """The outputs on B'."""
        return self.model(self.other)

    def backward(self) -> None:
        """g into `.grad`."""
        self.model.zero_grad()
        self.loss().backward()


@final
@dataclass(frozen=True)
class Contender:
    """What is timed, and the multiplications and additions in its products.

    Attributes:
        pieces: by name, see the module.
        products: of each piece, counted in its parts: the passes, and the rule alone. Empty where
            they are not known.
    """

    pieces: dict[str, Work]
    products: dict[str, int]


def _torch(task: Task, optimizer: torch.optim.Optimizer) -> Contender:
    """An optimizer whose steps all cost the same, and have no products of their own."""

    def step() -> None:
        task.backward()
        optimizer.step()

    return Contender({"step": step}, {"step": products(task.backward)})


def _ten(task: Task, optimizer: torch.optim.Optimizer) -> Contender:
    """An optimizer whose every tenth step costs more."""

    def steps() -> None:
        for _ in range(10):
            task.backward()
            optimizer.step()

    return Contender({"ten steps": steps}, {})


def _apo(task: Task, rule: apo.UpdateRule) -> Contender:
    """A rule whose φ APO learns; K-FAC's steps are partly observed."""
    optimizer = apo.APO(
        task.model,
        rule,
        apo.ProximalObjective("kl", fsd_weight=0.1),
        torch.optim.RMSprop(rule.parameters(), lr=TINY),
    )
    kfac = rule if isinstance(rule, apo.rules.KFAC) else None

    def step() -> None:
        task.backward()
        optimizer.step()

    def observe(interval: int) -> None:
        assert kfac is not None
        kfac.interval = interval
        with kfac.observe(task.model):
            task.backward()

    def observed(interval: int) -> None:
        observe(interval)
        optimizer.step()

    def meta() -> None:
        optimizer.meta_step(loss=task.loss, outputs=task.outputs)

    pieces: dict[str, Work] = {"step": step, "meta": meta}
    base, forward = products(task.backward), products(task.outputs)
    if kfac is not None:
        observe(1)
        pieces["observed"] = functools.partial(observed, NEVER)
        pieces["renewed"] = functools.partial(observed, 1)
    own, pulled = _rule_products(task, rule)
    counted = {
        "step": base + own,
        "meta": 2 * base + forward + pulled,  # loss at θ', outputs at θ and at θ'
    }
    if kfac is not None:  # the eigendecompositions are no products, and left out
        seen = products(functools.partial(observe, NEVER)) + own
        counted |= {"observed": seen, "renewed": seen}
    return Contender(pieces, counted)


def _rule_products(task: Task, rule: apo.UpdateRule) -> tuple[int, int]:
    """The products of u(θ, φ, g) alone, and with the vector-Jacobian product in φ."""
    params: list[Tensor] = [p.detach() for p in task.model.parameters()]
    state = rule.init_state(params)
    learned = [p for p in rule.parameters() if p.requires_grad]

    def pull_back() -> None:
        updates, _ = rule(params, params, state)
        torch.autograd.grad(updates, learned, params)

    with torch.no_grad():
        own = products(lambda: rule(params, params, state))
    return own, products(pull_back)


def _torchopt(task: Task) -> Contender:
    """A learning rate by a one-step unroll: g is taken anew, with a graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of what it was compiled with
        import torchopt
    base = torch.optim.SGD(task.model.parameters(), lr=TINY)
    log_lr = torch.tensor(-10.0, requires_grad=True)
    meta_optimizer = torch.optim.RMSprop([log_lr], lr=TINY)

    def step() -> None:
        task.backward()
        base.step()

    def meta() -> None:
        theta = torchopt.extract_state_dict(task.model, by="reference")
        rate: float = log_lr.exp()  # type: ignore[assignment]
        inner = torchopt.MetaSGD(task.model, lr=rate)
        with torch.no_grad():
            now = task.outputs().log_softmax(-1)
        inner.step(task.loss())
        ahead = task.outputs().log_softmax(-1)
        kl = (ahead.exp() * (ahead - now)).sum(-1).mean()
        meta_optimizer.zero_grad()
        (log_lr.grad,) = torch.autograd.grad(task.loss() + 0.1 * kl, log_lr)
        meta_optimizer.step()
        torchopt.recover_state_dict(task.model, theta)

    return Contender({"step": step, "meta": meta}, {})


@final
@dataclass(frozen=True)
class Entry:
    """A row of the comparison.

    Attributes:
        label: for people.
        build: task -> contender.
        kind: whose it is.
        reference: the entry that it is compared with.
        intervals: K of the meta-steps; empty where there are none.
        wide: whether it runs on layers of 1,000 units too.
    """

    label: str
    build: Callable[[Task], Contender]
    kind: Literal["torch", "APO", "peer"]
    reference: Literal["sgd", "adamw"] = "sgd"
    intervals: tuple[int, ...] = ()
    wide: bool = True


def _adamw(task: Task) -> torch.optim.AdamW:
    return torch.optim.AdamW(task.model.parameters(), lr=TINY)


def _precondition(
    task: Task, structure: Callable[[Tensor, float], apo.Preconditioner]
) -> Contender:
    return _apo(task, apo.rules.Preconditioned(task.model, structure, TINY))


ENTRIES: dict[str, Entry] = {
    "sgd": Entry(
        "torch SGD", lambda t: _torch(t, torch.optim.SGD(t.model.parameters(), lr=TINY)), "torch"
    ),
    "adamw": Entry("torch AdamW", lambda t: _torch(t, _adamw(t)), "torch"),
    "apo-sgd": Entry(
        "APO-SGD", lambda t: _apo(t, apo.rules.SGD(t.model, TINY)), "APO", "sgd", (10, 20, 50, 100)
    ),
    "apo-adamw": Entry(
        "APO-AdamW",
        lambda t: _apo(t, apo.rules.Adam(t.model, TINY, weight_decay=0.01)),
        "APO",
        "adamw",
        (10,),
    ),
    "apo-any": Entry(
        "APO LearningRate(AdamW)",
        lambda t: _apo(t, apo.rules.LearningRate(t.model, _adamw(t))),
        "APO",
        "adamw",
        (10,),
    ),
    "apo-kfac": Entry(
        "APO-KFAC", lambda t: _apo(t, apo.rules.KFAC(t.model, TINY)), "APO", "sgd", (10,)
    ),
    "apo-block": Entry(
        "APO-Precond, blocks of 64",
        lambda t: _precondition(t, functools.partial(apo.BlockEKFAC, block=64)),
        "APO",
        "sgd",
        (10,),
    ),
    "apo-ekfac": Entry(
        "APO-Precond, EKFAC", lambda t: _precondition(t, apo.EKFAC), "APO", "sgd", (10,)
    ),
    "torchopt": Entry("TorchOpt, one step unrolled", _torchopt, "peer", "sgd", (10,)),
    "soap": Entry(
        "SOAP, bases every 10",
        lambda t: _ten(t, pytorch_optimizer.SOAP(t.model.parameters(), TINY)),
        "peer",
        wide=False,
    ),
    "shampoo": Entry(
        "Shampoo, roots every 10",
        lambda t: _ten(
            t,
            pytorch_optimizer.Shampoo(t.model.parameters(), TINY, preconditioning_compute_steps=10),
        ),
        "peer",
        wide=False,
    ),
}


def installed(name: str) -> bool:
    """Whether the entry can run here: TorchOpt comes with the extra `bench` alone."""
    return name != "torchopt" or find_spec("torchopt") is not None
