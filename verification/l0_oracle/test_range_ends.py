"""Every range of the oracle's numbers ends exactly where the documentation says."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from reference import MLP, BinaryCrossEntropy, CrossEntropy, PoissonLoss
from reference.convolution import Image, patch_selection
from reference.cycles import helix_cycle
from reference.manifolds import Affine, Polyline, Sphere
from reference.networks import FixedHead, Linear
from reference.noisy_quadratic import NoisyQuadratic
from reference.optimal_preconditioners import kronecker
from reference.output_space import curvature_free_bound, projected_gradient_step
from reference.schedules import greedy


class Range(NamedTuple):
    """What takes a value, the last that it takes, and the first that it refuses with its text."""

    text: str
    make: Callable
    inside: tuple
    outside: tuple


def above(x: float) -> float:
    """The next float64."""
    return math.nextafter(x, math.inf)


def below(x: float) -> float:
    """The float64 before."""
    return math.nextafter(x, -math.inf)


POSITIVE = ((above(0.0),), (0.0, below(0.0)))
LOGITS = np.zeros((1, 3))
LINE = Affine(np.zeros(2), [[1.0], [0.0]])
RANGES = [
    Range("`h` must be positive", lambda x: NoisyQuadratic([1.0, x], [1.0, 1.0]), *POSITIVE),
    Range(
        "`v` must be non-negative",
        lambda x: NoisyQuadratic([1.0, 1.0], [1.0, x]),
        (0.0,),
        (below(0.0),),
    ),
    Range("`radius` must be", lambda x: Sphere(np.zeros(2), x), (1e-300,), (0.0,)),
    Range("`radius` must be", lambda d: Sphere(np.zeros(d), 1.0), (2,), (1,)),
    Range("`vertices` must be", lambda k: Polyline(np.eye(3)[:k]), (2,), (1,)),
    Range(
        "`basis` must have linearly independent columns",
        lambda x: Affine(np.zeros(3), [[0.1, 0.3 + x], [0.2, 0.6], [0.3, 0.9]]),
        (1e-10,),
        (0.0, 1e-16),
    ),
    Range(
        "`basis` must have linearly independent columns",
        lambda x: Affine(np.zeros(2), [[x], [0.0]]),
        (1e-300,),
        (0.0,),
    ),
    Range(
        "`ratio` must lie in",
        helix_cycle,
        (1.0 / 6.0 + 1e-12, below(0.5)),
        (1.0 / 6.0, 0.5),
    ),
    Range(
        "`weight` must exceed",
        lambda x: curvature_free_bound(x, 3.0, 1, 1.0),
        (above(1.5),),
        (1.5,),
    ),
    Range(
        "`weight` must be positive",
        lambda x: projected_gradient_step(LINE, np.zeros(2), np.zeros(2), x),
        (1e-300,),
        (0.0,),
    ),
    Range("`fsd_weight` must be positive", lambda x: kronecker([], x), (above(0.0),), (0.0,)),
    Range("`widths` must list two or more positive", MLP, ([1, 1],), ([1], [1, 0])),
    Range("`input_size` and `output_size`", lambda n: Linear(n, 1), (1,), (0,)),
    Range("`input_size` and `output_size`", lambda n: Linear(1, n), (1,), (0,)),
    Range("`heads` must be", lambda n: FixedHead([np.eye(2)], [n]), (1,), (0,)),
    Range("`heads` must be", lambda sizes: FixedHead([np.eye(2)], sizes), ([1],), ([1, 1],)),
    Range("`kernel` must fit", lambda k: patch_selection(Image(1, 3, 4), k), (3,), (4,)),
    Range(
        "`kernel` must fit",
        lambda p: patch_selection(Image(1, 3, 3), 1, padding=p),
        (0,),
        (-1,),
    ),
    Range(
        "`targets` must be labels",
        lambda t: CrossEntropy().value(LOGITS, np.array([t])),
        (0, 2),
        (-1, 3),
    ),
    Range(
        "`targets` must be 0 or 1",
        lambda t: BinaryCrossEntropy().value(LOGITS, np.array([[0.0, 1.0, t]])),
        (0.0, 1.0),
        (0.5, below(1.0)),
    ),
    Range(
        "`targets` must be non-negative",
        lambda t: PoissonLoss().value(LOGITS, np.array([[0.0, 1.0, t]])),
        (0.0,),
        (below(0.0),),
    ),
    Range(
        "`batch` must be one of",
        lambda batch: greedy(NoisyQuadratic([1.0]), [1.0], 1, batch),
        ("same", "other"),
        ("both",),
    ),
]


@pytest.mark.parametrize("case", RANGES, ids=lambda case: case.text)
def test_a_range_takes_its_last_values_and_refuses_the_next(case: Range) -> None:
    for value in case.inside:
        case.make(value)
    for value in case.outside:
        with pytest.raises(ValueError, match=case.text):
            case.make(value)
