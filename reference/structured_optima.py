"""The best A kron B and the best (A, B, S) of eq. 9 under Q-hat for any G, by alternation.

| symbol | meaning | shape |
|---|---|---|
| g | mini-batch gradients at theta; T T^T = E[g g^T] | (m, n), (n, k) |
| M | lambda_FSD G + lambda_WSD I = R^T R, cross-layer terms included | (n, n) |
| P | blockdiag(P_l) over the layers' weights | (n, n) |
| A_l, B_l, S_l | factors of P_l; D_l = S_l^2 >= 0 | (in, in), (out, out), (out, in) |

For M positive definite Q-hat is a least squares problem in P,

    Q-hat(P) = 1/2 ||R P T - R^{-T} T||^2 - 1/2 tr(M^{-1} E[g g^T]),

linear in A, in B (for A kron B) and in D, so that each is solved exactly in turn. No closed form is
known outside the KFAC assumptions, and the minima found are local: several starts are tried.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import block_diag
from scipy.optimize import least_squares, lsq_linear

from reference.arrays import Array, finite_array, unvec, vec
from reference.curvature import KFACFactors
from reference.networks import Layer
from reference.update_rules import EKFACBlocks

# A sweep that lowers the objective by less than this fraction of 1/2 tr(M^{-1} E[g g^T]), what the
# best P of all gains, ends the search: a hundred times the rounding of the objective itself.
STALL = 1e-14

# Of a direction k that no gradient has, D_k k k^T takes no step, and D_k is free: 0 is taken. Its
# part in the gradients is rounding, 1e-16 of the others; 1e-10 is far below any share that counts.
UNSEEN = 1e-10


class StructuredOptimum(NamedTuple):
    """A local minimizer of Q-hat within a structure.

    Attributes:
        blocks: (A, B) or (A, B, S) of each layer.
        P: (n, n).
        value: Q-hat at P.
        history: Q-hat at the start, and after every half sweep; it never rises.
        gradient_norm: of dQ-hat in all entries of the blocks.
    """

    blocks: list[Any]
    P: Array
    value: float
    history: list[float]
    gradient_norm: float


class _LeastSquares(NamedTuple):
    """R, T and the target R^{-T} T of Q-hat, with the layers' places in theta."""

    R: Array
    T: Array
    target: Array
    layers: Sequence[Layer]

    @property
    def gain(self) -> float:
        """1/2 tr(M^{-1} E[g g^T]): how far below zero the best P of all is."""
        return 0.5 * float(np.sum(self.target**2))

    def value(self, P: Array) -> float:
        """Q-hat(P)."""
        return 0.5 * float(np.sum((self.R @ P @ self.T - self.target) ** 2)) - self.gain

    def columns(self, layer: Layer, dP: Array) -> Array:
        """vec(R dP_k T) of changes dP_k of one layer's block, (K, n_l, n_l) -> (n k, K)."""
        moved = self.R[:, layer.weight] @ dP @ self.T[layer.weight]
        return moved.reshape(len(dP), -1).T


def best_kronecker(
    gradients: Any,
    M: Any,
    layers: Sequence[Layer],
    starts: Sequence[Sequence[KFACFactors]],
    sweeps: int = 2000,
) -> StructuredOptimum:
    """min Q-hat over P = blockdiag(A_l kron B_l): all A by normal equations, then all B, in turn.

    A and B may be any matrices: this P need be neither symmetric nor positive.

    Args:
        gradients: g, (m, n).
        M: positive definite, (n, n).
        layers: without biases.
        starts: (A, B) of each layer, for every start.
        sweeps: the most of them.

    Source: P22 section 4.4 with S = 1 and without the second factor of eq. 9.

    Raises:
        ValueError: a shape is wrong, M is not positive definite, or a layer has a bias.
    """
    problem = _least_squares(gradients, M, layers)

    def descend(blocks: list[KFACFactors]) -> tuple[list[KFACFactors], list[float]]:
        history = [problem.value(_kronecker_matrix(blocks))]
        for sweep in range(2 * sweeps):
            blocks = _solve_factor(problem, blocks, "AB"[sweep % 2])
            history.append(problem.value(_kronecker_matrix(blocks)))
            if sweep > 2 and history[-3] - history[-1] <= STALL * problem.gain:
                break
        return blocks, history

    checked = [[_checked(layer, *s) for layer, s in zip(layers, b, strict=True)] for b in starts]
    return _best(problem, checked, descend, _kronecker_matrix, _kronecker_gradient)


