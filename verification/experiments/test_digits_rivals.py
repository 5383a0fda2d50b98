"""The two tracks: what is searched and what is not, and the settings that APO brings."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from experiments.digits_rivals import DigitsRivals, methods
from experiments.models import mlp
from experiments.problems import Supervised
from experiments.seeds import generator
from experiments.self_tuned import SETTINGS, Rule, SelfTuned
from experiments.tuning import FIRST_TUNING_SEED
from verification.tolerances import ROUNDING, assert_close

RATE = 1e-3
STEPS = 6


@pytest.mark.parametrize("rule", SETTINGS)
def test_with_a_meta_rate_of_zero_it_is_torchs_optimizer_with_relaxed_steps(rule: Rule) -> None:
    source = generator(5, "task")
    data = (
        torch.randn(24, 4, generator=source, dtype=torch.float64),
        torch.randint(0, 3, (24,), generator=source),
    )
    sigma = SETTINGS[rule].update_scale
    # a trust region keeps the first K steps below twice the first, which momentum goes beyond
    recipe = SelfTuned(rule, lr=RATE, meta_lr=0.0, update_scale=sigma, trust_factor=None)
    ends = []
    for ours in (True, False):
        problem = Supervised(data, data, "cross_entropy", batch_size=8, seed=1)
        model = mlp((4, 5, 3), seed=0, dtype=torch.float64)
        peer = _torch(rule, model, RATE * sigma)
        optimizer = recipe.build(model, problem) if ours else peer
        for _ in range(STEPS):
            batch = problem.batch("loss")
            optimizer.zero_grad()
            problem.loss(model, batch).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy())
    # a step is a handful of operations an entry, and carries what the one before left
    assert_close(ends[0], ends[1], ROUNDING, size=8, iterations=STEPS**2, scale=1.0)


def _torch(rule: Rule, model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    params = model.parameters()
    if rule == "RMSprop":
        return torch.optim.RMSprop(params, lr)
    if rule == "Adam":
        return torch.optim.Adam(params, lr)
    return torch.optim.SGD(params, lr, momentum=0.9 if rule == "SGDm" else 0.0)


def test_nothing_is_searched_on_the_self_tuning_track() -> None:
    """Each default once a seed; each tuned grid of five with two tuning seeds, to begin with."""
    trials = DigitsRivals().plan("default", None, [])
    tuned, own = methods(720)
    counts = Counter((t.label, t.seed >= FIRST_TUNING_SEED) for t in trials)
    assert counts == {(m.label, False): 5 for m in own} | {(m.label, True): 10 for m in tuned}
