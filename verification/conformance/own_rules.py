"""The engine's rules, each with the properties that its formula promises for every φ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import nn

import apo_core as apo
from apo_core.preconditioners import Structure
from verification.engine.scenes import RULES as SCENES

GRADIENT_STEP = frozenset(
    {
        "descent",
        "psd",
        "scale equivariant",
        "translation invariant",
        "permutation equivariant",
        "rotation equivariant",
    }
)
FACTORED = frozenset({"descent", "psd", "scale equivariant", "translation invariant"})
ADAPTIVE = frozenset({"descent", "translation invariant", "permutation equivariant"})


@final
@dataclass(frozen=True)
class Claiming:
    """model -> the rule, with what it claims.

    Attributes:
        build: makes the rule.
        claims: the properties that hold, and no others.
    """

    build: Callable[[nn.Module], apo.UpdateRule]
    claims: frozenset[str]

    def __call__(self, model: nn.Module) -> apo.UpdateRule:
        """The rule for `model`."""
        rule = self.build(model)
        rule.claims = self.claims
        return rule


def _structure(structure: Structure) -> Callable[[nn.Module], apo.UpdateRule]:
    """A structure, by a policy also on weights where it is not the default."""
    return lambda model: apo.rules.Preconditioned(
        model,
        structure,
        initial_scale=0.2,
        policy=lambda owner, name, parameter: structure if parameter.dim() > 1 else None,
    )


STRUCTURES: dict[str, Structure] = {
    "scalar": apo.Scalar,
    "kronecker": apo.Kronecker,
    "one-sided, input": apo.OneSided,
    "one-sided, output": partial(apo.OneSided, side="output"),
    "low rank": partial(apo.LowRank, rank=2),
    "block-diagonal": partial(apo.BlockDiagonal, block=4),
    "block EKFAC": partial(apo.BlockEKFAC, block=2),
    "embedding EKFAC": apo.EmbeddingEKFAC,
    "stacked EKFAC": partial(apo.Stacked, structure=apo.EKFAC, parts=1),
}

CLAIMED: dict[str, frozenset[str]] = {
    "sgd": GRADIENT_STEP,
    "sgd per layer": GRADIENT_STEP,
    "heavy ball": GRADIENT_STEP,
    "nesterov": GRADIENT_STEP,
    "heavy ball ahead": GRADIENT_STEP,
    "rmsprop": ADAPTIVE,
    "adamw": frozenset({"permutation equivariant"}),  # the decay moves θ whatever g is
    "any optimizer": ADAPTIVE,
    "diagonal": FACTORED,
    "dense": frozenset({"linear in phi", "scale equivariant", "translation invariant"}),
    "ekfac": FACTORED,
}
"""What holds of the rules of the scenes; of others nothing."""

RULES: dict[str, Claiming] = {
    **{name: Claiming(build, CLAIMED.get(name, frozenset())) for name, build in SCENES.items()},
    "adam": Claiming(lambda model: apo.rules.Adam(model, learn=("lr", "eps")), ADAPTIVE),
    "any optimizer, SGD": Claiming(
        lambda model: apo.rules.LearningRate(
            model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        ),
        GRADIENT_STEP,
    ),
    **{name: Claiming(_structure(s), FACTORED) for name, s in STRUCTURES.items()},
}
"""Every rule with its claims; K-FAC, which needs a pass of the model, is in the matrix."""
RULES["scalar"] = Claiming(RULES["scalar"].build, GRADIENT_STEP)

HANDFUL: dict[str, Claiming] = {
    **{name: RULES[name] for name in ("heavy ball", "rmsprop", "ekfac")},
    "kfac": Claiming(
        lambda model: apo.rules.KFAC(model, lr=0.05, damping=0.1, smoothing=0.5), FACTORED
    ),
}
"""One rule of each kind: with a state, adaptive, structured, and one that observes passes."""
