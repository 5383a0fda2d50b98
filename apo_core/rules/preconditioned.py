"""Gradient descent with a preconditioner that APO learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from apo_core.preconditioners import EKFAC, Diagonal, Preconditioner
from apo_core.types import State, Tensors, trainable_parameters
from apo_core.update_rule import UpdateRule

Structure = Callable[[Tensor, float], Preconditioner]


@final
class Preconditioned(UpdateRule):
    """θ' − θ = −Pg, with φ = P or its factors.

    The structure acts on each parameter that it is meant for, `Diagonal` on the others: with
    `EKFAC`, the weights of Linear and Conv layers (as matrices) have A, B and S, biases and
    normalization parameters a diagonal. `Dense` is one matrix over all parameters.

    Source: P22 eq. 7, eq. 9 and eq. 10.

    Args:
        model: the module to train; only names, shapes, device and dtype are read.
        structure: `EKFAC`, `Diagonal` or `Dense`, a class of preconditioners.
        initial_scale: s > 0, P = s²I at the start: SGD with learning rate s². P22 starts at I,
            which diverges wherever SGD with learning rate 1 does.

    Attributes:
        preconditioners: for each parameter its P (one for all if the structure is joint).
        names: the parameters' names in `model`, in the same order.

    Raises:
        TypeError: `structure` is no class of preconditioners.
        ValueError: `initial_scale` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: type[Preconditioner] = EKFAC,
        initial_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not (isinstance(structure, type) and issubclass(structure, Preconditioner)):
            raise TypeError(
                "`structure` must be a class of preconditioners (EKFAC, Diagonal or Dense), "
                f"got {structure!r}."
            )
        params = trainable_parameters(model)
        self.names = tuple(params)
        build: Structure = structure
        if structure.joint:
            flat = torch.cat([p.detach().reshape(-1) for p in params.values()])
            self.preconditioners = nn.ModuleList([build(flat, initial_scale)])
        else:
            modules = dict(model.named_modules())
            self.preconditioners = nn.ModuleList(
                build(p, initial_scale)
                if structure.accepts(modules[name.rpartition(".")[0]], p)
                else Diagonal(p, initial_scale)
                for name, p in params.items()
            )
        self._joint = structure.joint

    def init_state(self, params: Tensors) -> State:
        """Nothing: the rule has no memory."""
        return {}

    def forward(self, params: Tensors, grads: Tensors, state: State) -> tuple[list[Tensor], State]:
        """−Pg, and no state."""
        if not self._joint:
            pairs = zip(self.preconditioners, grads, strict=True)
            return [-P(g) for P, g in pairs], state
        step = -self.preconditioners[0](torch.cat([g.reshape(-1) for g in grads]))
        pieces = step.split([g.numel() for g in grads])
        return [u.reshape(g.shape) for u, g in zip(pieces, grads, strict=True)], state

    def dense(self) -> Tensor:
        """P over all parameters, (n, n), in their order, each flattened row-major."""
        blocks = [P.dense() for P in self.preconditioners if isinstance(P, Preconditioner)]
        return torch.block_diag(*blocks)
