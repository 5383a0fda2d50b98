"""Problems on which the rows of P22 Table 1 have an arg min."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from reference.arrays import Array
from reference.classical_methods import TABLE_1
from reference.discrepancies import (
    BernoulliKL,
    CategoricalKL,
    Discrepancy,
    GaussianKL,
    SquaredEuclidean,
    bregman_of,
)
from reference.losses import BinaryCrossEntropy, CrossEntropy, GaussianNLL, Loss, SquaredError
from reference.networks import Linear
from reference.problem import Batch, Problem
from verification.strategies.networks import parameters
from verification.strategies.outputs import CONVEX_LOSSES, targets
from verification.strategies.problems import MetaCase, meta_cases
from verification.strategies.spd import rotation
from verification.strategies.weights import ProximityWeights, weights

classical_weights = st.builds(
    ProximityWeights,
    weights(min_decade=-1.0, max_decade=1.0, zero=False),
    weights(min_decade=-1.0, max_decade=1.0, zero=False),
)
LIKELIHOODS: list[tuple[Loss, Discrepancy]] = [
    (CrossEntropy(), CategoricalKL("lookahead_current")),
    (CrossEntropy(), CategoricalKL("current_lookahead")),
    (BinaryCrossEntropy(), BernoulliKL("lookahead_current")),
    (BinaryCrossEntropy(), BernoulliKL("current_lookahead")),
    (GaussianNLL(), GaussianKL("lookahead_current")),
    (GaussianNLL(), GaussianKL("current_lookahead")),
]
BREGMAN: list[tuple[Loss, Discrepancy]] = [
    (loss, bregman_of(loss)) for loss in CONVEX_LOSSES.values()
]
ANY: list[tuple[Loss, Discrepancy]] = [
    (SquaredError(), SquaredEuclidean()),
    (CrossEntropy(), CategoricalKL("current_lookahead")),
    (BinaryCrossEntropy(), BernoulliKL("current_lookahead")),
]


def white(rows: int, columns: int, seed: int) -> Array:
    """Inputs with E[x x^T] = I, (rows, columns)."""
    return rotation(rows, seed + 1)[:, :columns] * np.sqrt(rows)


@st.composite
def row_cases(draw: st.DrawFn, row: str) -> MetaCase:
    """A problem on which a row of Table 1 has an arg min.

    Undamped curvatures are non-singular on a linear network with white inputs, unless its outputs
    are a softmax, which does not see a shift. Direct rows have a convex objective.
    """
    divergence, damped = TABLE_1[row].divergence, TABLE_1[row].damped
    choices = {"kl": LIKELIHOODS, "bregman": BREGMAN, "any": ANY, None: ANY}[divergence]
    if not damped:
        choices = [pair for pair in choices if not isinstance(pair[0], CrossEntropy)]
    loss, rho = draw(st.sampled_from(choices), label="loss and divergence")
    if damped and divergence != "any":
        return draw(
            meta_cases(
                smooth=True,
                losses={row: loss},
                rhos=st.just(rho),
                pairs=classical_weights,
                small=True,
            ),
            label="case",
        )
    inputs, outputs = draw(st.integers(1, 2), label="inputs"), draw(st.integers(1, 2), label="C")
    outputs = 2 if isinstance(loss, GaussianNLL) else outputs
    network = Linear(inputs, outputs, bias=False)
    theta = draw(parameters(network, max_scale=0.5), label="theta")
    seed = draw(st.integers(0, 2**16), label="seed")
    rng = np.random.default_rng(seed)
    batch, other = (
        Batch(white(inputs + 1, inputs, s), targets(loss, (inputs + 1, outputs), rng))
        for s in (seed, seed + 1)
    )
    pair = draw(classical_weights, label="weights")
    return MetaCase(Problem(network, loss), theta, batch, other, rho, pair)


def damped_enough(case: MetaCase) -> MetaCase:
    """lambda_WSD raised by what makes H + lambda_WSD I positive definite."""
    lowest = float(np.linalg.eigvalsh(case.problem.hessian(case.theta, *case.batch))[0])
    wsd = case.weights.wsd + max(0.0, -lowest)
    return replace(case, weights=ProximityWeights(case.weights.fsd, wsd))
