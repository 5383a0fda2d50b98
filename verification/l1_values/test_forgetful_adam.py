"""Adam whose averages forget at once, on a model of one parameter: torch.optim's Adam again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import apo_core as apo
from verification.engine.scenes import Quadratic
from verification.profiles import share
from verification.tolerances import FUNCTION, assert_close


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.0), (0.0, 0.0)])
@share(0.5)
@given(seed=st.integers(0, 2**16), size=st.integers(1, 3))
def test_a_beta_of_zero_is_no_average(betas: tuple[float, float], seed: int, size: int) -> None:
    """1 − 0ᵗ = 1 at every t: nothing is left over, and no logarithm of 0 shows."""
    torch.manual_seed(seed)
    models = [Quadratic([1.0] * size) for _ in range(2)]
    rule = apo.rules.Adam(models[0], 0.1, betas, eps=1e-3)
    ours = apo.APO(
        models[0], rule, apo.ProximalObjective(), torch.optim.SGD(rule.parameters(), 0.0)
    )
    theirs = torch.optim.Adam(models[1].parameters(), 0.1, betas, eps=1e-3)
    steps = 3
    for _ in range(steps):
        g = torch.randn(size, dtype=torch.float64)
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            model.theta.grad = g.clone()
            optimizer.step()
    theta, expected = (model.theta.detach().numpy() for model in models)
    # θ stays near 1, a step is 0.1 times a ratio whose denominator may be as small as eps.
    assert_close(theta, expected, FUNCTION, size=4, iterations=steps, condition=10.0)