def best_ekfac(
    gradients: Any,
    M: Any,
    layers: Sequence[Layer],
    starts: Sequence[Sequence[KFACFactors]],
    sweeps: int = 100,
) -> StructuredOptimum:
    """min Q-hat over P = blockdiag((A kron B) diag(vec S)^2 (A kron B)^T): eq. 9 in every layer.

    All D = S^2 >= 0 by least squares with bounds, then all A, B and S by a trust-region
    Gauss-Newton descent, in turn.

    Args:
        gradients: g, (m, n).
        M: positive definite, (n, n).
        layers: without biases.
        starts: (A, B) of each layer, for every start; the eigenvectors of KFAC's factors make the
            first D no worse than KFAC's, or EKFAC's, damped or not.
        sweeps: the most of them.

    Source: P22 eq. 9 and section 4.4.

    Raises:
        ValueError: a shape is wrong, M is not positive definite, or a layer has a bias.
    """
    problem = _least_squares(gradients, M, layers)

    def descend(blocks: list[EKFACBlocks]) -> tuple[list[EKFACBlocks], list[float]]:
        history = [problem.value(_ekfac_matrix(blocks))]
        for _ in range(sweeps):
            for improve in (_solve_spectrum, _descend_blocks):
                candidate = improve(problem, blocks)
                value = problem.value(_ekfac_matrix(candidate))
                if value < history[-1]:  # else rounding is all that is left to gain
                    blocks = candidate
                history.append(min(value, history[-1]))
            if history[-3] - history[-1] <= STALL * problem.gain:
                break
        return blocks, history

    checked = [
        [
            EKFACBlocks(*_checked(layer, *s), np.ones(layer.shape))
            for layer, s in zip(layers, b, strict=True)
        ]
        for b in starts
    ]
    return _best(problem, checked, descend, _ekfac_matrix, _ekfac_gradient)


def _best(
    problem: _LeastSquares,
    starts: list[list[Any]],
    descend: Callable[[list[Any]], tuple[list[Any], list[float]]],
    matrix: Callable[[list[Any]], Array],
    gradient: Callable[[_LeastSquares, list[Any]], Array],
) -> StructuredOptimum:
    """The lowest of the points that the starts lead to."""
    blocks, history = min((descend(start) for start in starts), key=lambda found: found[1][-1])
    P = matrix(blocks)
    norm = float(np.linalg.norm(gradient(problem, blocks)))
    return StructuredOptimum(blocks, P, problem.value(P), history, norm)


def _kronecker_matrix(blocks: Sequence[KFACFactors]) -> Array:
    return np.asarray(block_diag(*[np.kron(A, B) for A, B in blocks]))


def _ekfac_matrix(blocks: Sequence[EKFACBlocks]) -> Array:
    return np.asarray(block_diag(*[_block(b) for b in blocks]))


def _block(blocks: EKFACBlocks) -> Array:
    """(A kron B) diag(vec S)^2 (A kron B)^T."""
    root = np.kron(blocks.A, blocks.B) * vec(blocks.S)
    return root @ root.T


def _kronecker_changes(A: Array, B: Array, which: str) -> Array:
    """E_ij kron B for every entry of A, or A kron E_ij of B, (K, in out, in out)."""
    if which == "A":
        return np.stack([np.kron(E, B) for E in _units(A.shape)])
    return np.stack([np.kron(A, E) for E in _units(B.shape)])


def _solve_factor(
    problem: _LeastSquares, blocks: list[KFACFactors], which: str
) -> list[KFACFactors]:
    """All A_l (or all B_l) that minimize Q-hat for given B_l (or A_l)."""
    design = np.hstack(
        [
            problem.columns(layer, _kronecker_changes(*block, which))
            for layer, block in zip(problem.layers, blocks, strict=True)
        ]
    )
    entries = np.linalg.lstsq(design, problem.target.ravel(), rcond=None)[0]
    solved, start = [], 0
    for A, B in blocks:
        old = A if which == "A" else B
        new = entries[start : start + old.size].reshape(old.shape)
        start += old.size
        solved.append(KFACFactors(new, B) if which == "A" else KFACFactors(A, new))
    return solved


def _kronecker_gradient(problem: _LeastSquares, blocks: list[KFACFactors]) -> Array:
    """dQ-hat by every entry of every A and B."""
    residual = (problem.R @ _kronecker_matrix(blocks) @ problem.T - problem.target).ravel()
    return np.concatenate(
        [
            problem.columns(layer, _kronecker_changes(*block, which)).T @ residual
            for layer, block in zip(problem.layers, blocks, strict=True)
            for which in "AB"
        ]
    )


def _solve_spectrum(problem: _LeastSquares, blocks: list[EKFACBlocks]) -> list[EKFACBlocks]:
    """All S_l = sqrt(D_l) with D_l >= 0 that minimize Q-hat for given A_l and B_l."""
    designs = []
    for layer, (A, B, _) in zip(problem.layers, blocks, strict=True):
        K = np.kron(A, B).T  # rows k: P_l = sum_k D_k k k^T
        designs.append(problem.columns(layer, K[:, :, None] * K[:, None, :]))
    design = np.hstack(designs)
    sizes = np.linalg.norm(design, axis=0)
    seen = sizes > UNSEEN * sizes.max()
    D = np.zeros(design.shape[1])
    if seen.any():
        target = problem.target.ravel()
        found = lsq_linear(design[:, seen], target, (0.0, np.inf), method="bvls").x
        D[seen] = np.maximum(found, 0.0)  # rounding may leave -1e-17
    ends = np.cumsum([block.S.size for block in blocks])[:-1]
    return [
        _unit_columns(block._replace(S=unvec(np.sqrt(d), block.S.shape)))
        for block, d in zip(blocks, np.split(D, ends), strict=True)
    ]


