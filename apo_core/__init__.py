"""Amortized Proximal Optimization: an optimizer's own parameters, learned online."""

from apo_core import rules
from apo_core.discrepancies import Bregman, CategoricalKL, Discrepancy, SquaredEuclidean
from apo_core.objective import ProximalObjective
from apo_core.optimizer import APO, Warmup
from apo_core.preconditioners import EKFAC, Dense, Diagonal, Preconditioner
from apo_core.types import ProximalTerms
from apo_core.update_rule import UpdateRule

__version__ = "0.1.0"

__all__ = [
    "APO",
    "EKFAC",
    "Bregman",
    "CategoricalKL",
    "Dense",
    "Diagonal",
    "Discrepancy",
    "Preconditioner",
    "ProximalObjective",
    "ProximalTerms",
    "SquaredEuclidean",
    "UpdateRule",
    "Warmup",
    "rules",
]
