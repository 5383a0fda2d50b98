"""Every loss and divergence of the oracle, with outputs and targets that they are defined for.

`LOSSES` and `DISCREPANCIES` are the ones with a twin in the engine; these are all.
"""

from __future__ import annotations

import numpy as np

from reference.arrays import Array
from reference.discrepancies import BernoulliKL, Bregman, Discrepancy, GaussianKL
from reference.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    GaussianNLL,
    Loss,
    PoissonLoss,
    SquaredError,
)
from verification.strategies.discrepancies import DISCREPANCIES

CONVEX_LOSSES: dict[str, Loss] = {
    "squared_error": SquaredError(),
    "cross_entropy": CrossEntropy(),
    "binary_cross_entropy": BinaryCrossEntropy(),
    "poisson": PoissonLoss(),
}
"""Of the form psi(z) - <t, z> + const, each with the name of its psi."""

ALL_LOSSES: dict[str, Loss] = {**CONVEX_LOSSES, "gaussian_nll": GaussianNLL()}

ALL_DISCREPANCIES: dict[str, Discrepancy] = {
    **DISCREPANCIES,
    "bernoulli-kl-lookahead-current": BernoulliKL("lookahead_current"),
    "bernoulli-kl-current-lookahead": BernoulliKL("current_lookahead"),
    "gaussian-kl-lookahead-current": GaussianKL("lookahead_current"),
    "gaussian-kl-current-lookahead": GaussianKL("current_lookahead"),
    "bregman-binary-cross-entropy": Bregman("binary_cross_entropy"),
    "bregman-poisson": Bregman("poisson"),
}


def exponentiated(name: str) -> bool:
    """Whether the outputs of this loss or divergence are exponentiated without a normalizer."""
    return name.startswith("gaussian") or name.endswith("poisson")


def output_shape(name: str, rng: np.random.Generator) -> tuple[int, int]:
    """(N, C) up to (4, 4), with an even C for means and log sigmas."""
    N, C = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    return N, C + C % 2 if name.startswith("gaussian") else C


def outputs(name: str, shape: tuple[int, int], spread: float, rng: np.random.Generator) -> Array:
    """Normal outputs, (N, C), of the given spread; a tenth of it for exponents."""
    return spread * (0.1 if exponentiated(name) else 1.0) * rng.standard_normal(shape)


def targets(loss: Loss, shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """Labels, bits, counts, or normal targets for outputs of `shape`."""
    N, C = shape
    if isinstance(loss, CrossEntropy):
        return rng.integers(C, size=N)
    if isinstance(loss, BinaryCrossEntropy):
        return rng.integers(2, size=shape).astype(float)
    if isinstance(loss, PoissonLoss):
        return rng.poisson(2.0, size=shape).astype(float)
    return rng.standard_normal((N, C // 2) if isinstance(loss, GaussianNLL) else shape)
