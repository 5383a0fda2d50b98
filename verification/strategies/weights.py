"""λ_FSD and λ_WSD, on a log scale, zero included."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st


class ProximityWeights(NamedTuple):
    """λ_FSD and λ_WSD, non-negative."""

    fsd: float
    wsd: float


def weights(
    *, min_decade: float = -4.0, max_decade: float = 2.0, zero: bool = True
) -> st.SearchStrategy[float]:
    """λ = 10^decade with a uniform decade, and 0 where `zero`; shrinks to 0, else to 1."""
    positive = st.floats(min_decade, max_decade).map(lambda decade: 10.0**decade)
    return st.one_of(st.just(0.0), positive) if zero else positive


@st.composite
def proximity_weights(
    draw: st.DrawFn, *, fsd_zero: bool = True, wsd_zero: bool = True, both_zero: bool = True
) -> ProximityWeights:
    """A pair (λ_FSD, λ_WSD).

    Args:
        draw: given by Hypothesis.
        fsd_zero: whether λ_FSD may vanish.
        wsd_zero: whether λ_WSD may vanish.
        both_zero: whether they may vanish together.
    """
    fsd = draw(weights(zero=fsd_zero), label="λ_FSD")
    wsd = draw(weights(zero=wsd_zero and (both_zero or fsd > 0.0)), label="λ_WSD")
    return ProximityWeights(fsd, wsd)
