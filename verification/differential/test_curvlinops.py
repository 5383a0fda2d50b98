"""K-FAC's and EKFAC's matrices and inverses are those of curvlinops, a peer's linear operators.

symbol   shape        meaning
V        (out, in)    [W | b] of a layer, or anything of its shape; in counts the bias's 1
L        (K, N, C)    columns with E[Σ_k L_k L_kᵀ] = the factor of the Fisher in the outputs
F        (in out, …)  a layer's block of the Fisher
γ                     damping

curvlinops divides A and B otherwise, so that what is compared are products of the two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import apo_core as apo
from apo_core.rules.kfac_factors import Factors
from reference.arrays import Array, unvec, vec
from reference.curvature import (
    EKFACBasis,
    KFACFactors,
    damped_ekfac_inverse,
    ekfac_eigenvalues,
    factored_damped_factors,
)
from verification import bridge
from verification.differential.networks import NETWORKS, Task, amplification, task
from verification.l1_values.kfac_cases import factors_of
from verification.profiles import share
from verification.tolerances import FUNCTION, assert_close

pytest.importorskip("curvlinops", reason="curvlinops is not installed: the extra `peers` has it")

DAMPING = 0.1
FISHERS = ("empirical", "type-2")

# linear_operator, which curvlinops imports, calls torch.jit.script at import: not ours to change.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning"),
    pytest.mark.parametrize("name", NETWORKS),
    pytest.mark.parametrize("fisher", FISHERS),
]
seeds = st.integers(0, 2**16)


def columns(t: Task, fisher: str) -> Tensor:
    """L: the gradient at the data's labels, or a root of diag p − ppᵀ, the model's."""
    p = t.model(t.x).detach().softmax(1)
    if fisher == "empirical":
        return (p - nn.functional.one_hot(t.y, p.shape[1]))[None]
    roots = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]  # (N, C, K)
    return roots.permute(2, 0, 1)


def observed(t: Task, fisher: str) -> apo.rules.KFAC:
    """Our rule with η = 1, after one mini-batch: K passes of N examples each."""
    rule = apo.rules.KFAC(t.model, lr=1.0, damping=DAMPING)
    L = columns(t, fisher)
    with rule.observe(t.model):
        for column in L:
            ((t.model(t.x) * column).sum() / (len(t.x) * len(L) ** 0.5)).backward()
    return rule


def peer_of(t: Task, fisher: str, corrected: bool = False) -> Any:
    """Their operator; `corrected` for EKFAC's."""
    from curvlinops import EKFACLinearOperator, FisherType, KFACLinearOperator

    kind = EKFACLinearOperator if corrected else KFACLinearOperator
    return kind(
        t.model,
        nn.CrossEntropyLoss(),
        list(t.model.parameters()),
        [(t.x, t.y)],
        fisher_type=FisherType.EMPIRICAL if fisher == "empirical" else FisherType.TYPE2,
        separate_weight_and_bias=False,
        check_deterministic=False,
        num_per_example_loss_terms=1,
    )


def inverse_of(peer: Any, **how: Any) -> Any:
    """Their inverse with the damping γ."""
    from curvlinops import KFACInverseLinearOperator

    return KFACInverseLinearOperator(peer, damping=DAMPING, **how)


def directions(t: Task, seed: int) -> list[Tensor]:
    """One random tensor for each parameter: generic, so that no wrong operator agrees on it."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in t.model.parameters()
    ]


def matrices(tensors: list[Tensor]) -> list[Array]:
    """V of each layer, from the layers' weights and biases in turn."""
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return [bridge.array(torch.cat([W.flatten(1), b[:, None]], 1)) for W, b in pairs]


def size_of(factor: Factors) -> float:
    """‖A ⊗ B‖."""
    return float(factor.A.norm() * factor.B.norm())


def compare(
    got: Array, expected: Array, t: Task, what: str, *, scale: float, condition: float = 1.0
) -> None:
    """To the rounding of a pass on both sides, whose longest sums are over examples and pixels."""
    assert_close(
        got,
        expected,
        FUNCTION,
        condition=condition * amplification(t.model),
        size=t.x[:, 0].numel() + 10,
        scale=scale,
        what=what,
    )


@given(seed=seeds)
@share(0.1)
def test_the_factors(name: str, fisher: str, seed: int) -> None:
    """B V A."""
    t = task(name, seed)
    V = directions(t, seed)
    theirs = matrices(peer_of(t, fisher) @ V)
    for factors, mine, expected in zip(
        factors_of(observed(t, fisher)), matrices(V), theirs, strict=True
    ):
        A, B = bridge.array(factors.A), bridge.array(factors.B)
        scale = size_of(factors) * float(np.linalg.norm(mine))
        compare(B @ mine @ A, expected, t, "(A ⊗ B) vec V", scale=scale)


@given(seed=seeds)
@share(0.1)
def test_the_steps_of_K_FAC(name: str, fisher: str, seed: int) -> None:
    """The engine's −(A ⊗ B + γI)⁻¹ g; an error of A ⊗ B arrives 1/γ times as large."""
    t = task(name, seed)
    V, rule = directions(t, seed), observed(t, fisher)
    updates, _ = rule(list(t.model.parameters()), V, {})
    theirs = matrices(inverse_of(peer_of(t, fisher), use_exact_damping=True) @ V)
    mine = matrices([-u for u in updates])
    for factors, g, got, expected in zip(factors_of(rule), matrices(V), mine, theirs, strict=True):
        condition = 1.0 + size_of(factors) / DAMPING
        scale = float(np.linalg.norm(g)) / DAMPING
        compare(got, expected, t, "(A ⊗ B + γI)⁻¹ vec V", condition=condition, scale=scale)


