"""Every discrepancy of the oracle, by name: a finite set, to parametrize over or to draw from."""

from __future__ import annotations

from hypothesis import strategies as st

from reference.discrepancies import Bregman, CategoricalKL, Discrepancy, SquaredEuclidean

DISCREPANCIES: dict[str, Discrepancy] = {
    "squared-error": SquaredEuclidean(),
    "squared-error-without-half": SquaredEuclidean(half=False),
    "kl-lookahead-current": CategoricalKL("lookahead_current"),
    "kl-current-lookahead": CategoricalKL("current_lookahead"),
    "bregman-squared-error": Bregman("squared_error"),
    "bregman-cross-entropy": Bregman("cross_entropy"),
}


def discrepancies() -> st.SearchStrategy[Discrepancy]:
    """One of them; shrinks to the squared error."""
    return st.sampled_from(list(DISCREPANCIES)).map(DISCREPANCIES.__getitem__)
