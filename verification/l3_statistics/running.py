"""Meta-steps of `apo.APO` on mini-batches that are drawn at random, and what the oracle expects."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import NamedTuple, final

import numpy as np
import torch
from hypothesis import settings

import apo_core as apo
from reference.arrays import Array
from verification import bridge
from verification.l3_statistics.confidence import (
    Confidence,
    Optimum,
    optimum,
    pair_gradients,
)
from verification.l3_statistics.populations import Population, Structure, learned, structure

BURN_IN = 0.25  # of the meta-steps: not averaged


class Fault(NamedTuple):
    """What the engine is given, other than what the oracle expects.

    Attributes:
        fsd: multiplies λ_FSD.
        wsd: multiplies λ_WSD; 2 is the ½ left out.
        same_batch: B' is B.
    """

    fsd: float = 1.0
    wsd: float = 1.0
    same_batch: bool = False


@final
@dataclass(frozen=True)
class Trial:
    """A structure on a population, as the oracle sees it.

    Attributes:
        population: the mini-batches.
        family: the structure.
        fsd_weight: λ_FSD.
        wsd_weight: λ_WSD.
        exact_loss: J_B(θ') instead of gᵀΔ.
    """

    population: Population
    family: Structure
    fsd_weight: float
    wsd_weight: float
    exact_loss: bool = False

    def M_with(self, fault: Fault) -> Array:
        """M_ij of an engine that has the fault, (m, m, n, n)."""
        G = self.population.curvatures
        M = fault.fsd * self.fsd_weight * G + fault.wsd * self.wsd_weight * np.eye(G.shape[1])
        own = G if self.exact_loss else np.zeros_like(G)
        return (M[:, None] if fault.same_batch else M[None]) + own[:, None] + np.zeros_like(M[None])

    @cached_property
    def M(self) -> Array:
        """M_ij, (m, m, n, n)."""
        return self.M_with(Fault())

    @cached_property
    def optimum(self) -> Optimum:
        """φ*."""
        return optimum(self.family, self.population.gradients, self.M)

    @property
    def meta_lr(self) -> float:
        """α: half of what keeps every single pair of mini-batches from overshooting at φ*."""
        slope = self.family.coordinates.slope(self.optimum.phi)
        steepest = np.linalg.norm(self.M, 2, axis=(-2, -1)).max()
        longest = np.square(self.population.gradients).sum(1).max()
        return float(0.5 / (steepest * longest * np.square(slope).max()))

    @property
    def start(self) -> float:
        """η_0 of P = η_0 I: half of the least eigenvalue of (E M)⁻¹."""
        return float(0.5 / np.linalg.norm(self.M.mean((0, 1)), 2))

    def directions(self) -> Array:
        """h: H⁻¹, for each entry of φ̄ − φ*, and the scale of P, (K + 1, K)."""
        return np.vstack([np.linalg.inv(self.optimum.H), self.optimum.scale])


def trial(name: str, population: Population, fsd: float, wsd: float, exact: bool = False) -> Trial:
    """The trial of the structure of that name."""
    return Trial(population, structure(name, population), fsd, wsd, exact)


def iterates(case: Trial, steps: int, seed: int, fault: Fault | None = None) -> Array:
    """φ_0, ..., φ_T of `steps` meta-steps with SGD at the fixed θ, (T + 1, K)."""
    fault = fault or Fault()
    population, network = case.population, case.population.problem.network
    model = bridge.twin(network, population.theta)
    rule = case.family.build(model, case.start)
    objective = apo.ProximalObjective(
        "squared_error",
        fault.fsd * case.fsd_weight,
        fault.wsd * case.wsd_weight,
        loss="exact" if case.exact_loss else "linear",
    )
    meta_optimizer = torch.optim.SGD(learned(rule), lr=case.meta_lr)
    optimizer = apo.APO(model, rule, objective, meta_optimizer)
    losses = [bridge.loss_closure(population.problem, model, b) for b in population.batches]
    outputs = [bridge.outputs_closure(model, b.inputs) for b in population.batches]
    path = [case.family.read(rule)]
    for i, j in np.random.default_rng(seed).integers(len(losses), size=(steps, 2)):
        model.zero_grad()
        losses[i]().backward()
        optimizer.meta_step(loss=losses[i], outputs=outputs[i if fault.same_batch else j])
        path.append(case.family.read(rule))
    return np.array(path)


def runs() -> settings:
    """One run in the profiles `quick` and `ci`, at a fixed seed, and ten in `thorough`."""
    examples = settings.get_profile(settings.get_current_profile_name()).max_examples
    return settings(max_examples=max(1, examples // 50))


class Verdict(NamedTuple):
    """What a path of φ says.

    Attributes:
        alarm: above 1 with probability at most `FALSE_ALARM`, if the engine is right.
        error: ‖p'(φ*)(φ̄ − φ*)‖ / ‖p*‖, how far P is off, to first order.
        promised: what `error` may be where there is no alarm.
    """

    alarm: float
    error: float
    promised: float


def judge(case: Trial, path: Array, false_alarm: float) -> Verdict:
    """Judge the averaged iterate; `path` is as `iterates` gives it."""
    best, gradients, M = case.optimum, case.population.gradients, case.M
    path = path[round(BURN_IN * len(path)) :]
    steps = len(path) - 1
    confidence = Confidence(case.directions(), best.S, steps, false_alarm)
    curved = np.zeros_like(best.phi)
    for phi in path[:-1]:
        mu = confidence.add(pair_gradients(case.family, phi, gradients, M))
        curved += mu - best.H @ (phi - best.phi)
    total = (path[0] - path[-1]) / case.meta_lr
    known = np.linalg.solve(best.H, total - curved) / steps
    promised = np.abs(known) + confidence.half_widths()[:-1] / steps
    slope = case.family.coordinates.slope(best.phi)
    size = np.linalg.norm(case.family.coordinates.value(best.phi))
    return Verdict(
        confidence.alarm(total),
        float(np.linalg.norm(slope * (path[:-1].mean(0) - best.phi)) / size),
        float(np.linalg.norm(slope * promised) / size),
    )


def power(case: Trial, fault: Fault, steps: int, false_alarm: float) -> float:
    """The probability of an alarm where the engine has that fault, in the normal approximation.

    The path settles at the fault's own φ*, where the oracle's μ is not 0: −μ is the mean of N / T.
    """
    averaged = steps - round(BURN_IN * steps)
    family, gradients = case.family, case.population.gradients
    wrong = optimum(family, gradients, case.M_with(fault))
    h = case.directions()
    confidence = Confidence(h, case.optimum.S, averaged, false_alarm)
    mu = confidence.add(pair_gradients(family, wrong.phi, gradients, case.M), averaged)
    deviations = np.sqrt(averaged * np.einsum("dk,kl,dl->d", h, wrong.S, h))
    excess = (averaged * np.abs(h @ mu) - confidence.half_widths()) / deviations
    return NormalDist().cdf(float(excess.max()))
