"""Amortized Proximal Optimization: an optimizer's own parameters, learned online."""

from apo_core import rules
from apo_core.amortization import AmortizationGap, amortization_gap
from apo_core.discrepancies import (
    BernoulliKL,
    Bregman,
    CategoricalKL,
    Discrepancy,
    GaussianKL,
    SquaredEuclidean,
)
from apo_core.functional import meta_objective
from apo_core.objective import ProximalObjective
from apo_core.optimizer import APO
from apo_core.preconditioners import (
    EKFAC,
    BlockDiagonal,
    BlockEKFAC,
    Dense,
    Diagonal,
    EmbeddingEKFAC,
    Kronecker,
    LowRank,
    OneSided,
    Preconditioner,
    Scalar,
    Stacked,
)
from apo_core.self_tuning import self_tuning
from apo_core.types import Masked, ProximalTerms, Warmup
from apo_core.update_rule import UpdateRule

__version__ = "0.1.0"

__all__ = [
    "APO",
    "EKFAC",
    "AmortizationGap",
    "BernoulliKL",
    "BlockDiagonal",
    "BlockEKFAC",
    "Bregman",
    "CategoricalKL",
    "Dense",
    "Diagonal",
    "Discrepancy",
    "EmbeddingEKFAC",
    "GaussianKL",
    "Kronecker",
    "LowRank",
    "Masked",
    "OneSided",
    "Preconditioner",
    "ProximalObjective",
    "ProximalTerms",
    "Scalar",
    "SquaredEuclidean",
    "Stacked",
    "UpdateRule",
    "Warmup",
    "amortization_gap",
    "meta_objective",
    "rules",
    "self_tuning",
]
