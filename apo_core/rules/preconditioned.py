"""Gradient descent with a preconditioner that APO learns."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from apo_core.preconditioners import EKFAC, Policy, Preconditioner, Structure
from apo_core.preconditioners.policy import choose
from apo_core.preconditioners.preconditioner import structure_class
from apo_core.types import State, Tensors, trainable_parameters
from apo_core.update_rule import UpdateRule


@final
class Preconditioned(UpdateRule):
    """θ' − θ = −Pg, with φ = P or its factors.

    The structure acts on each parameter that it is meant for: with `EKFAC`, the weights of Linear
    and Conv layers (as matrices) have A, B and S, the queries, keys and values of attention each
    their own, embeddings `EmbeddingEKFAC` (diagonal over the vocabulary), and biases,
    normalizations and bare parameters `Diagonal`. `Dense` is one matrix over all parameters.

    ```python
    Preconditioned(model, functools.partial(apo.BlockEKFAC, block=64))  # a structure's options

    def policy(module, name, parameter):  # a parameter's structure, or None: as by default
        return apo.Scalar if name.startswith("head.") else None

    Preconditioned(model, policy=policy)
    ```

    Source: P22 eq. 7, eq. 9 and eq. 10.

    Args:
        model: the module to train; only names, shapes, device and dtype are read.
        structure: a class of preconditioners, or a `functools.partial` of one with its options.
        initial_scale: s > 0, P = s²I at the start: SGD with learning rate s². P22 starts at I,
            which diverges wherever SGD with learning rate 1 does.
        policy: (module, name, parameter) -> the parameter's structure, or None for the default;
            `name` as in `model.named_parameters()`, `module` the one that holds the parameter.

    Attributes:
        preconditioners: for each parameter its P (one for all if the structure is joint).
        names: the parameters' names in `model`, in the same order.

    Raises:
        TypeError: `structure`, or what `policy` returned, is no class of preconditioners.
        ValueError: `initial_scale` is not positive, or a policy came with a joint structure.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure = EKFAC,
        initial_scale: float = 1.0,
        policy: Policy | None = None,
    ) -> None:
        super().__init__()
        self._joint = structure_class(structure).joint
        if self._joint and policy is not None:
            raise ValueError(
                "`policy` must be None with a structure over all parameters jointly, got one with "
                f"{structure!r}; choose a structure of one parameter, such as EKFAC."
            )
        params = trainable_parameters(model)
        self.names = tuple(params)
        if self._joint:
            flat = torch.cat([p.detach().reshape(-1) for p in params.values()])
            self.preconditioners = nn.ModuleList([structure(flat, initial_scale)])
        else:
            modules = dict(model.named_modules())
            self.preconditioners = nn.ModuleList(
                choose(structure, policy, modules[name.rpartition(".")[0]], name, p)(
                    p, initial_scale
                )
                for name, p in params.items()
            )

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