def _unit_columns(blocks: EKFACBlocks) -> EKFACBlocks:
    """The same P with unit columns of A and B, which only their products with S determine."""
    A, B, S = blocks
    a, b = np.linalg.norm(A, axis=0), np.linalg.norm(B, axis=0)
    a, b = np.where(a > 0.0, a, 1.0), np.where(b > 0.0, b, 1.0)
    return EKFACBlocks(A / a, B / b, S * np.outer(b, a))


def _ekfac_jacobian(problem: _LeastSquares, blocks: list[EKFACBlocks]) -> Array:
    """d vec(R P T) by every entry of A, B and S of every layer, (n k, K)."""
    parts = []
    for layer, (A, B, S) in zip(problem.layers, blocks, strict=True):
        K, s = np.kron(A, B), vec(S)
        changes = [_kronecker_changes(A, B, which) * s for which in "AB"]
        # dP = (dK diag s) (K diag s)^T + its transpose, and 2 s_k k k^T for S, row by row.
        half = np.concatenate(changes) @ (K * s).T
        order = np.arange(S.size).reshape(S.shape, order="F").ravel()
        spectrum = (K.T[:, :, None] * K.T[:, None, :] * 2.0 * s[:, None, None])[order]
        dP = np.concatenate([half + half.swapaxes(1, 2), spectrum])
        parts.append(problem.columns(layer, dP))
    return np.hstack(parts)


def _ekfac_gradient(problem: _LeastSquares, blocks: list[EKFACBlocks]) -> Array:
    """dQ-hat by every entry of every A, B and S."""
    residual = problem.R @ _ekfac_matrix(blocks) @ problem.T - problem.target
    return _ekfac_jacobian(problem, blocks).T @ residual.ravel()


def _descend_blocks(problem: _LeastSquares, blocks: list[EKFACBlocks]) -> list[EKFACBlocks]:
    """A few trust-region Gauss-Newton steps in all A, B and S."""

    def unpack(x: Array) -> list[EKFACBlocks]:
        unpacked, start = [], 0
        for block in blocks:
            parts = []
            for old in block:
                parts.append(x[start : start + old.size].reshape(old.shape))
                start += old.size
            unpacked.append(EKFACBlocks(*parts))
        return unpacked

    def residual(x: Array) -> Array:
        return (problem.R @ _ekfac_matrix(unpack(x)) @ problem.T - problem.target).ravel() / unit

    # `gtol` is a number without a unit. Where no gradient is, every residual is zero.
    unit = float(np.linalg.norm(problem.target)) or 1.0
    found = least_squares(
        residual,
        np.concatenate([part.ravel() for block in blocks for part in block]),
        jac=lambda x: _ekfac_jacobian(problem, unpack(x)) / unit,  # pyright: ignore[reportArgumentType]
        ftol=1e-15,
        gtol=1e-14,
        max_nfev=20,
    )
    return unpack(found.x)


def _least_squares(gradients: Any, M: Any, layers: Sequence[Layer]) -> _LeastSquares:
    g = finite_array("gradients", gradients, ("m", "n"))
    M = finite_array("M", M, (g.shape[1], g.shape[1]))
    if any(layer.bias is not None for layer in layers):
        raise ValueError("`layers` must have no biases, got one with a bias; drop the biases.")
    eigenvalues = np.linalg.eigvalsh(M)
    if eigenvalues[0] <= len(M) * np.finfo(float).eps * np.abs(eigenvalues).max():
        raise ValueError(
            f"`M` must be positive definite, got smallest eigenvalue {eigenvalues[0]:.3g}; raise "
            "`wsd_weight`."
        )
    R = np.linalg.cholesky(M).T
    _, singular, directions = np.linalg.svd(g / np.sqrt(len(g)), full_matrices=False)
    T = directions.T * singular  # (n, min(m, n)), T T^T = E[g g^T]
    return _LeastSquares(R, T, np.linalg.solve(R.T, T), layers)


def _checked(layer: Layer, A: Any, B: Any) -> KFACFactors:
    out, in_ = layer.shape
    return KFACFactors(
        finite_array("starts: A", A, (in_, in_)), finite_array("starts: B", B, (out, out))
    )


def _units(shape: tuple[int, ...]) -> Array:
    """E_ij row by row, (rows columns, rows, columns)."""
    size = int(np.prod(shape))
    return np.eye(size).reshape(size, *shape)
