"""Both passes of a meta-step at θ' see the random draws that a pass at its beginning would see."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

import apo_core as apo
from verification.engine.scenes import scene
from verification.tolerances import FUNCTION, assert_close


@pytest.mark.parametrize("fsd", ["exact", "quadratic"])
def test_the_loss_at_the_lookahead_has_the_dropout_mask_of_a_first_pass(fsd: str) -> None:
    """Also after the passes on B' at θ, by whose draws the random state has moved on."""
    objective = apo.ProximalObjective("kl", 0.3, 0.0, fsd=fsd)  # pyright: ignore[reportArgumentType]
    s = scene(objective=objective, meta_lr=0.0)
    s.backward()
    state = torch.get_rng_state()
    terms = s.meta_step()
    theta = [p.detach().clone() for p in s.model.parameters()]

    torch.set_rng_state(state)
    z0 = s.outputs()
    with torch.no_grad():
        for p in s.model.parameters():
            assert p.grad is not None
            p -= s.lr * p.grad
    torch.set_rng_state(state)
    expected = s.loss()
    torch.set_rng_state(state)
    z = s.outputs()
    with torch.no_grad():
        for p, before in zip(s.model.parameters(), theta, strict=True):
            p.copy_(before)
    assert_close(terms.loss.numpy(), expected.detach().numpy(), FUNCTION, size=20, what="loss")
    if fsd == "exact":
        ahead, here = log_softmax(z, -1), log_softmax(z0, -1)
        kl = 0.3 * kl_div(here, ahead, reduction="batchmean", log_target=True)
        # A sum of terms of either sign, each of the size of the outputs' logarithms.
        scale = float(0.3 * ahead.detach().abs().max())
        assert_close(terms.fsd.numpy(), kl.detach().numpy(), FUNCTION, size=20, scale=scale)
        assert not torch.equal(s.outputs(), s.outputs()), "the masks must differ from draw to draw"
