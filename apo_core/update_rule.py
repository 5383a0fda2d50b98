"""u(θ, φ, g): the update rule whose parameters φ APO learns, and the one class to extend."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from apo_core.types import State, Tensors


class UpdateRule(nn.Module, ABC):
    """θ' = u(θ, φ, B) = θ + forward(θ, g, state). Source: P22 eq. 5.

    φ is `rule.parameters()`: `nn.Parameter`s in unconstrained coordinates (a logarithm of a
    learning rate, the square root of a positive diagonal), in float32 or float64. A new rule is
    one subclass in one file: create φ in `__init__`, write `init_state` and `forward`, and let
    `apo_core.testing.check_update_rule` judge it.

    Attributes:
        lookahead_from_state: whether the meta-step looks ahead with the rule's state (P22 footnote
            1: the state is there, and fixed for φ) or with an empty state `{}`, as if there were
            no history (P18 section 5 on momentum). An instance attribute, True unless set.
        elementwise: whether every entry of the update depends on its own entry of θ, g and state
            alone, and φ has not the shape of the parameters: then each rank of FSDP2 needs only
            its shards. An instance attribute, False unless set.
        claims: properties that hold for every φ, by their names in `apo_core.testing.CLAIMS`
            ("descent", "psd", "scale invariant", ...); the conformance kit checks them. An
            attribute of the class or the instance, empty unless set.
    """

    claims: frozenset[str] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.lookahead_from_state = True
        self.elementwise = False

    @abstractmethod
    def init_state(self, params: Tensors) -> State:
        """The state before the first step; `{}` for a rule without memory."""

    @abstractmethod
    def forward(self, params: Tensors, grads: Tensors, state: State) -> tuple[list[Tensor], State]:
        """The step and the next state: (θ, g, state) -> (θ' − θ, state').

        Pure: neither argument is changed, no random number drawn. Differentiable in φ, so that
        dQ/dφ = (∂u/∂φ)ᵀ q is one vector-Jacobian product.

        Args:
            params: θ, one tensor for each trainable parameter of the model, in its order.
            grads: g = ∇J_B(θ), of the same shapes, without a graph.
            state: what the last call returned, or what `init_state` did.

        Returns:
            The updates, with the shapes and dtypes of `params`, and the next state.
        """
