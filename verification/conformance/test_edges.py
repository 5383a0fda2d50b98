"""The kit at its edges: models too large for a dense matrix, claims that few rules can make."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, final

import pytest
import torch
from torch import Tensor, nn

import apo_core as apo
from apo_core.testing import check_update_rule
from apo_core.testing.suite import perceptron


@final
class SignDescent(apo.UpdateRule):
    """θ' − θ = −η sign(g)."""

    claims = frozenset({"scale invariant", "descent"})

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.log_lr = nn.Parameter(next(model.parameters()).new_zeros(()))
        self.elementwise = True

    def init_state(self, params: list[Tensor]) -> dict[str, list[Tensor]]:
        """No memory."""
        return {}

    def forward(
        self, params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]]
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """−η sign(g), and no state."""
        return [-self.log_lr.exp() * g.sign() for g in grads], state


@final
class Listed(apo.UpdateRule):
    """θ' − θ = −g exp(rates.0), the one entry, number 0, of a list of logarithms."""

    claims = frozenset()

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.rates = nn.ParameterList([next(model.parameters()).new_zeros(())])

    def init_state(self, params: list[Tensor]) -> dict[str, list[Tensor]]:
        """No memory."""
        return {}

    def forward(
        self, params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]]
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """−exp(rates.0) g, and no state."""
        return [-self.rates[0].exp() * g for g in grads], state


@final
class Secretive(apo.UpdateRule):
    """θ' − θ = −η g, which saves what is neither a tensor nor a number."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.log_lr = nn.Parameter(next(model.parameters()).new_full((), -3.0))

    def init_state(self, params: list[Tensor]) -> dict[str, list[Tensor]]:
        """No memory."""
        return {}

    def forward(
        self, params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]]
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """−η g, and no state."""
        return [-self.log_lr.exp() * g for g in grads], state

    def get_extra_state(self) -> object:
        """A path, which no load that trusts weights alone reads."""
        return PurePath("somewhere")

    def set_extra_state(self, state: object) -> None:
        """Nothing."""


@final
class WithEmpty(nn.Module):
    """w x and a parameter of no entry, as a layer without neurons has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.none = nn.Parameter(torch.ones(0, dtype=torch.float64))


def test_sign_descent_is_scale_invariant() -> None:
    results = check_update_rule(SignDescent, perceptron(), checks=["scale invariance", "descent"])
    assert {result.outcome for result in results.values()} == {"passed"}


def test_a_parameter_without_entries_is_no_obstacle() -> None:
    results = check_update_rule(SignDescent, WithEmpty(), checks=["elementwise"])
    assert results["elementwise"].outcome == "passed"


def test_a_phi_in_a_list_is_documented_by_the_rule_that_holds_the_list() -> None:
    results = check_update_rule(Listed, perceptron(), checks=["documentation"])
    assert results["documentation"].outcome == "passed"


def test_a_state_that_only_a_trusting_load_reads_is_refused() -> None:
    with pytest.raises(AssertionError, match="must load with weights_only=True, got something"):
        check_update_rule(Secretive, perceptron(), checks=["resume"])


@pytest.mark.parametrize(
    ("check", "claim", "structure", "reason"),
    [
        ("psd", "psd", apo.Diagonal, "the model has 625 parameters; use one of at most 600"),
        ("dense", "psd", apo.Diagonal, "the model has more than 600 parameters"),
        (
            "rotation equivariance",
            "rotation equivariant",
            apo.Scalar,
            "a parameter has more than 600 entries",
        ),
        (
            "optimum",
            "linear in phi",
            apo.Dense,
            "φ has 390625 entries; use a model for which it has 600",
        ),
    ],
)
def test_what_needs_a_dense_matrix_is_skipped_for_a_large_model(
    check: str, claim: str, structure: Any, reason: str
) -> None:
    model = nn.Linear(25, 25, bias=False, dtype=torch.float64)

    def build(model: nn.Module) -> apo.UpdateRule:
        rule = apo.rules.Preconditioned(model, structure)
        rule.claims = frozenset({claim})
        return rule

    result = check_update_rule(build, model, checks=[check])[check]
    assert (result.outcome, result.reason) == ("skipped", reason)
