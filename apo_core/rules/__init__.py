"""Update rules: one file each."""

from apo_core.rules.preconditioned import Preconditioned
from apo_core.rules.sgd import SGD

__all__ = ["SGD", "Preconditioned"]
