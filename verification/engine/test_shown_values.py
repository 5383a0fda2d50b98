"""What users read: φ as a rule shows it, the counters, and which parameters a structure takes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import apo_core as apo
from verification import bridge
from verification.profiles import share
from verification.tolerances import FUNCTION, assert_close

SHOWN: dict[str, Callable[[nn.Module, float, bool], apo.UpdateRule]] = {
    "SGD.lr": lambda m, x, each: apo.rules.SGD(m, lr=x, per_layer=each),
    "RMSprop.lr": lambda m, x, each: apo.rules.RMSprop(m, lr=x, per_layer=each),
    "RMSprop.rho": lambda m, x, each: apo.rules.RMSprop(m, rho=x, learn=("rho",), per_layer=each),
    "RMSprop.eps": lambda m, x, each: apo.rules.RMSprop(m, eps=x, learn=("eps",), per_layer=each),
    "Adam.lr": lambda m, x, each: apo.rules.Adam(m, lr=x, per_layer=each),
    "Adam.eps": lambda m, x, each: apo.rules.Adam(m, eps=x, learn=("eps",), per_layer=each),
    "KFAC.lr": lambda m, x, each: apo.rules.KFAC(m, lr=x, per_layer=each),
    "KFAC.damping": lambda m, x, each: apo.rules.KFAC(m, damping=x, per_layer=each),
}


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("name", SHOWN)
@share(0.25)
@given(value=st.floats(1e-6, 0.9))
def test_a_rule_shows_what_it_was_given_without_a_graph(
    name: str, per_layer: bool, value: float
) -> None:
    """exp(log x), which loses |log x| ulp: the logarithm's own rounding is absolute in the root."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    shown = getattr(SHOWN[name](model, value, per_layer), name.split(".")[1])
    assert not shown.requires_grad
    expected = torch.full((2,) if per_layer else (), value, dtype=torch.float64)
    # |log 1e-6| < 14 is the condition of exp at its argument.
    assert_close(bridge.array(shown), expected.numpy(), FUNCTION, condition=14.0, what=name)


@given(value=st.floats(1e-6, 0.9))
def test_the_rule_of_any_optimizer_shows_a_rate_for_each_group_without_a_graph(
    value: float,
) -> None:
    model = nn.Linear(3, 2).double()
    groups = [{"params": [p], "lr": value * k} for k, p in enumerate(model.parameters(), 1)]
    shown = apo.rules.LearningRate(model, torch.optim.SGD(groups)).lr
    assert not shown.requires_grad
    expected = value * np.array([1.0, 2.0])
    assert_close(bridge.array(shown), expected, FUNCTION, condition=14.0, what="lr")


LINEAR, NORM = nn.Linear(3, 2), nn.LayerNorm(3)
MATRICES = (apo.EKFAC, apo.Kronecker, apo.BlockEKFAC, apo.OneSided)
ALL = (apo.Scalar, apo.Diagonal, apo.Dense, apo.BlockDiagonal, apo.LowRank)


@pytest.mark.parametrize("structure", [*MATRICES, *ALL, apo.Stacked, apo.EmbeddingEKFAC])
def test_a_structure_says_which_parameters_it_takes(structure: type[apo.Preconditioner]) -> None:
    """Matrix structures the weights of layers, tables their own, `Stacked` what a policy gives."""
    taken = [
        structure.accepts(LINEAR, LINEAR.weight),
        structure.accepts(LINEAR, LINEAR.bias),
        structure.accepts(NORM, NORM.weight),
        structure.accepts(table := nn.Embedding(5, 3), table.weight),
    ]
    if structure in ALL:
        assert taken == [True] * 4
    elif structure in MATRICES:
        assert taken == [True, False, False, False]
    else:
        assert taken == [False, False, False, structure is apo.EmbeddingEKFAC]


@pytest.mark.parametrize("solver", ["RMSprop", "LBFGS"])
def test_a_meta_step_counts_once_however_often_it_evaluates_Q(solver: str) -> None:
    model = nn.Linear(2, 1, dtype=torch.float64)
    rule = apo.rules.SGD(model, lr=0.1)
    objective = apo.ProximalObjective("squared_error", fsd_weight=0.1)
    meta_optimizer = getattr(torch.optim, solver)(rule.parameters(), lr=0.1)
    optimizer = apo.APO(model, rule, objective, meta_optimizer)
    x, calls = torch.ones(3, 2, dtype=torch.float64), []

    def loss() -> torch.Tensor:
        calls.append(1)
        return model(x).square().mean()

    loss().backward()
    for done in range(1, 4):
        optimizer.meta_step(loss=loss, outputs=lambda: model(x))
        assert (optimizer.meta_steps, optimizer.steps) == (done, 0)
    assert (len(calls) > 4) == (solver == "LBFGS")
