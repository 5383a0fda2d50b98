"""Several groups of parameters, each with an update rule of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast, final

import torch
from torch import Tensor, nn

from apo_core.types import State, Tensors, trainable_parameters
from apo_core.update_rule import UpdateRule


@final
class Grouped(UpdateRule):
    """θ'_k − θ_k = u_k(θ_k, φ_k, g_k) for each group k of parameters; φ is that of all groups.

    ```python
    rule = Grouped(
        model,
        lambda name, parameter: "matrices" if parameter.dim() > 1 else "rest",
        matrices=apo.rules.Preconditioned,
        rest=functools.partial(apo.rules.SGD, lr=0.1, per_layer=True),
    )
    rule.rules["rest"].lr  # what a group's rule has and does, K-FAC's `observe` too
    ```

    Any rule serves, a third party's and another `Grouped` too: while it is built, the parameters of
    all other groups are frozen, so that its model has only its own. The meta-gradient is joint:
    every group looks ahead at once, and Q sees the whole θ'.

    A group's state is that of its rule, under "group.key"; an empty tensor stands for each
    parameter of another group.

    Args:
        model: the module to train.
        assign: (name, parameter) -> the group's name, called once for each trainable parameter;
            `name` as in `model.named_parameters()`.
        factories: for each group's name, model -> its rule; a class, a `functools.partial`, or
            `lambda model: LearningRate(model, torch.optim.AdamW(model.parameters()))`.

    Attributes:
        rules: the group's rule by its name.
        names: for each group the names of its parameters, in the model's order.

    Raises:
        ValueError: no group; a group without parameter; `assign` returned another name; rules
            with memory that differ in `lookahead_from_state`; a name that `nn.ModuleDict` has.
        TypeError: a factory built something else than an update rule.
    """

    def __init__(
        self,
        model: nn.Module,
        assign: Callable[[str, nn.Parameter], str],
        /,
        **factories: Callable[[nn.Module], UpdateRule],
    ) -> None:
        super().__init__()
        params = trainable_parameters(model)
        self.names = _members(params, assign, tuple(factories))
        index = {name: i for i, name in enumerate(params)}
        self._own = {group: [index[name] for name in own] for group, own in self.names.items()}
        self.rules = nn.ModuleDict()
        looks_back: dict[str, bool] = {}
        for group, factory in factories.items():
            own = [params[name] for name in self.names[group]]
            with _alone(own, list(params.values())):
                rule = factory(model)
            if not isinstance(rule, UpdateRule):
                raise TypeError(
                    f"`{group}` must build an apo_core.UpdateRule, got {type(rule).__name__}; pass "
                    "a rule's class, a functools.partial of it, or a function of the model."
                )
            self.rules[group] = rule
            if rule.init_state([p.detach() for p in own]):
                looks_back[group] = rule.lookahead_from_state
        if len(set(looks_back.values())) > 1:
            raise ValueError(
                f"`lookahead_from_state` must be the same for all rules with a memory, got "
                f"{looks_back}; set it on a group's rule, as SGD's `lookahead_momentum` does."
            )
        self.lookahead_from_state = all(looks_back.values())
        self.elementwise = all(rule.elementwise for _, rule in self._rules())

    def init_state(self, params: Tensors) -> State:
        """The states of all groups."""
        state: State = {}
        for group, rule in self._rules():
            own = rule.init_state(self._part(group, params))
            state |= self._spread(group, own, params)
        return state

    def forward(self, params: Tensors, grads: Tensors, state: State) -> tuple[list[Tensor], State]:
        """Every group's own step, and its next state; with an empty state, all without history."""
        updates = list(grads)  # each is replaced by its group's
        next_state: State = {}
        for group, rule in self._rules():
            own = {
                key.removeprefix(f"{group}."): self._part(group, tensors)
                for key, tensors in state.items()
                if key.startswith(f"{group}.")
            }
            steps, after = rule(self._part(group, params), self._part(group, grads), own)
            for i, step in zip(self._own[group], steps, strict=True):
                updates[i] = step
            next_state |= self._spread(group, after, params)
        return updates, next_state

    def _rules(self) -> Iterator[tuple[str, UpdateRule]]:
        for group, rule in self.rules.items():
            yield group, cast(UpdateRule, rule)

    def _part(self, group: str, tensors: Tensors) -> Tensors:
        return [tensors[i] for i in self._own[group]]

    def _spread(self, group: str, state: State, params: Tensors) -> State:
        """A group's state as one of all parameters: their order, empty where they are not its."""
        empty = torch.empty(0, device=params[0].device)
        whole = {f"{group}.{key}": [empty] * len(params) for key in state}
        for key, tensors in state.items():
            for i, tensor in zip(self._own[group], tensors, strict=True):
                whole[f"{group}.{key}"][i] = tensor
        return whole


def _members(
    params: dict[str, nn.Parameter],
    assign: Callable[[str, nn.Parameter], str],
    groups: tuple[str, ...],
) -> dict[str, tuple[str, ...]]:
    """The names of each group's parameters, none of them empty."""
    if not groups:
        raise ValueError("`factories` must name at least one group, got none; pass matrices=...")
    taken = [group for group in groups if hasattr(nn.ModuleDict, group) or "." in group]
    if taken:
        raise ValueError(
            f"`factories` must have names that nn.ModuleDict can hold, got {taken[0]!r}; rename it."
        )
    members: dict[str, list[str]] = {group: [] for group in groups}
    for name, parameter in params.items():
        group = assign(name, parameter)
        if group not in members:
            raise ValueError(
                f"`assign` must return one of {list(groups)}, got {group!r} for `{name}`; give "
                "that group a rule, or freeze the parameter with requires_grad_(False)."
            )
        members[group].append(name)
    idle = [group for group, own in members.items() if not own]
    if idle:
        raise ValueError(
            f"`assign` must give every group a parameter, got none for {idle[0]!r}; leave the "
            "group out."
        )
    return {group: tuple(own) for group, own in members.items()}


@contextmanager
def _alone(own: list[nn.Parameter], everyone: list[nn.Parameter]) -> Iterator[None]:
    """The model as if `own` were its only trainable parameters."""
    kept = {id(p) for p in own}
    try:
        for p in everyone:
            p.requires_grad_(id(p) in kept)
        yield
    finally:
        for p in everyone:
            p.requires_grad_(True)
