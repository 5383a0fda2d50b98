"""The discrepancies for outputs of any number and size, by name: to parametrize over or to draw.

All have curvature in bounded multiples of the distance, which the rounding bounds of a pass count
on. Those that exponentiate their outputs are in `ALL_DISCREPANCIES` alone.
"""

from __future__ import annotations

from hypothesis import strategies as st

from reference.discrepancies import (
    BernoulliKL,
    Bregman,
    CategoricalKL,
    Discrepancy,
    SquaredEuclidean,
)

DISCREPANCIES: dict[str, Discrepancy] = {
    "squared-error": SquaredEuclidean(),
    "squared-error-without-half": SquaredEuclidean(half=False),
    "kl-lookahead-current": CategoricalKL("lookahead_current"),
    "kl-current-lookahead": CategoricalKL("current_lookahead"),
    "bregman-squared-error": Bregman("squared_error"),
    "bregman-cross-entropy": Bregman("cross_entropy"),
    "bernoulli-kl-lookahead-current": BernoulliKL("lookahead_current"),
    "bernoulli-kl-current-lookahead": BernoulliKL("current_lookahead"),
    "bregman-binary-cross-entropy": Bregman("binary_cross_entropy"),
}


def discrepancies() -> st.SearchStrategy[Discrepancy]:
    """One of them; shrinks to the squared error."""
    return st.sampled_from(list(DISCREPANCIES)).map(DISCREPANCIES.__getitem__)
