"""Structures of P: each applies to a gradient and can be written out as a dense matrix."""

from apo_core.preconditioners.block_diagonal import BlockDiagonal
from apo_core.preconditioners.block_ekfac import BlockEKFAC
from apo_core.preconditioners.dense import Dense
from apo_core.preconditioners.diagonal import Diagonal
from apo_core.preconditioners.ekfac import EKFAC
from apo_core.preconditioners.embedding_ekfac import EmbeddingEKFAC
from apo_core.preconditioners.kronecker import Kronecker
from apo_core.preconditioners.low_rank import LowRank
from apo_core.preconditioners.one_sided import OneSided
from apo_core.preconditioners.policy import Policy
from apo_core.preconditioners.preconditioner import Preconditioner, Structure
from apo_core.preconditioners.scalar import Scalar
from apo_core.preconditioners.stacked import Stacked

__all__ = [
    "EKFAC",
    "BlockDiagonal",
    "BlockEKFAC",
    "Dense",
    "Diagonal",
    "EmbeddingEKFAC",
    "Kronecker",
    "LowRank",
    "OneSided",
    "Policy",
    "Preconditioner",
    "Scalar",
    "Stacked",
    "Structure",
]
