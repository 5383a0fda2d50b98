"""The state of a group holds nothing for the parameters of the others."""

from functools import partial

import torch
from torch import nn

from apo_core.rules import SGD, Grouped


def test_the_state_of_a_group_is_empty_where_the_parameters_are_not_its() -> None:
    model = nn.Linear(3, 2)
    rule = Grouped(
        model,
        lambda name, parameter: "matrix" if parameter.dim() > 1 else "vector",
        matrix=partial(SGD, lr=0.1, momentum=0.9),
        vector=partial(SGD, lr=0.1, momentum=0.9),
    )
    state = rule.init_state([p.detach() for p in model.parameters()])
    grads = [torch.ones_like(p) for p in model.parameters()]
    _, after = rule([p.detach() for p in model.parameters()], grads, state)
    for held in (state, after):
        sizes = {name: [t.numel() for t in tensors] for name, tensors in held.items()}
        assert sizes == {"matrix.momentum": [6, 0], "vector.momentum": [0, 2]}
