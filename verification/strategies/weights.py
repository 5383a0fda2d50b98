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
    """λ = 10^decade with a uniform decade, and 0 where `zero`; shrinks to 0, else to 1.

    Decades are drawn in hundredths: Hypothesis draws integers of a small range uniformly, and
    floats mostly near the bounds and near 0.
    """
    hundredths = st.integers(round(100 * min_decade), round(100 * max_decade))
    positive = hundredths.map(lambda decade: 10.0 ** (decade / 100))
    return st.one_of(st.just(0.0), positive) if zero else positive


@st.composite
def proximity_weights(
    draw: st.DrawFn,
    *,
    fsd_zero: bool = True,
    wsd_zero: bool = True,
    both_zero: bool = True,
    decades: tuple[float, float] = (-4.0, 2.0),
) -> ProximityWeights:
    """A pair (λ_FSD, λ_WSD).

    Args:
        draw: given by Hypothesis.
        fsd_zero: whether λ_FSD may vanish.
        wsd_zero: whether λ_WSD may vanish.
        both_zero: whether they may vanish together.
        decades: log10 of the least and the largest positive λ.
    """
    least, most = decades

    def one(zero: bool) -> st.SearchStrategy[float]:
        return weights(min_decade=least, max_decade=most, zero=zero)

    fsd = draw(one(fsd_zero), label="λ_FSD")
    wsd = draw(one(wsd_zero and (both_zero or fsd > 0.0)), label="λ_WSD")
    return ProximityWeights(fsd, wsd)