@given(seed=seeds)
@share(0.1)
def test_the_oracles_factored_damping(name: str, fisher: str, seed: int) -> None:
    """(A + π√γ I)⁻¹ ⊗ (B + √γ/π I)⁻¹, with the π of Martens and Grosse."""
    t = task(name, seed)
    V = directions(t, seed)
    peer = inverse_of(peer_of(t, fisher), use_heuristic_damping=True, min_damping=0.0)
    theirs = matrices(peer @ V)
    for factors, g, expected in zip(
        factors_of(observed(t, fisher)), matrices(V), theirs, strict=True
    ):
        own = KFACFactors(bridge.array(factors.A), bridge.array(factors.B))
        A, B = factored_damped_factors(own, DAMPING)
        got = np.linalg.solve(B, np.linalg.solve(A, g.T).T)
        # Both are above γ, whose roots they have; each is as wrong as its own condition number.
        condition = float(np.linalg.cond(A) + np.linalg.cond(B))
        scale = float(np.linalg.norm(g)) * float(
            np.linalg.norm(np.linalg.inv(A)) * np.linalg.norm(np.linalg.inv(B))
        )
        compare(got, expected, t, "A⁻¹ ⊗ B⁻¹ vec V", condition=condition, scale=scale)


def example_gradients(t: Task, fisher: str) -> list[Array]:
    """vec of each layer's V for every example and column, (K N, in out), by one pass each."""
    rows = []
    for column in columns(t, fisher):
        for i in range(len(t.x)):
            own = (t.model(t.x[i : i + 1]) * column[i]).sum()
            grads = torch.autograd.grad(own, list(t.model.parameters()))
            rows.append([vec(V) for V in matrices(list(grads))])
    return [np.stack(layer) for layer in zip(*rows, strict=True)]


def turning(F: Array, basis: EKFACBasis) -> float:
    """How far U diag(UᵀFU) Uᵀ moves where A and B err by ‖A‖ and ‖B‖, to first order.

    An error E turns u_j towards u_i by u_iᵀ E u_j / (α_j − α_i), which mixes what stands at i and j
    of UᵀFU. Where both eigenvalues are rounding, F has nothing there either.
    """
    U = np.kron(basis.U_A, basis.U_B)
    inputs, outputs = len(basis.alpha), len(basis.beta)
    turned = (U.T @ F @ U).reshape(inputs, outputs, inputs, outputs)
    d = np.einsum("abab->ab", turned)
    mixed = [
        (basis.alpha, d, np.einsum("ibjb->ijb", turned)),
        (basis.beta, d.T, np.einsum("aiaj->ija", turned)),
    ]
    total = 0.0
    for eigenvalues, diagonal, between in mixed:
        largest = eigenvalues.max()
        gaps = np.abs(eigenvalues[:, None] - eigenvalues) / largest
        apart = gaps > len(eigenvalues) * 4 * np.finfo(float).eps
        moved = np.abs(diagonal[:, None] - diagonal) + 2.0 * np.abs(between)
        total += float(np.linalg.norm(np.linalg.norm(moved, axis=2)[apart] / gaps[apart]))
    return total


@given(seed=seeds)
@share(0.1)
def test_the_structure_EKFAC_holds_theirs(name: str, fisher: str, seed: int) -> None:
    """Eq. 9 with A = U_A, B = U_B and S² = 1 / (λ + γ), λ the oracle's corrected eigenvalues.

    Both sides err in F itself, and in the basis that it is read in.
    """
    t = task(name, seed)
    V = directions(t, seed)
    peer = peer_of(t, fisher, corrected=True)
    applied = matrices(peer @ V)
    inverted = matrices(inverse_of(peer, use_exact_damping=True) @ V)
    blocks = zip(
        factors_of(observed(t, fisher)), example_gradients(t, fisher), matrices(V), strict=True
    )
    for (factors, g, v), product, inverse in zip(blocks, applied, inverted, strict=True):
        basis = EKFACBasis(
            *(bridge.array(f) for f in (factors.U_A, factors.U_B, factors.alpha, factors.beta))
        )
        F = g.T @ g / len(t.x)  # a mean over examples, a sum over columns
        eigenvalues = ekfac_eigenvalues(F, basis)
        size, length = float(np.linalg.norm(F)) + turning(F, basis), float(np.linalg.norm(v))
        structure = apo.EKFAC(bridge.tensor(v))
        with torch.no_grad():
            structure.A.copy_(factors.U_A)
            structure.B.copy_(factors.U_B)
            structure.S.copy_(bridge.tensor(np.sqrt(eigenvalues.clip(0.0))))
            direct = bridge.array(structure(bridge.tensor(v)))
            structure.S.copy_(bridge.tensor(1.0 / np.sqrt(eigenvalues + DAMPING)))
            got = bridge.array(structure(bridge.tensor(v)))
        compare(direct, product, t, "F vec V", scale=size * length)
        close = {"condition": 1.0 + size / DAMPING, "scale": length / DAMPING}
        compare(got, inverse, t, "(F + γI)⁻¹ vec V", **close)
        dense = damped_ekfac_inverse(basis, eigenvalues, DAMPING) @ vec(v)
        compare(unvec(dense, v.shape), inverse, t, "the oracle's (F + γI)⁻¹ vec V", **close)
