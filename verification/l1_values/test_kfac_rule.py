"""K-FAC's step and its derivatives in the learning rate and the damping, against the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import apo_core as apo
from apo_core.testing import check_update_rule
from reference.arrays import Array, unvec, vec
from reference.curvature import KFACFactors, ekfac_basis, exact_damped_inverse
from verification import bridge
from verification.l1_values.kfac_cases import LAYERS, factors_of, halved_square, observed
from verification.profiles import share
from verification.tolerances import COMPLEX_STEP, FUNCTION, SOLVE, assert_close

seeds = st.integers(0, 2**16)
decades = st.integers(-6, 2)


def matrix(tensors: Sequence[Tensor]) -> Array:
    """V, (out, in): a layer's weight as a matrix, with its bias as the last column."""
    return bridge.array(torch.cat([t.reshape(len(t), -1) for t in tensors], 1))


def oracle_factors(rule: apo.rules.KFAC) -> list[KFACFactors]:
    """The averages that the rule holds, for the oracle."""
    return [
        KFACFactors(bridge.array(f.A.double()), bridge.array(f.B.double()))
        for f in factors_of(rule)
    ]


def condition(factors: KFACFactors, damping: float) -> float:
    """Of A ⊗ B + γI."""
    largest = float(np.linalg.norm(factors.A, 2) * np.linalg.norm(factors.B, 2))
    return (largest + damping) / damping


def dense_step(factors: KFACFactors, V: Array, lr: float, damping: float) -> Array:
    """−η (A ⊗ B + γI)⁻¹ vec V, by the oracle's dense inverse, as (out, in)."""
    return unvec(-lr * exact_damped_inverse(factors, damping) @ vec(V), V.shape)


def one_layer(
    name: str, bias: bool, seed: int, lr: float, damping: float
) -> tuple[nn.Module, apo.rules.KFAC, list[Tensor]]:
    """A layer of `LAYERS`, its rule after one mini-batch, and the gradients of another loss."""
    torch.manual_seed(seed)
    build, shape = LAYERS[name]
    layer, x = build(bias).double(), torch.randn(shape, dtype=torch.float64)
    rule = apo.rules.KFAC(layer, lr=lr, damping=damping)
    with rule.observe(layer):
        halved_square(layer(x)).backward()
    return layer, rule, [torch.randn_like(p) for p in layer.parameters()]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
@share(0.15)
@given(seed=seeds, decade=decades)
def test_the_step_is_the_dense_inverse(name: str, bias: bool, seed: int, decade: int) -> None:
    """(A ⊗ B + γI)⁻¹ g: the damping is added to the product, not to each factor."""
    lr, damping = 0.3, 10.0**decade
    layer, rule, grads = one_layer(name, bias, seed, lr, damping)
    updates, state = rule(list(layer.parameters()), grads, {})
    (factors,) = oracle_factors(rule)
    assert state == {}
    assert_close(
        matrix([u.detach() for u in updates]),
        dense_step(factors, matrix(grads), lr, damping),
        SOLVE,
        condition=condition(factors, damping),
        what="step",
    )


