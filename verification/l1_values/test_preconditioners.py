"""Every structure of P: its action, its dense matrix, P22 eq. 9 and eq. 10 agree."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import apo_core as apo
from reference import ekfac_matrix, ekfac_preconditioner, ekfac_product, vec
from reference.arrays import Array
from reference.update_rules import EKFACBlocks
from verification import bridge
from verification.l1_values.twins import engine, rule_twin
from verification.strategies import MetaCase, ScaledNormal, ekfac_blocks, meta_cases, scaled_normals
from verification.tolerances import PROPAGATED, ROUNDING, assert_close


def layer_of(blocks: EKFACBlocks) -> apo.EKFAC:
    """The engine's preconditioner of one weight, with these A, B and S."""
    layer = apo.EKFAC(torch.zeros(blocks.S.shape, dtype=torch.float64))
    with torch.no_grad():
        for parameter, value in zip((layer.A, layer.B, layer.S), blocks, strict=True):
            parameter.copy_(bridge.tensor(value))
    return layer


def terms_of(blocks: EKFACBlocks, V: Array) -> float:
    """Norm of the absolute terms that eq. 10 adds up, four products one after the other."""
    A, B, S = (np.abs(block) for block in blocks)
    return float(np.linalg.norm(ekfac_product(A, B, S, np.abs(V))))


@given(blocks=ekfac_blocks(), seed=st.integers(0, 2**16))
def test_eq_10_is_the_oracles(blocks: EKFACBlocks, seed: int) -> None:
    """B (S² ⊙ Bᵀ V A) Aᵀ on a weight's gradient."""
    V = np.random.default_rng(seed).standard_normal(blocks.S.shape)
    assert_close(
        bridge.array(layer_of(blocks)(bridge.tensor(V))),
        ekfac_product(*blocks, V),
        ROUNDING,
        iterations=4,
        scale=terms_of(blocks, V),
        what="P_S ∇W",
    )


@given(blocks=ekfac_blocks(), seed=st.integers(0, 2**16))
def test_eq_10_is_eq_9(blocks: EKFACBlocks, seed: int) -> None:
    """The four products are the dense (A ⊗ B) diag(vec S)² (A ⊗ B)ᵀ, of the oracle, on vec V."""
    V = np.random.default_rng(seed).standard_normal(blocks.S.shape)
    assert_close(
        vec(bridge.array(layer_of(blocks)(bridge.tensor(V)))),
        ekfac_matrix(*blocks) @ vec(V),
        ROUNDING,
        iterations=5,
        size=V.size,
        scale=terms_of(blocks, V),
        what="P_S vec(∇W)",
    )


@given(blocks=ekfac_blocks())
def test_dense_is_eq_9(blocks: EKFACBlocks) -> None:
    """`dense()` acts on the row-major vector: the oracle's matrix, its index pairs exchanged."""
    out, in_ = blocks.S.shape
    exchange = np.arange(out * in_).reshape(in_, out).T.reshape(-1)
    A, B, S = (np.abs(block) for block in blocks)
    assert_close(
        bridge.array(layer_of(blocks).dense()),
        ekfac_matrix(*blocks)[np.ix_(exchange, exchange)],
        ROUNDING,
        iterations=3,
        scale=float(np.linalg.norm(ekfac_matrix(A, B, S))),
        what="P_S",
    )


@given(blocks=ekfac_blocks())
def test_eq_9_is_positive_semidefinite(blocks: EKFACBlocks) -> None:
    """Symmetric, and no eigenvalue below zero by more than rounding, for every A, B and S."""
    P = bridge.array(layer_of(blocks).dense())
    scale = float(np.linalg.norm(P))
    assert_close(P, P.T, ROUNDING, iterations=3, scale=scale, what="symmetry")
    lowest = float(np.linalg.eigvalsh(0.5 * (P + P.T))[0])
    assert_close(min(lowest, 0.0), 0.0, ROUNDING, size=len(P), iterations=4, scale=scale)


@given(blocks=ekfac_blocks())
def test_eq_9_has_the_papers_number_of_parameters(blocks: EKFACBlocks) -> None:
    """in² + out² + in·out, against (in·out)² of the full matrix."""
    out, in_ = blocks.S.shape
    assert sum(p.numel() for p in layer_of(blocks).parameters()) == in_**2 + out**2 + in_ * out


