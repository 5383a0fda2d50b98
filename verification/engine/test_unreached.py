"""A parameter that neither the loss nor the outputs reach is not there, as far as Q can tell."""

from collections.abc import Callable
from typing import final

import pytest
import torch
from torch import Tensor, nn

import apo_core as apo
from apo_core.functional import meta_objective
from apo_core.types import State
from verification.engine.scenes import MODES
from verification.tolerances import FUNCTION, ROUNDING, assert_close


@final
class Reached(nn.Module):
    """J = ⟨exp θ, 1⟩ and outputs tanh θ; `idle` is used by neither."""

    def __init__(self, idle: bool) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.3, -0.5], dtype=torch.float64))
        if idle:
            self.idle = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def loss(self) -> Tensor:
        """J at the present parameters."""
        return self.theta.exp().sum()

    def outputs(self) -> Tensor:
        """One example of two outputs."""
        return self.theta.tanh()[None]


def adam_without_history(model: nn.Module) -> apo.UpdateRule:
    """Adam whose lookahead is its first step: the state after it is more than the one before."""
    rule = apo.rules.Adam(model, 0.2)
    rule.lookahead_from_state = False
    return rule


@pytest.mark.parametrize("build", [lambda m: apo.rules.SGD(m, 0.2), adam_without_history])
@pytest.mark.parametrize(("loss", "fsd"), MODES)
def test_an_idle_parameter_changes_no_term_and_no_meta_gradient(
    loss: str, fsd: str, build: Callable[[nn.Module], apo.UpdateRule]
) -> None:
    found = []
    for idle in (False, True):
        model = Reached(idle)
        rule = build(model)
        objective = apo.ProximalObjective("squared_error", 0.3, 0.1, loss, fsd)  # pyright: ignore[reportArgumentType]
        solver = torch.optim.SGD(rule.parameters(), 0.1)
        optimizer = apo.APO(model, rule, objective, solver)
        model.loss().backward()
        terms = optimizer.meta_backward(loss=model.loss, outputs=model.outputs)
        slope = rule.get_parameter("log_lr").grad
        assert slope is not None
        found.append(torch.stack([*terms, slope]).numpy())
    # The sums of squares have three more terms, all of them 0.
    assert_close(found[1], found[0], ROUNDING, size=5)


@final
class TwoRates(apo.UpdateRule):
    """Δ = −exp(φ) g; `idle` is used by no update."""

    def __init__(self) -> None:
        super().__init__()
        self.log_lr = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
        self.idle = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def init_state(self, params: list[Tensor]) -> State:
        """None."""
        return {}

    def forward(
        self, params: list[Tensor], grads: list[Tensor], state: State
    ) -> tuple[list[Tensor], State]:
        """Δ, and no state."""
        return [-self.log_lr.exp() * g for g in grads], state


def test_a_phi_that_no_update_reaches_is_named() -> None:
    """Also where the update reaches another one, so that there is something to differentiate."""
    model, rule = Reached(False), TwoRates()
    solver = torch.optim.SGD(rule.parameters(), 0.1)
    optimizer = apo.APO(model, rule, apo.ProximalObjective(), solver)
    model.loss().backward()
    with pytest.raises(RuntimeError, match=r"of TwoRates must be .* does not depend on `idle`"):
        optimizer.meta_step(loss=model.loss)


def test_a_functional_objective_without_an_fsd_needs_no_outputs() -> None:
    model = Reached(False)
    rule = apo.rules.SGD(model, 0.1)
    params = {name: p.detach() for name, p in model.named_parameters()}
    grads = {name: p.exp() for name, p in params.items()}
    q = meta_objective(
        {},
        params,
        grads,
        rule=rule,
        objective=apo.ProximalObjective(),
        loss=lambda theta: theta["theta"].exp().sum(),
    )
    theta = params["theta"]
    expected = (theta - 0.1 * theta.exp()).exp().sum()
    assert_close(q.detach().numpy(), expected.numpy(), FUNCTION, size=2, condition=2.0)
