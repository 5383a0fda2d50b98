"""A run that is saved at any step and loaded elsewhere goes on bit for bit."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verification.engine.scenes import RULES, scene, values
from verification.profiles import share


@pytest.mark.parametrize("rule", RULES)
@share(0.4)
@given(at=st.integers(0, 7), warmup_steps=st.one_of(st.none(), st.integers(0, 5)))
def test_a_loaded_run_is_the_saved_one(rule: str, at: int, warmup_steps: int | None) -> None:
    first = scene(rule, warmup_steps=warmup_steps)
    first.run(at)
    file = io.BytesIO()
    checkpoint = {
        "model": first.model.state_dict(),
        "optimizer": first.optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(checkpoint, file)
    first.run(4)

    second = scene(rule, seed=1, warmup_steps=warmup_steps)
    second.y = first.y
    second.run(1)  # so that there is something to overwrite
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    second.model.load_state_dict(loaded["model"])
    second.optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["random"])
    second.run(4)

    assert second.optimizer.steps == first.optimizer.steps == at + 4
    assert second.optimizer.meta_steps == first.optimizer.meta_steps
    assert all(map(torch.equal, values(first.model), second.model.parameters()))
    assert all(map(torch.equal, values(first.optimizer.rule), second.optimizer.rule.parameters()))
    assert all(map(torch.equal, first.model.buffers(), second.model.buffers()))


def test_loading_does_not_share_or_change_the_dictionary() -> None:
    s = scene("nesterov")
    s.run(3)
    saved = s.optimizer.state_dict()
    momentum = [v.clone() for v in saved["rule_state"]["momentum"]]
    keys = set(saved)
    t = scene("nesterov", seed=1)
    t.optimizer.load_state_dict(saved)
    t.run(3)
    assert set(saved) == keys
    assert all(map(torch.equal, momentum, saved["rule_state"]["momentum"]))


def test_a_foreign_state_dict_is_refused() -> None:
    s = scene()
    foreign = torch.optim.SGD(s.model.parameters(), lr=0.1).state_dict()
    with pytest.raises(
        ValueError, match=r"`state_dict` must come from APO.state_dict\(\), got one"
    ):
        s.optimizer.load_state_dict(foreign)
    warm = scene(warmup_steps=2).optimizer.state_dict()
    with pytest.raises(ValueError, match="must be loaded with a warm-up exactly if it was saved"):
        s.optimizer.load_state_dict(warm)
