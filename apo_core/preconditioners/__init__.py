"""Structures of P: each applies to a gradient and can be written out as a dense matrix."""

from apo_core.preconditioners.dense import Dense
from apo_core.preconditioners.diagonal import Diagonal
from apo_core.preconditioners.ekfac import EKFAC
from apo_core.preconditioners.preconditioner import Preconditioner

__all__ = ["EKFAC", "Dense", "Diagonal", "Preconditioner"]
