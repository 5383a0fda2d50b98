"""Every structure with an option or a matrix of its own, and its P by the oracle's formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

import numpy as np
import torch
from scipy.linalg import block_diag
from torch import nn

import apo_core as apo
from apo_core.preconditioners import Structure
from reference import ekfac_matrix
from reference.arrays import Array
from verification import bridge

Values = dict[str, Array]
"""φ by the names of `named_parameters`."""


@final
@dataclass(frozen=True)
class Case:
    """A structure, and what its docstring states of it.

    Attributes:
        structure: the class, with its options.
        matrix: (φ, shape of the weight) -> P (n, n) on the row-major vector, in NumPy.
        numbers: (out, in) -> how many numbers φ has.
        products: (out, in) -> the multiplications of its matrix products.
    """

    structure: Structure
    matrix: Callable[[Values, tuple[int, int]], Array]
    numbers: Callable[[int, int], int]
    products: Callable[[int, int], int]


def row_major(matrix: Array, shape: tuple[int, int]) -> Array:
    """P on vec(W) by columns, as the papers have it, on W's row-major vector."""
    out, in_ = shape
    exchange = np.arange(out * in_).reshape(in_, out).T.reshape(-1)
    return matrix[np.ix_(exchange, exchange)]


def eq_9(A: Array, B: Array, S: Array) -> Array:
    """The oracle's eq. 9, row-major."""
    return row_major(ekfac_matrix(A, B, S), (len(B), len(A)))


def _blocks(blocks: Array, size: int) -> Array:
    return np.asarray(block_diag(*blocks))[:size, :size]


def _cut(total: int, block: int) -> tuple[int, int]:
    """(count, size) of blocks, by search: the fewest of at most `block`, then the smallest."""
    count = next(k for k in range(1, total + 1) if k * block >= total)
    return count, next(size for size in range(1, total + 1) if count * size >= total)


def _block_diagonal(phi: Values, shape: tuple[int, int]) -> Array:
    n, P = shape[0] * shape[1], np.zeros((len(phi["F"]) * phi["F"].shape[1],) * 2)
    size = phi["F"].shape[1]
    for k, F in enumerate(phi["F"]):
        P[k * size : (k + 1) * size, k * size : (k + 1) * size] = F @ F.T
    return P[:n, :n]


def _stacked(phi: Values, shape: tuple[int, int]) -> Array:
    parts = [
        eq_9(phi[f"parts.{k}.A"], phi[f"parts.{k}.B"], phi[f"parts.{k}.S"])
        for k in range(sum(name.endswith(".S") for name in phi))
    ]
    return np.asarray(block_diag(*parts))


def _block_ekfac_numbers(out: int, in_: int) -> int:
    (count_A, a), (count_B, b) = _cut(in_, 3), _cut(out, 3)
    return count_A * a**2 + count_B * b**2 + out * in_


def _block_ekfac_products(out: int, in_: int) -> int:
    (count_A, a), (count_B, b) = _cut(in_, 3), _cut(out, 3)
    return 2 * (count_B * b) * (count_A * a) * (a + b)


CASES: dict[str, Case] = {
    "scalar": Case(
        apo.Scalar,
        lambda phi, shape: phi["S"] ** 2 * np.eye(shape[0] * shape[1]),
        lambda out, in_: 1,
        lambda out, in_: 0,
    ),
    "kronecker": Case(
        apo.Kronecker,
        lambda phi, shape: eq_9(phi["A"], phi["B"], np.ones(shape)),
        lambda out, in_: in_**2 + out**2,
        lambda out, in_: 2 * out * in_ * (out + in_),
    ),
    "one-sided, input": Case(
        apo.OneSided,
        lambda phi, shape: eq_9(phi["F"], np.eye(shape[0]), np.ones(shape)),
        lambda out, in_: in_**2,
        lambda out, in_: 2 * out * in_ * in_,
    ),
    "one-sided, output": Case(
        partial(apo.OneSided, side="output"),
        lambda phi, shape: eq_9(np.eye(shape[1]), phi["F"], np.ones(shape)),
        lambda out, in_: out**2,
        lambda out, in_: 2 * out * in_ * out,
    ),
    "low rank": Case(
        partial(apo.LowRank, rank=2),
        lambda phi, shape: phi["U"] @ phi["U"].T + np.diag(phi["S"].reshape(-1) ** 2),
        lambda out, in_: out * in_ * (min(2, out * in_) + 1),
        lambda out, in_: 2 * out * in_ * min(2, out * in_),
    ),
    "block-diagonal": Case(
        partial(apo.BlockDiagonal, block=4),
        _block_diagonal,
        lambda out, in_: _cut(out * in_, 4)[0] * _cut(out * in_, 4)[1] ** 2,
        lambda out, in_: 2 * _cut(out * in_, 4)[0] * _cut(out * in_, 4)[1] ** 2,
    ),
    "block EKFAC": Case(
        partial(apo.BlockEKFAC, block=3),
        lambda phi, shape: eq_9(_blocks(phi["A"], shape[1]), _blocks(phi["B"], shape[0]), phi["S"]),
        _block_ekfac_numbers,
        _block_ekfac_products,
    ),
    "embedding EKFAC": Case(
        apo.EmbeddingEKFAC,
        lambda phi, shape: eq_9(phi["A"], np.eye(shape[0]), phi["S"]),
        lambda out, in_: in_**2 + out * in_,
        lambda out, in_: 2 * out * in_ * in_,
    ),
    "stacked EKFAC": Case(
        partial(apo.Stacked, structure=apo.EKFAC, parts=1),
        _stacked,
        lambda out, in_: in_**2 + out**2 + out * in_,
        lambda out, in_: 2 * out * in_ * (out + in_),
    ),
    "stacked rows": Case(
        lambda parameter, scale: apo.Stacked(parameter, scale, apo.EKFAC, parameter.shape[0]),
        _stacked,
        lambda out, in_: out * (in_**2 + 1 + in_),
        lambda out, in_: out * 2 * in_ * (1 + in_),
    ),
}


def build(name: str, shape: tuple[int, ...], scale: float = 1.0) -> apo.Preconditioner:
    """The structure on a float64 weight of that shape."""
    return CASES[name].structure(torch.zeros(shape, dtype=torch.float64), scale)


def disturb(module: nn.Module, seed: int) -> None:
    """Add standard normal noise to every φ, so that no entry is where it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for phi in module.parameters():
            phi += torch.randn(phi.shape, generator=generator, dtype=torch.float64).to(phi.dtype)


def matrix_of(name: str, P: apo.Preconditioner, shape: tuple[int, int]) -> tuple[Array, Array]:
    """P by the oracle's formula, and the same formula on |φ|: the terms that are added."""
    phi = {key: bridge.array(value) for key, value in P.named_parameters()}
    absolute = {key: np.abs(value) for key, value in phi.items()}
    return CASES[name].matrix(phi, shape), CASES[name].matrix(absolute, shape)
