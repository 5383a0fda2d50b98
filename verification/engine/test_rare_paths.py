"""Paths that ordinary cases do not take: no FSD, a state with holes, a step far too long."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import apo_core as apo
from verification.engine.scenes import Quadratic
from verification.tolerances import FUNCTION, assert_close


@given(seed=st.integers(0, 2**16), log_lr=st.floats(-5.0, 0.0), wsd_weight=st.floats(0.0, 2.0))
def test_q_of_a_linear_loss_without_fsd_is_a_parabola_in_the_rate(
    seed: int, log_lr: float, wsd_weight: float
) -> None:
    """Q = −η ‖g‖² + λ_WSD/2 η² ‖g‖², and no pass of the model is asked for."""
    torch.manual_seed(seed)
    model = nn.Linear(3, 2, dtype=torch.float64)
    theta = {name: p.detach() for name, p in model.named_parameters()}
    grads = {name: torch.randn_like(p) for name, p in theta.items()}

    def unused(*_: object) -> Tensor:
        raise AssertionError("no pass is needed")

    Q = apo.meta_objective(
        {"log_lr": torch.tensor(log_lr, dtype=torch.float64)},
        theta,
        grads,
        rule=apo.rules.SGD(model),
        objective=apo.ProximalObjective(fsd_weight=0.0, wsd_weight=wsd_weight, loss="linear"),
        loss=unused,
    )
    eta, square = np.exp(log_lr), sum(float(g.square().sum()) for g in grads.values())
    expected = (-eta + 0.5 * wsd_weight * eta**2) * square
    # η = exp(log η) enters twice in the second addend; the sums have eight terms.
    scale = (eta + wsd_weight * eta**2) * square
    assert_close(float(Q), np.float64(expected), FUNCTION, size=8, scale=scale, what="Q")


class Patchy(torch.optim.Optimizer):
    """A third party's: a memory for matrices alone, with a note in it that is no number."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "note": "a group's words"})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """θ ← θ − lr (g + the last g of a matrix)."""
        for group in self.param_groups:
            for p in group["params"]:
                move = p.grad.clone()
                if p.dim() > 1:
                    move += self.state[p].get("last", torch.zeros_like(p))
                    self.state[p].update(last=p.grad.clone(), note="a parameter's words")
                p.sub_(group["lr"] * move)


def test_an_optimizer_may_remember_some_parameters_only_and_words_beside_numbers() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(2, 2, dtype=torch.float64) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    rule = apo.rules.LearningRate(ours, Patchy(ours.parameters(), 0.1))
    solver = torch.optim.SGD(rule.parameters(), lr=0.0)
    optimizer = apo.APO(ours, rule, apo.ProximalObjective(), solver)
    base = Patchy(theirs.parameters(), 0.1)
    for number in range(3):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.meta_step(loss=lambda: ours(torch.ones(2, dtype=torch.float64)).sum())
        optimizer.step()
        base.step()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            # θ + (θ' − θ) rounds once more than θ' itself; the learning rate is exp(log η).
            assert_close(
                one.detach().numpy(),
                other.detach().numpy(),
                FUNCTION,
                size=4,
                iterations=number + 1,
                scale=1.0,
                what=f"θ after step {number + 1}",
            )


def test_a_step_that_a_hundred_halvings_do_not_shorten_enough_is_shortened_by_the_next() -> None:
    """From θ = 1 with h = 1, η = 2²⁰⁰: ½(1 − sη)² ≤ 2·½ where sη ≤ 1 + √2, at s = 2⁻¹⁹⁹."""
    model = Quadratic([1.0])
    rule = apo.rules.SGD(model, 2.0**200)
    solver = torch.optim.SGD(rule.parameters(), lr=0.0)
    optimizer = apo.APO(model, rule, apo.ProximalObjective(trust_factor=2.0), solver)
    model.loss().backward()
    scales = []
    for _ in range(2):
        optimizer.meta_step(loss=model.loss)
        scales.append(optimizer.trust.scale)
    assert scales == [2.0**-100, 2.0**-199]
