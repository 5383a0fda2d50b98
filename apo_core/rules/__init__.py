"""Update rules: one file each."""

from apo_core.rules.adam import Adam
from apo_core.rules.grouped import Grouped
from apo_core.rules.kfac import KFAC
from apo_core.rules.learning_rate import LearningRate
from apo_core.rules.preconditioned import Preconditioned
from apo_core.rules.rmsprop import RMSprop
from apo_core.rules.sgd import SGD

__all__ = ["KFAC", "SGD", "Adam", "Grouped", "LearningRate", "Preconditioned", "RMSprop"]