@pytest.mark.parametrize("learn", [("lr",), ("damping",), ("lr", "damping")])
@pytest.mark.parametrize("per_layer", [False, True])
@share(0.3)
@given(seed=seeds, decade=decades)
def test_the_meta_gradient_is_the_oracles_complex_step(
    learn: tuple[str, ...], per_layer: bool, seed: int, decade: int
) -> None:
    """dQ/dφ of the linear loss with λ_WSD = 1: q = g + Δ; the oracle solves complex systems."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).double()
    x = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    damping = 10.0**decade
    rule = apo.rules.KFAC(model, lr=0.1, damping=damping, learn=learn, per_layer=per_layer)
    optimizer = apo.APO(
        model,
        rule,
        apo.ProximalObjective(fsd_weight=0.0, wsd_weight=1.0, loss="linear"),
        torch.optim.SGD(rule.parameters(), lr=1.0),
    )
    with rule.observe(model):
        halved_square(model(x)).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.meta_backward(loss=lambda: torch.zeros(()))

    factors, V = oracle_factors(rule), [matrix(grads[:2]), matrix(grads[2:])]

    def step(phi: Array) -> Array:
        """Δ of both layers, one after the other, for φ = (log η, log γ) of each, (2, 2)."""
        pieces = []
        for (A, B), v, (log_lr, log_damping) in zip(factors, V, phi, strict=True):
            damped = np.kron(A, B) + np.exp(log_damping) * np.eye(v.size)
            pieces.append(-np.exp(log_lr) * np.linalg.solve(damped, vec(v)))
        return np.concatenate(pieces)

    own = np.log([[0.1, damping]] * 2)
    q = np.concatenate([vec(v) for v in V]) + step(own)
    slopes = np.zeros((2, 2, len(q)))
    for at in np.ndindex(2, 2):
        moved = own.astype(complex)
        moved[at] += 1e-30j
        slopes[at] = np.imag(step(moved)) / 1e-30
    expected = slopes @ q  # (layers, 2)
    expected = expected if per_layer else expected.sum(0, keepdims=True)
    kappa = max(condition(f, damping) for f in factors)
    # In the slope by the damping, two solves are chained, and q adds a third.
    scale = float(np.linalg.norm(q) * np.linalg.norm(slopes))
    for name, column in (("lr", 0), ("damping", 1)):
        phi = rule.log_lr if name == "lr" else rule.log_damping
        if name in learn:
            assert_close(
                bridge.phi_gradient(phi).reshape(-1),
                expected[:, column],
                SOLVE,
                condition=kappa,
                iterations=3,
                size=max(v.size for v in V),
                scale=scale,
                what=f"dQ/d log {name}",
            )
        else:
            assert phi.grad is None


@given(seed=seeds, decade=decades)
def test_the_step_is_differentiable_through_the_eigenbasis_alone(seed: int, decade: int) -> None:
    """∂Δ/∂log γ = η γ U_B (U_Bᵀ V U_A / (β αᵀ + γ)²) U_Aᵀ, with the oracle's basis."""
    lr, damping = 0.3, 10.0**decade
    layer, rule, grads = one_layer("linear", True, seed, lr, damping)
    updates, _ = rule(list(layer.parameters()), grads, {})
    weights = [torch.randn_like(g) for g in grads]
    (got,) = torch.autograd.grad(updates, [rule.log_damping], weights)
    (factors,) = oracle_factors(rule)
    basis = ekfac_basis(factors)
    rotated, against = (basis.U_B.T @ matrix(m) @ basis.U_A for m in (grads, weights))
    damped = np.outer(basis.beta, basis.alpha) + damping
    terms = against * rotated * lr * damping / damped**2
    assert_close(
        bridge.array(got),
        terms.sum(),
        COMPLEX_STEP,
        condition=condition(factors, damping),
        size=16,
        iterations=4,
        scale=lr / damping * float(np.linalg.norm(rotated) * np.linalg.norm(against)),
        what="slope",
    )


@pytest.mark.parametrize("seed", range(3))
def test_with_the_exact_fisher_one_step_solves_linear_regression(seed: int) -> None:
    """H = A ⊗ I for ½‖z − t‖²: with η = 1 and no damping to speak of, K-FAC is Newton's method."""
    torch.manual_seed(seed)
    model = nn.Linear(3, 2).double()
    x, t = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    damping = 1e-12
    rule = apo.rules.KFAC(model, lr=1.0, damping=damping)
    with rule.observe(model):
        z = model(x)
        for c in range(2):  # columns of H_rho = I, in two passes of 20 examples
            (z[:, c].sum() / (20 * np.sqrt(2))).backward(retain_graph=True)
    model.zero_grad()
    (0.5 * (z - t).square().sum() / 20).backward()
    params = list(model.parameters())
    updates, _ = rule(params, [p.grad for p in params if p.grad is not None], {})
    ahead = matrix(params) + matrix([u.detach() for u in updates])
    design = np.concatenate([bridge.array(x), np.ones((20, 1))], axis=1)
    expected = np.linalg.lstsq(design, bridge.array(t))[0].T
    # The damping moves the solution by γ / α; beside it there is rounding.
    kappa = np.linalg.cond(design) ** 2
    smallest = np.linalg.eigvalsh(design.T @ design / 20)[0]
    eps = np.finfo(np.float64).eps
    scale = float(np.linalg.norm(expected) + np.linalg.norm(matrix(params)))
    assert_close(
        ahead, expected, SOLVE, condition=kappa + damping / smallest / eps, size=20, scale=scale
    )


def mixed() -> nn.Sequential:
    """Layers with factors beside such that have none: grouped convolution, BatchNorm; float64."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 2, 2, groups=2),
        nn.Conv2d(2, 2, 2),
        nn.BatchNorm2d(2),
        nn.Flatten(),
        nn.Linear(8, 3, bias=False),
    ).double()


def observed_mixed(**arguments: Any) -> tuple[nn.Sequential, apo.rules.KFAC]:
    """`mixed` and its rule after one mini-batch."""
    model = mixed()
    rule = apo.rules.KFAC(model, **arguments)
    x, y = torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.randint(3, (5,))
    with rule.observe(model):
        cross_entropy(model(x), y).backward()
    return model, rule


@pytest.mark.parametrize("per_layer", [False, True])
def test_it_passes_the_conformance_kit(per_layer: bool) -> None:
    model, rule = observed_mixed(lr=0.1, damping=0.01, per_layer=per_layer)
    check_update_rule(rule, model)


def test_other_parameters_take_a_plain_gradient_step() -> None:
    model, rule = observed_mixed(per_layer=True)
    assert rule.factored == ("1", "4")
    assert rule.plain == ("0.weight", "0.bias", "2.weight", "2.bias")
    with torch.no_grad():
        rule.log_lr.copy_(torch.linspace(-3.0, 0.0, 4))
    grads = [torch.randn_like(p) for p in model.parameters()]
    updates, _ = rule(list(model.parameters()), grads, {})
    for (name, _), g, u in zip(model.named_parameters(), grads, updates, strict=True):
        if name in rule.plain:
            lr = float(np.exp(np.linspace(-3.0, 0.0, 4)[rule.layers.index(name[0])]))
            assert_close(bridge.array(u), -lr * bridge.array(g), FUNCTION, size=1, what=name)


class Tempered(nn.Module):
    """A Linear layer whose outputs a 0-d temperature scales."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)
        self.temperature = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.temperature * self.linear(x)


