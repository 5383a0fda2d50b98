"""The trust region: how its radius is set, and that a bad gradient alone does not shrink it."""

import pytest
import torch

import apo_core as apo
from verification.engine.scenes import Quadratic, scene, values
from verification.tolerances import ROUNDING, assert_close


@pytest.mark.parametrize("rule", ["sgd", "adamw", "ekfac"])
def test_the_radius_is_twice_the_distance_that_all_parameters_went(rule: str) -> None:
    s = scene(rule, objective=apo.ProximalObjective("kl", 0.3, 0.1, trust_factor=1.5))
    s.backward()
    s.meta_step()
    before = values(s.model)
    s.optimizer.step()
    moved = [(a - b).flatten() for a, b in zip(values(s.model), before, strict=True)]
    length = torch.cat(moved).norm()
    # θ' − θ is known to the rounding of θ.
    scale = float(length + sum(v.norm() for v in before))
    size = sum(v.numel() for v in before)
    assert_close(
        s.optimizer.trust.radius.numpy(), 2.0 * length.numpy(), ROUNDING, size=size, scale=scale
    )


def test_a_gradient_that_is_not_finite_leaves_the_step_scale() -> None:
    """The loss is finite, and so would be a search for a shorter step: none is made."""
    s = scene("sgd", objective=apo.ProximalObjective("kl", 0.3, 0.1, trust_factor=1.5))
    s.backward()
    first = next(s.model.parameters()).grad
    assert first is not None
    first.view(-1)[0] = torch.nan
    s.optimizer.trust.scale = 0.25
    with pytest.warns(RuntimeWarning, match="a meta-step was skipped since the gradient of"):
        s.meta_step()
    assert s.optimizer.trust.scale == 0.25


def test_an_overflowing_lookahead_shortens_the_step_and_skips_nothing() -> None:
    """exp(θ²) overflows at θ' = 1 − 2e5 e, and not at a shorter step."""
    model = Quadratic([1.0])

    def loss() -> torch.Tensor:
        return model.theta.square().exp().sum()

    rule = apo.rules.SGD(model, 1e5)
    objective = apo.ProximalObjective(trust_factor=1.1)
    solver = torch.optim.SGD(rule.parameters(), 0.01)
    optimizer = apo.APO(model, rule, objective, solver)
    loss().backward()
    terms = optimizer.meta_step(loss=loss)
    assert float(terms.loss) <= 1.1 * float(loss().detach())
    assert (optimizer.meta_steps, optimizer.skipped_meta_steps) == (1, 0)
    assert optimizer.trust.scale < 1e-4
