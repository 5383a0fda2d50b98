"""Mini-batches to draw from whose gradients, curvatures and best preconditioner are exact sums.

symbol   shape       meaning
m, n              mini-batches in the population, parameters
g_i      (n,)        ∇J of mini-batch i at θ
G_j      (n, n)      E[JᵀJ] over the inputs of mini-batch j
M_ij     (n, n)      λ_FSD G_j + λ_WSD I, and G_i more with the exact loss
p        (K,)        P = Σ_k p_k P_k; φ is p, log p or √p
ĝ_ij     (K,)        dQ/dφ with B = i and B' = j

The networks are linear in θ and the loss is ½‖z − t‖², so that the quadratic model of Theorem 1 is
no approximation, and J_B(θ') = J_B(θ) + gᵀΔ + ½ΔᵀG_BΔ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch
from torch import nn

import apo_core as apo
from reference.arrays import Array
from reference.curvature import ekfac_basis, fsd_hessian, kfac_factors
from reference.discrepancies import SquaredEuclidean
from reference.losses import SquaredError
from reference.networks import FixedHead
from reference.problem import Batch, Problem
from reference.update_rules import EKFACBlocks, ekfac_preconditioner
from verification import bridge
from verification.strategies.spd import rotation

HEADS = ([[1.0, 0.3], [0.0, 1.0]], [[0.6], [0.8]])  # C_l of two layers
INPUT_SIZES = (2, 1)
EXAMPLES = 128  # in a mini-batch


@final
@dataclass(frozen=True)
class Population:
    """Mini-batches, each as likely as any other.

    Attributes:
        problem: a network that is linear in θ, and the squared error.
        theta: where the gradients are given, (n,).
        batches: m mini-batches.
    """

    problem: Problem
    theta: Array
    batches: list[Batch]

    @property
    def curvatures(self) -> Array:
        """G_j, the same at every θ, (m, n, n)."""
        network, rho = self.problem.network, SquaredEuclidean()
        return np.array([fsd_hessian(network, rho, self.theta, b.inputs) for b in self.batches])

    @property
    def gradients(self) -> Array:
        """g_i at `theta`, (m, n)."""
        return np.array([self.problem.gradient(self.theta, *batch) for batch in self.batches])


def population(seed: int, spread: float = 0.1) -> Population:
    """n mini-batches of normal inputs whose gradients are nearly orthogonal.

    So the best diagonal and the best rates of layers are positive, as their coordinates need it.
    Where the inputs of a mini-batch are large its gradient is: a mini-batch is not independent of
    itself, and B' = B is a fault that shows.

    Args:
        seed: of θ, inputs and directions of gradients.
        spread: in [0, 1), the sizes of inputs and gradients go from 1 − spread to 1 + spread.
    """
    rng = np.random.default_rng(seed)
    network = FixedHead(HEADS, INPUT_SIZES)
    problem, n = Problem(network, SquaredError()), network.size
    theta = rng.standard_normal(n)
    batches = []
    scales = np.linspace(1 - spread, 1 + spread, n)
    for scale, direction in zip(scales, rotation(n, seed), strict=True):
        X = scale * rng.standard_normal((EXAMPLES, network.input_size))
        J = network.jacobian(theta, X).reshape(-1, n)
        g = scale * np.sqrt(n) * direction
        residual = np.linalg.pinv(J.T / EXAMPLES) @ g
        batches.append(Batch(X, network.outputs(theta, X) - residual.reshape(EXAMPLES, -1)))
    return Population(problem, theta, batches)


@final
@dataclass(frozen=True)
class Coordinates:
    """p(φ), entry by entry, with its derivative and its inverse."""

    value: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    inverse: Callable[[Array], Array]


LOG = Coordinates(np.exp, np.exp, np.log)
SQUARE = Coordinates(np.square, lambda s: 2.0 * s, np.sqrt)
ENTRY = Coordinates(lambda p: p, np.ones_like, lambda p: p)


class Structure(NamedTuple):
    """A family of preconditioners that is linear in p, and the rule that learns it.

    Attributes:
        basis: P_k on the oracle's vector, (K, n, n).
        coordinates: of φ.
        build: the rule on a model, at P = initial · I.
        read: φ of the rule, (K,).
    """

    basis: Array
    coordinates: Coordinates
    build: Callable[[nn.Module, float], apo.UpdateRule]
    read: Callable[[apo.UpdateRule], Array]

    def preconditioner(self, phi: Array) -> Array:
        """P(φ), (n, n)."""
        return np.einsum("k,kij->ij", self.coordinates.value(phi), self.basis)


def structure(name: str, population: Population) -> Structure:
    """The structure of that name."""
    network = population.problem.network
    n, layers = network.size, network.layers
    if name == "scalar":
        return Structure(np.eye(n)[None], LOG, apo.rules.SGD, _log_rates)
    if name == "per layer":
        owner = np.repeat(np.arange(len(layers)), [np.prod(layer.shape) for layer in layers])
        return Structure(
            np.array([np.diag(np.equal(owner, k).astype(float)) for k in range(len(layers))]),
            LOG,
            lambda model, rate: apo.rules.SGD(model, rate, per_layer=True),
            _log_rates,
        )
    if name == "diagonal":
        return Structure(
            np.array([np.diag(row) for row in np.eye(n)]),
            SQUARE,
            lambda model, rate: apo.rules.Preconditioned(model, apo.Diagonal, rate**0.5),
            lambda rule: bridge.to_vector(list(rule.parameters()), network),
        )
    if name == "dense":
        return Structure(
            np.eye(n * n).reshape(n * n, n, n),
            ENTRY,
            lambda model, rate: apo.rules.Preconditioned(model, apo.Dense, rate**0.5),
            lambda rule: bridge.to_oracle_matrix(_preconditioned(rule).dense(), network).ravel(),
        )
    return _ekfac_scales(population)


def _ekfac_scales(population: Population) -> Structure:
    """EKFAC with A and B held at the eigenvectors of KFAC's factors: S alone is learned."""
    network = population.problem.network
    X = np.concatenate([batch.inputs for batch in population.batches])
    factors = kfac_factors(network, SquaredEuclidean(), population.theta, X)
    bases = [ekfac_basis(factor) for factor in factors]
    shapes = [layer.shape for layer in network.layers]

    def blocks(scales: Array) -> list[EKFACBlocks]:
        pieces = np.split(scales, np.cumsum([out * in_ for out, in_ in shapes])[:-1])
        return [
            EKFACBlocks(basis.U_A, basis.U_B, piece.reshape(shape))
            for basis, piece, shape in zip(bases, pieces, shapes, strict=True)
        ]

    def build(model: nn.Module, rate: float) -> apo.UpdateRule:
        rule = apo.rules.Preconditioned(model, apo.EKFAC, rate**0.5)
        bridge.set_ekfac(rule, blocks(np.full(network.size, rate**0.5)), [None] * len(shapes))
        for name, parameter in rule.named_parameters():
            parameter.requires_grad_(name.endswith(".S"))
        return rule

    nothing: list[Array | None] = [None] * len(shapes)
    return Structure(
        np.array([ekfac_preconditioner(network.layers, blocks(row), nothing)
                  for row in np.eye(network.size)]),
        SQUARE,
        build,
        lambda rule: np.concatenate([bridge.array(p).ravel() for p in learned(rule)]),
    )  # fmt: skip


def learned(rule: apo.UpdateRule) -> list[nn.Parameter]:
    """φ without what is held."""
    return [p for p in rule.parameters() if p.requires_grad]


def _preconditioned(rule: apo.UpdateRule) -> apo.rules.Preconditioned:
    assert isinstance(rule, apo.rules.Preconditioned)
    return rule


def _log_rates(rule: apo.UpdateRule) -> Array:
    assert isinstance(rule, apo.rules.SGD)
    return bridge.array(torch.atleast_1d(rule.log_lr))
