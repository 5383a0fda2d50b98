"""Problems on which the KFAC assumptions hold exactly, with factors of a chosen spectrum.

Squared error: heads C_l side by side with C_lᵀC_l = B_l, and any inputs with E[x_l x_lᵀ] = A_l.
KL: θ = 0, so that H_ρ = diag p − ppᵀ is the same for all x, heads with C_lᵀ H_ρ C_l = B_l, and
inputs whose slices are uncorrelated, E[x_k x_lᵀ] = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from hypothesis import strategies as st

from reference.analytic import softmax
from reference.arrays import Array
from reference.curvature import KFACFactors
from reference.discrepancies import CategoricalKL, Discrepancy, SquaredEuclidean
from reference.losses import CrossEntropy, Loss, SquaredError
from reference.networks import FixedHead
from reference.problem import Problem
from verification.strategies.readable import SEEDS_UP_TO
from verification.strategies.spd import SPD, spd_matrices

Divergence = Literal["squared_error", "kl"]


@final
@dataclass(frozen=True)
class KFACCase:
    """One recipe: a divergence, the factors of each layer, and a seed for what is left free.

    Attributes:
        divergence: "squared_error" (with the squared error as loss) or "kl" (cross-entropy).
        factors: (A_l, B_l) of each layer.
        seed: of θ, the offset and the directions of inputs and heads.
    """

    divergence: Divergence
    factors: tuple[tuple[SPD, SPD], ...]
    seed: int

    @property
    def loss(self) -> Loss:
        """The loss whose predictive distribution belongs to the divergence."""
        return SquaredError() if self.divergence == "squared_error" else CrossEntropy()

    @property
    def discrepancy(self) -> Discrepancy:
        """ρ."""
        return SquaredEuclidean() if self.divergence == "squared_error" else CategoricalKL()

    @property
    def input_sizes(self) -> list[int]:
        """in_l."""
        return [len(A.eigenvalues) for A, _ in self.factors]

    def kfac(self) -> list[KFACFactors]:
        """(A_l, B_l) as matrices."""
        return [KFACFactors(A.matrix, B.matrix) for A, B in self.factors]

    def condition(self) -> float:
        """Condition number of G = blockdiag(A_l ⊗ B_l)."""
        spectra = [np.outer(A.eigenvalues, B.eigenvalues) for A, B in self.factors]
        return max(s.max() for s in spectra) / min(s.min() for s in spectra)

    def problem(self) -> Problem:
        """The network with the heads that give B_l, and the loss."""
        rng = np.random.default_rng(self.seed)
        roots = [np.linalg.cholesky(B.matrix).T for _, B in self.factors]  # RᵀR = B
        if self.divergence == "squared_error":
            return Problem(FixedHead(FixedHead.side_by_side(roots), self.input_sizes), self.loss)
        outputs = 1 + max(len(root) for root in roots)
        offset = 0.5 * rng.standard_normal(outputs)
        p = softmax(offset[None])[0]
        heads = [self._kl_head(root, p, rng) for root in roots]
        return Problem(FixedHead(heads, self.input_sizes, offset), self.loss)

    def theta(self) -> Array:
        """Zero for KL, so that p is the same for every x; normal else; (n,)."""
        size = sum(len(A.eigenvalues) * len(B.eigenvalues) for A, B in self.factors)
        if self.divergence == "kl":
            return np.zeros(size)
        return np.random.default_rng(self.seed + 1).standard_normal(size)

    def inputs(self) -> Array:
        """X' of the FSD with E[x_l x_lᵀ] = A_l and E[x_k x_lᵀ] = 0, (N, d), N = d + 1."""
        d = sum(self.input_sizes)
        rng = np.random.default_rng(self.seed + 2)
        white = np.linalg.qr(rng.standard_normal((d + 1, d)))[0] * np.sqrt(d + 1)  # E[x xᵀ] = I
        slices = np.split(white, np.cumsum(self.input_sizes)[:-1], axis=1)
        roots = [np.linalg.cholesky(A.matrix) for A, _ in self.factors]
        return np.hstack([x @ root.T for x, root in zip(slices, roots, strict=True)])

    @staticmethod
    def _kl_head(root: Array, p: Array, rng: np.random.Generator) -> Array:
        """C with Cᵀ H C = RᵀR for H = diag p − ppᵀ, (C, out): C = H^(-1/2) U R on H's range."""
        eigenvalues, vectors = np.linalg.eigh(np.diag(p) - np.outer(p, p))
        whitening = (
            vectors[:, 1:] * eigenvalues[1:] ** -0.5
        )  # the constant vector is H's null space
        U = np.linalg.qr(rng.standard_normal((len(p) - 1, len(root))))[0]
        return whitening @ U @ root


@st.composite
def kfac_cases(
    draw: st.DrawFn,
    *,
    divergence: Divergence,
    max_layers: int = 2,
    max_width: int = 2,
    max_condition: float = 1e2,
) -> KFACCase:
    """Problems whose G = blockdiag(A_l ⊗ B_l) has condition number at most `max_condition`.

    Args:
        draw: given by Hypothesis.
        divergence: "squared_error" or "kl".
        max_layers: the most layers.
        max_width: the largest in_l and out_l.
        max_condition: of G; each factor has at most its square root.
    """
    layers = draw(st.integers(1, max_layers), label="layers")
    # The largest eigenvalue of every factor is 1, so G's is, and its smallest a product of two.
    factor = spd_matrices(max_size=max_width, max_condition=max_condition**0.5, max_log_scale=0.0)
    factors = tuple(
        (draw(factor, label=f"A_{k}"), draw(factor, label=f"B_{k}")) for k in range(layers)
    )
    return KFACCase(divergence, factors, draw(st.integers(0, SEEDS_UP_TO), label="seed"))