def test_a_0d_parameter_takes_a_0d_step() -> None:
    torch.manual_seed(0)
    model = Tempered()
    rule = apo.rules.KFAC(model, lr=0.1)
    with rule.observe(model):
        model(torch.randn(5, 3, dtype=torch.float64)).square().mean().backward()
    check_update_rule(rule, model)


def test_frozen_tied_and_unseen_parameters() -> None:
    """A frozen weight has no factors, a tied one those of the layer that first names it."""
    torch.manual_seed(0)
    attention = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=True)
    first, second, third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    first.weight.requires_grad_(False)
    second.bias.requires_grad_(False)
    third.weight = second.weight
    model = nn.Sequential(attention, first, second, third)
    rule = observed(model, lambda: halved_square(model(torch.randn(2, 3, 4))))
    assert rule.factored == ("0.linear1", "0.linear2", "2")
    assert "1.bias" in rule.plain
    assert "3.bias" in rule.plain
    assert "0.self_attn.out_proj.weight" in rule.plain
    assert [f.bias for f in factors_of(rule)] == [True, True, False]
    params = [p for p in model.parameters() if p.requires_grad]
    updates, _ = rule(params, [torch.randn_like(p) for p in params], {})
    assert [u.shape for u in updates] == [p.shape for p in params]


def test_a_layer_that_was_never_reached_takes_a_plain_gradient_step() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    rule = observed(model, lambda: halved_square(model[0](torch.randn(3, 2))))
    params = list(model.parameters())
    updates, _ = rule(params, [torch.ones_like(p) for p in params], {})
    for p, u in zip(params[2:], updates[2:], strict=True):
        assert torch.equal(u, -rule.lr * torch.ones_like(p))


@given(seed=seeds)
def test_in_float32_the_step_is_the_dense_inverse_too(seed: int) -> None:
    torch.manual_seed(seed)
    layer, x = nn.Linear(3, 2), torch.randn(6, 3)
    rule = apo.rules.KFAC(layer, lr=0.3, damping=0.05)
    with rule.observe(layer):
        halved_square(layer(x)).backward()
    grads = [torch.randn_like(p) for p in layer.parameters()]
    updates, _ = rule(list(layer.parameters()), grads, {})
    (factors,) = oracle_factors(rule)
    expected = dense_step(factors, matrix(grads).astype(np.float64), 0.3, 0.05)
    assert_close(
        matrix([u.detach() for u in updates]),
        expected,
        SOLVE.at(np.float32),
        condition=condition(factors, 0.05),
    )


def test_only_what_is_to_be_learned_is_learned() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    rule = apo.rules.KFAC(model, learn=("damping",), per_layer=True)
    assert [name for name, p in rule.named_parameters() if p.requires_grad] == ["log_damping"]
    assert rule.layers == rule.factored == ("0", "1")
    assert rule.lr.tolist() == rule.damping.tolist() == pytest.approx([1e-3, 1e-3], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "`lr` must be positive and finite, got 0"),
        ({"damping": -1.0}, "`damping` must be positive and finite, got -1"),
        ({"smoothing": 1.0}, r"`smoothing` must lie in \[0, 1\), got 1"),
        ({"interval": 0}, "`interval` must be an integer of at least 1, got 0"),
        ({"interval": 2.0}, "`interval` must be an integer of at least 1, got 2.0"),
        ({"learn": ()}, r"`learn` must name one or more of .*, got \(\)"),
        ({"learn": ("eps",)}, "`learn` must name one or more"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apo.rules.KFAC(nn.Linear(2, 2), **arguments)


def test_a_model_without_factors_and_a_step_before_observing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`model` must have a trainable nn.Linear, .*, got none"):
        apo.rules.KFAC(nn.BatchNorm2d(2))
    model = nn.Linear(2, 2)
    rule = apo.rules.KFAC(model)
    grads = [torch.ones_like(p) for p in model.parameters()]
    with pytest.raises(RuntimeError, match="`rule` must have observed a mini-batch before the"):
        rule(list(model.parameters()), grads, {})
