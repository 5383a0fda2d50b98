"""Which structure a parameter gets: by its layer, unless the user's policy says otherwise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from apo_core.preconditioners.diagonal import Diagonal
from apo_core.preconditioners.embedding_ekfac import EmbeddingEKFAC
from apo_core.preconditioners.preconditioner import Structure, structure_class
from apo_core.preconditioners.stacked import Stacked

Policy: TypeAlias = Callable[[nn.Module, str, Tensor], Structure | None]
"""(the module that owns it, its full name, parameter) -> its structure, or None: as by default."""


def by_layer(structure: Structure, owner: nn.Module, name: str, parameter: Tensor) -> Structure:
    """The default: what `structure` accepts gets it, the rest what follows.

    parameter                                   structure
    Linear and Conv weights                     `structure` (so do all others, if it accepts them)
    MultiheadAttention's `in_proj_weight`       `structure` for the queries, keys and values, each
    its `q_proj_weight`, `k_...`, `v_...`       `structure`
    Embedding and EmbeddingBag tables           `EmbeddingEKFAC`, diagonal over the vocabulary
    biases, normalizations, bare parameters     `Diagonal`

    Source: P22 section 4.4 and appendix B.5.
    """
    kind = structure_class(structure)
    if kind.accepts(owner, parameter):
        return structure
    if isinstance(owner, nn.MultiheadAttention) and kind.accepts(owner.out_proj, parameter):
        if name.rpartition(".")[2] == "in_proj_weight":
            return functools.partial(Stacked, structure=structure, parts=3)
        if parameter.dim() == 2:  # `bias_k` and `bias_v` have three dimensions
            return structure
    if EmbeddingEKFAC.accepts(owner, parameter):
        return EmbeddingEKFAC
    return Diagonal


def choose(
    structure: Structure, policy: Policy | None, owner: nn.Module, name: str, parameter: Tensor
) -> Structure:
    """What `policy` says, where it says something, else `by_layer`.

    Raises:
        TypeError: `policy` returned neither a structure of one parameter nor None.
    """
    chosen = None if policy is None else policy(owner, name, parameter)
    if chosen is None:
        return by_layer(structure, owner, name, parameter)
    try:
        joint = structure_class(chosen).joint
    except TypeError:
        joint = True
    if joint:
        raise TypeError(
            "`policy` must return a class of preconditioners for one parameter, a "
            f"functools.partial of one, or None, got {chosen!r} for `{name}`."
        )
    return chosen
