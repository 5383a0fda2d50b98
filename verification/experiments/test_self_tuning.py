"""`apo.self_tuning` has the settings that the experiments measured."""

from __future__ import annotations

import pytest
import torch

import apo_core as apo
from apo_core.self_tuning import SETTINGS as ENGINE
from apo_core.self_tuning import Rule
from experiments.models import mlp
from experiments.problems import Supervised
from experiments.seeds import generator
from experiments.self_tuned import SETTINGS as MEASURED
from experiments.training import train


def _problem() -> Supervised:
    source = generator(7, "task")
    data = (torch.randn(60, 5, generator=source), torch.arange(60) % 3)
    return Supervised(data, data, "cross_entropy", batch_size=16, seed=3)


@pytest.mark.parametrize("rule", ENGINE)
def test_the_engine_trains_as_the_measured_recipe_does(rule: Rule) -> None:
    """Bit for bit, over four meta-steps."""
    models = [mlp((5, 8, 3), seed=1) for _ in range(2)]
    recipe, problem = MEASURED[rule], _problem()
    for model, optimizer, own in (
        (models[0], recipe.build(models[0], problem), problem),
        (models[1], apo.self_tuning(models[1], rule), _problem()),
    ):
        outcome = train(model, optimizer, own, steps=40, record_every=40)
        assert outcome.metrics["loss"] < outcome.curves["loss"][0]
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(one, other)


def test_adam_has_no_setting_that_holds() -> None:
    assert set(MEASURED) - set(ENGINE) == {"Adam"}
    with pytest.raises(ValueError, match=r"`rule` must be one of SGD, SGDm, RMSprop, got 'Adam'"):
        apo.self_tuning(mlp((5, 3), seed=1), "Adam")  # type: ignore[arg-type]
