"""The learning rate of any `torch.optim` optimizer, tuned by APO."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from apo_core.rules.layers import scaled
from apo_core.types import State, Tensors, phi_dtype, trainable_parameters
from apo_core.update_rule import UpdateRule

# Their step is linear in the learning rate as it is written in torch: no check is needed.
LINEAR = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta")

NUMBERS = {"int": int, "float": float}
ABSENT = torch.empty((0,) * 6)  # in the place of what a parameter lacks: the shape of none


@final
class LearningRate(UpdateRule):
    """θ' − θ = Δ, the step of a `torch.optim` optimizer at the learning rate η; φ = log η.

    Where Δ is linear in η, dΔ/dφ = Δ: the meta-gradient is ⟨Δ, q⟩, and no formula of the optimizer
    is needed. That holds for SGD, Adam, AdamW and most others, weight decay included. For an
    optimizer that is not known to be linear, each lookahead takes the step at 2η as well and
    refuses a Δ(2η) that is not 2Δ(η).

    The optimizer's own state is the rule's state, so that a lookahead does not disturb it; each
    call copies it once, and θ once.

    Args:
        model: the module to train.
        optimizer: built on the model's trainable parameters; its learning rates are the initial η,
            one φ for each parameter group. A schedule of its learning rates has no effect.

    Attributes:
        log_lr: φ, () for one parameter group, else (groups,).

    Raises:
        TypeError: `optimizer` is no `torch.optim.Optimizer`, or one that needs a closure.
        ValueError: it holds other parameters than the model, or a learning rate is not positive.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"`optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}."
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "`optimizer` must take a step without a closure, got LBFGS; its step is no "
                "function of one gradient."
            )
        params = list(trainable_parameters(model).values())
        group_of = {
            id(p): number
            for number, group in enumerate(optimizer.param_groups)
            for p in group["params"]
            if p.requires_grad
        }
        if set(group_of) != {id(p) for p in params}:
            raise ValueError(
                f"`optimizer` must hold the model's {len(params)} trainable parameters, got "
                f"{len(group_of)} with {len({id(p) for p in params} - set(group_of))} of them "
                "missing; build it on model.parameters()."
            )
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        if not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise ValueError(f"`optimizer` must have positive learning rates, got {rates}.")
        self.optimizer = optimizer
        self.exact = type(optimizer).__name__ in LINEAR and type(optimizer).__module__.startswith(
            "torch.optim"
        )
        self._held = params
        self._others = [
            p for group in optimizer.param_groups for p in group["params"] if not p.requires_grad
        ]
        self._groups = [group_of[id(p)] for p in params]
        first = params[0]
        phi = torch.tensor(rates, dtype=phi_dtype(first.dtype), device=first.device).log()
        self.log_lr = nn.Parameter(phi if len(rates) > 1 else phi[0])
        self._read: tuple[tuple[int, int], list[float]] | None = None

    @property
    def lr(self) -> Tensor:
        """η, () or (groups,), detached."""
        return self.log_lr.detach().exp()

    def __getstate__(self) -> dict[str, Any]:
        """All but what was read of the φ that a copy does not share."""
        return self.__dict__ | {"_read": None}

    def _rates(self) -> list[float]:
        """η of each group as numbers; the host waits for the device once after φ has changed."""
        now = (self.log_lr._version, self.log_lr.data_ptr())
        if self._read is None or self._read[0] != now:
            self._read = (now, self.lr.reshape(-1).tolist())
        return self._read[1]

    def init_state(self, params: Tensors) -> State:
        """The optimizer's state as it is."""
        return self._pack(self.optimizer.param_groups)

    def forward(self, params: Tensors, grads: Tensors, state: State) -> tuple[list[Tensor], State]:
        """Δ, with dΔ/dφ = Δ, and the optimizer's next state; an empty state is a fresh one.

        Raises:
            RuntimeError: Δ is not linear in the learning rate.
        """
        steps, next_state = self._step(params, grads, state, factor=1.0)
        if torch.is_grad_enabled():
            if not self.exact:
                self._require_linear(steps, self._step(params, grads, state, factor=2.0)[0])
            # The factor is 1; its derivative in φ is 1.
            grow = 1.0 + (self.log_lr - self.log_lr.detach())
            factors = grow.reshape(-1, 1)  # not 0-d: in 32 bits beside a 16-bit step
            steps = [
                scaled(factors[group], step, step)
                for group, step in zip(self._groups, steps, strict=True)
            ]
        return steps, next_state

    @torch.no_grad()
    def _step(
        self, params: Tensors, grads: Tensors, state: State, factor: float
    ) -> tuple[list[Tensor], State]:
        """Δ at `factor` · η, and the next state."""
        # What stands in `params` may be the very parameters that the optimizer is about to move.
        theta = [p.detach() for p in params]
        with self._borrowed(theta, grads, state, factor) as groups:
            self.optimizer.step()
            steps = [p.data for p in self._held]  # θ' stands in a copy of θ, which is given up
            torch._foreach_sub_(steps, theta)
            return steps, self._pack(groups)

    @contextmanager
    def _borrowed(
        self, params: Tensors, grads: Tensors, state: State, factor: float
    ) -> Iterator[list[dict[str, Any]]]:
        """The optimizer with copies of θ and of the state, and with g; yields its groups before.

        Afterwards all is put back. Parameters that it holds beside those of the rule have no
        gradient meanwhile, and so stay.
        """
        data, kept = [p.data for p in self._held], [p.grad for p in self._held]
        others = [p.grad for p in self._others]
        groups = [dict(group) for group in self.optimizer.param_groups]
        own = self.optimizer.state
        try:
            rates = [factor * rate for rate in self._rates()]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            self._unpack(state)
            for p, value, g in zip(self._held, params, grads, strict=True):
                p.data, p.grad = value.clone(), g
            for p in self._others:
                p.grad = None
            yield groups
        finally:
            self.optimizer.state = own
            for group, before in zip(self.optimizer.param_groups, groups, strict=True):
                group.update(before)
            for p, value, g in zip(self._held, data, kept, strict=True):
                p.data, p.grad = value, g
            for p, g in zip(self._others, others, strict=True):
                p.grad = g

    def _pack(self, own: list[dict[str, Any]]) -> State:
        """The optimizer's tensors and numbers, of its parameters and groups: one each a parameter.

        For what a parameter lacks `ABSENT` stands there. A group's numbers that are those
        of its `own`, such as a weight decay, are no memory and left out; so is η.
        """
        groups = [
            _tensors("group", {k: v for k, v in now.items() if _is_memory(k, v, before)})
            for now, before in zip(self.optimizer.param_groups, own, strict=True)
        ]
        entries = [
            _tensors("state", self.optimizer.state.get(p, {})) | groups[number]
            for p, number in zip(self._held, self._groups, strict=True)
        ]
        keys = dict.fromkeys(key for entry in entries for key in entry)
        return {key: [entry.get(key, ABSENT) for entry in entries] for key in keys}

    def _unpack(self, state: State) -> None:
        """Copies of the state's tensors, and its numbers, in the optimizer."""
        fresh: defaultdict[Tensor, Any] = defaultdict(dict)
        for path, tensors in state.items():
            source, kind, key = path.split(".", 2)
            for p, number, value in zip(self._held, self._groups, tensors, strict=True):
                target = fresh[p] if source == "state" else self.optimizer.param_groups[number]
                if value.shape == ABSENT.shape:
                    continue
                target[key] = NUMBERS.get(kind, Tensor.clone)(value)
        self.optimizer.state = fresh

    def _require_linear(self, once: list[Tensor], twice: list[Tensor]) -> None:
        """Δ(2η) = 2Δ(η) up to the rounding of θ + Δ."""
        for p, one, two in zip(self._held, once, twice, strict=True):
            allowed = 8 * torch.finfo(p.dtype).eps * (p.detach().norm() + two.norm())
            if not bool((two - 2 * one).norm() <= allowed):
                raise RuntimeError(
                    f"`optimizer` must take steps that are linear in its learning rate, got a step "
                    f"at twice the rate that is not twice as long from "
                    f"{type(self.optimizer).__name__}; write its update as an UpdateRule instead."
                )


def _tensors(source: str, values: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors and numbers of a parameter's state or of a group, by "source.kind.key"."""
    found: dict[str, Tensor] = {}
    for key, value in values.items():
        if isinstance(value, Tensor):
            found[f"{source}.tensor.{key}"] = value
        elif type(value) in (int, float):
            dtype = torch.float64 if type(value) is float else torch.int64
            found[f"{source}.{type(value).__name__}.{key}"] = torch.tensor(value, dtype=dtype)
    return found


def _is_memory(key: str, value: object, own: dict[str, Any]) -> bool:
    """Whether a group's entry may change from step to step; a tensor may do so in place."""
    return key != "lr" and (isinstance(value, Tensor) or value is not own.get(key))
