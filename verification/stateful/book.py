"""Algorithm 1 kept by hand: derivatives through the unrolled network, nothing in place.

It shares no line with the engine but ρ and the network: updates are written down as torch.optim
documents them, θ' is a new dictionary, and torch.autograd differentiates Q through all of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeAlias, final

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, log_softmax

import apo_core as apo
from verification.engine.scenes import Scene, scene

Named: TypeAlias = dict[str, Tensor]
Memory: TypeAlias = dict[str, Named]
Update: TypeAlias = Callable[[Named, Named, Named, Memory], tuple[Named, Memory]]
"""(φ, θ, g, memory) -> (Δ, memory), each by the parameters' names."""


def heavy_ball(phi: Named, theta: Named, g: Named, memory: Memory) -> tuple[Named, Memory]:
    """v ← 0.9 v + g, Δ = −η v; without a memory v = g."""
    v = {n: 0.9 * memory["momentum"][n] + g[n] if memory else g[n] for n in theta}
    return {n: -phi["log_lr"].exp() * v[n] for n in theta}, {"momentum": v}


def adamw(phi: Named, theta: Named, g: Named, memory: Memory) -> tuple[Named, Memory]:
    """Δ = −η (m̂ / (√v̂ + ε) + 0.1 θ)."""
    m = {n: 0.9 * memory["exp_avg"][n] + 0.1 * g[n] for n in theta}
    v = {n: 0.999 * memory["exp_avg_sq"][n] + 0.001 * g[n] ** 2 for n in theta}
    t = {n: memory["step"][n] + 1 for n in theta}
    eta, eps = phi["log_lr"].exp(), phi["log_eps"].exp()
    update = {
        n: -eta
        * (m[n] / (1 - 0.9 ** t[n]) / ((v[n] / (1 - 0.999 ** t[n])).sqrt() + eps) + 0.1 * theta[n])
        for n in theta
    }
    return update, {"exp_avg": m, "exp_avg_sq": v, "step": t}


UPDATES: dict[str, Update] = {"heavy ball": heavy_ball, "adamw": adamw}


@final
class Book:
    """What θ, φ, the memory, the buffers and the counters must be.

    Args:
        update: of the scene's rule.
        s: the scene, whose present values are written down.
    """

    def __init__(self, update: Update, s: Scene) -> None:
        self.update = update
        self.adopt(s)

    def adopt(self, s: Scene) -> None:
        """Write down the scene's values, in float64, so that rounding does not add up."""
        optimizer = s.optimizer
        self.model = copy.deepcopy(s.model).double()
        self.phi = {n: p.detach().double().clone() for n, p in optimizer.rule.named_parameters()}
        names = [n for n, _ in self.model.named_parameters()]
        self.memory: Memory = {
            key: {n: t.double().clone() for n, t in zip(names, tensors, strict=True)}
            for key, tensors in optimizer.rule_state.items()
        }
        meta = optimizer.meta_optimizer
        self.meta_momentum = {
            n: meta.state[p]["momentum_buffer"].double().clone()
            for n, p in optimizer.rule.named_parameters()
            if p in meta.state
        }
        self.fsd_weight = optimizer.objective.fsd_weight
        self.wsd_weight = optimizer.objective.wsd_weight
        self.scale = optimizer.update_scale
        self.ahead_from_state = optimizer.rule.lookahead_from_state

    def theta(self) -> Named:
        """Copies of the parameters."""
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """A pass of the user: BatchNorm's buffers move, dropout draws."""
        return cross_entropy(self.model(x.double()), y)

    def gradients(self, x: Tensor, y: Tensor) -> Named:
        """g, by a backward pass that leaves nothing in `.grad`."""
        named = dict(self.model.named_parameters())
        grads = torch.autograd.grad(self.loss(x, y), list(named.values()))
        return dict(zip(named, grads, strict=True))

    def step(self, g: Named, without: str | None) -> None:
        """θ ← θ + scale · Δ; the parameter `without` a gradient stays, and its memory."""
        theta = self.theta()
        update, memory = self.update(self.phi, theta, g, self.memory)
        for n, p in self.model.named_parameters():
            if n != without:
                p.data = theta[n] + self.scale * update[n]
        for key, tensors in memory.items():
            self.memory[key] = {
                n: self.memory[key][n] if n == without else t for n, t in tensors.items()
            }

    def meta_step(self, g: Named, x: Tensor, y: Tensor, x_other: Tensor, meta_lr: float) -> Tensor:
        """φ ← φ − α (0.5 v + dQ/dφ), and Q; every pass draws the same dropout mask."""
        theta = self.theta()
        random = torch.get_rng_state()
        phi = {n: p.clone().requires_grad_() for n, p in self.phi.items()}
        memory = self.memory if self.ahead_from_state else {}
        update, _ = self.update(phi, theta, g, memory)
        ahead = {n: theta[n] + update[n] for n in theta}

        def outputs(at: Named, inputs: Tensor) -> Tensor:
            torch.set_rng_state(random)
            buffers = {n: b.clone() for n, b in self.model.named_buffers()}
            return functional_call(self.model, at | buffers, (inputs.double(),))

        log_p, log_p0 = (log_softmax(outputs(at, x_other), -1) for at in (ahead, theta))
        fsd = (log_p.exp() * (log_p - log_p0)).sum(1).mean()
        wsd = torch.stack([u.square().sum() for u in update.values()]).sum()
        q = cross_entropy(outputs(ahead, x), y)
        q = q + self.fsd_weight * fsd + 0.5 * self.wsd_weight * wsd
        slopes = torch.autograd.grad(q, list(phi.values()))
        torch.set_rng_state(random)
        for (n, p), slope in zip(self.phi.items(), slopes, strict=True):
            momentum = self.meta_momentum.get(n)
            self.meta_momentum[n] = slope if momentum is None else 0.5 * momentum + slope
            self.phi[n] = p - meta_lr * self.meta_momentum[n]
        return q.detach()


def build(rule: str, seed: int, meta_lr: float) -> Scene:
    """The `Scene` of that rule, with a meta-optimizer that has a memory too."""
    s = scene(rule, seed=seed)
    s.optimizer = apo.APO(
        s.model,
        s.optimizer.rule,
        s.optimizer.objective,
        torch.optim.SGD(s.optimizer.rule.parameters(), lr=meta_lr, momentum=0.5),
    )
    return s
