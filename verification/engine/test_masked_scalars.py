"""Outputs that are one number for each example or position, with a mask and without."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import apo_core as apo
from verification.engine.scenes import Quadratic
from verification.tolerances import ROUNDING, assert_close


@given(seed=st.integers(0, 2**16), batch=st.integers(1, 3), tokens=st.integers(1, 4))
def test_a_masked_discrepancy_of_numbers_is_their_weighted_mean(
    seed: int, batch: int, tokens: int
) -> None:
    """Σ w ½(z − z₀)² / Σ w, whatever stands where w = 0."""
    torch.manual_seed(seed)
    z, z0 = torch.randn(2, batch, tokens, dtype=torch.float64)
    w = torch.rand(batch, tokens, dtype=torch.float64) * (torch.rand(batch, tokens) < 0.7)
    w[0, 0] = 0.5
    terms = [
        a * 0.5 * (b - c) ** 2
        for a, b, c in zip(*(t.flatten().tolist() for t in (w, z, z0)), strict=True)
    ]
    expected = np.array(math.fsum(terms) / math.fsum(w.flatten().tolist()))
    z[w == 0] = torch.nan
    found = apo.SquaredEuclidean().masked(z, z0, w)
    assert_close(found.numpy(), expected, ROUNDING, size=2 * batch * tokens)


def test_outputs_may_be_one_number_an_example() -> None:
    """λ_FSD times the mean of ½(z − z₀)², with z = θ and θ' = θ − ηhθ."""
    model = Quadratic([1.0, 3.0])
    rule = apo.rules.SGD(model, 0.1)
    objective = apo.ProximalObjective("squared_error", 0.5)
    optimizer = apo.APO(model, rule, objective, torch.optim.SGD(rule.parameters(), 0.1))
    model.loss().backward()
    terms = optimizer.meta_step(loss=model.loss, outputs=lambda: 1.0 * model.theta)
    expected = 0.5 * 0.5 * (0.1**2 + 0.3**2) / 2.0
    # z − z₀ is known to the rounding of z, which is 10 times the difference.
    assert_close(terms.fsd.numpy(), np.array(expected), ROUNDING, size=4, condition=20.0)