@given(blocks=ekfac_blocks())
def test_eq_10_costs_four_matrix_products(blocks: EKFACBlocks) -> None:
    """2·out·in·(out + in) multiplications, where the dense matrix takes (out·in)²."""
    out, in_ = blocks.S.shape
    layer, gradient = layer_of(blocks), torch.ones(out, in_, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(gradient)
    assert set(counter.get_flop_counts()["Global"]) == {torch.ops.aten.mm}
    assert counter.get_total_flops() == 2 * (2 * out * in_ * (out + in_))


@pytest.mark.parametrize("name", ["dense", "diagonal", "ekfac"])
@given(case=meta_cases(), recipe=scaled_normals())
def test_the_update_is_minus_dense_times_g(name: str, case: MetaCase, recipe: ScaledNormal) -> None:
    """`Preconditioned.dense()` over all parameters is what the rule applies."""
    twin, network = rule_twin(name, case, recipe), case.problem.network
    optimizer = engine(case, twin.build)
    twin.start(optimizer, case)
    rule = optimizer.rule
    assert isinstance(rule, apo.rules.Preconditioned)
    params = [p.detach() for p in optimizer.model.parameters()]
    grads = bridge.to_tensors(case.gradient, network)
    updates, state = rule(params, grads, {})
    P = bridge.to_oracle_matrix(rule.dense(), network)
    assert state == {}
    # What Δ errs by, for each of the sums of at most n products that make P's entries and P g.
    e_update = twin.e_lookahead - np.abs(case.theta)
    assert_close(
        bridge.to_vector(updates, network),
        -P @ case.gradient,
        PROPAGATED,
        size=network.size,
        scale=float(np.linalg.norm(e_update)),
        what="Δ",
    )


@given(case=meta_cases(), recipe=scaled_normals())
def test_ekfac_over_all_layers_is_the_oracles(case: MetaCase, recipe: ScaledNormal) -> None:
    """Block-diagonal: eq. 9 for each weight, diag(s²) for each bias."""
    network = case.problem.network
    blocks = recipe.blocks(network.layers)
    scales = [
        None if layer.bias is None else recipe.around(np.ones(layer.shape[0]))
        for layer in network.layers
    ]
    model = bridge.twin(network, case.theta)
    rule = apo.rules.Preconditioned(model, apo.EKFAC)
    bridge.set_ekfac(rule, blocks, scales)
    absolute = [EKFACBlocks(*(np.abs(factor) for factor in block)) for block in blocks]
    terms = ekfac_preconditioner(network.layers, absolute, scales)
    assert_close(
        bridge.to_oracle_matrix(rule.dense(), network),
        ekfac_preconditioner(network.layers, blocks, scales),
        ROUNDING,
        iterations=3,
        scale=float(np.linalg.norm(terms)),
        what="P",
    )


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@given(
    out=st.integers(1, 3),
    in_=st.integers(1, 2),
    kernel=st.integers(1, 2),
    recipe=scaled_normals(),
    seed=st.integers(0, 2**16),
)
def test_convolutions_are_matrices(
    dimensions: int, out: int, in_: int, kernel: int, recipe: ScaledNormal, seed: int
) -> None:
    """A kernel (out, in, k, ...) is the matrix (out, in·k...) of eq. 10, its rows row-major."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    model = nn.Sequential(kind(in_, out, kernel, dtype=torch.float64), nn.BatchNorm1d(out).double())
    rule = apo.rules.Preconditioned(model, apo.EKFAC)
    kinds = [type(P) for P in rule.preconditioners]
    assert kinds == [apo.EKFAC, apo.Diagonal, apo.Diagonal, apo.Diagonal]
    columns = in_ * kernel**dimensions
    rng = np.random.default_rng(recipe.seed)
    blocks = EKFACBlocks(
        *(
            center + recipe.scale * rng.standard_normal(center.shape)
            for center in (np.eye(columns), np.eye(out), np.ones((out, columns)))
        )
    )
    weight = rule.preconditioners[0]
    assert isinstance(weight, apo.EKFAC)
    with torch.no_grad():
        for parameter, value in zip((weight.A, weight.B, weight.S), blocks, strict=True):
            parameter.copy_(bridge.tensor(value))
    shape = (out, in_, *[kernel] * dimensions)
    gradient = np.random.default_rng(seed).standard_normal(shape)
    V = gradient.reshape(out, columns)
    assert_close(
        bridge.array(weight(bridge.tensor(gradient))),
        ekfac_product(*blocks, V).reshape(shape),
        ROUNDING,
        iterations=4,
        size=max(V.shape),
        scale=terms_of(blocks, V),
        what="P_S of a convolution",
    )


def test_grouped_convolutions_are_matrices_of_their_own_shape() -> None:
    """Groups have (out, in / groups, k): the factors follow the weight, not the channels."""
    model = nn.Conv2d(4, 6, 3, groups=2, dilation=2)
    weight = apo.rules.Preconditioned(model, apo.EKFAC).preconditioners[0]
    assert isinstance(weight, apo.EKFAC)
    assert (tuple(weight.A.shape), tuple(weight.B.shape)) == ((18, 18), (6, 6))
