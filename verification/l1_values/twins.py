"""The engine beside the oracle: a meta-objective and an update rule, each on both sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

import apo_core as apo
from reference import meta_gradients, update_rules
from reference.arrays import Array, unvec, vec
from reference.networks import Layer
from reference.update_rules import EKFACBlocks
from verification import bridge
from verification.strategies import MetaCase, ScaledNormal

RULES = (
    "sgd",
    "sgd-per-layer",
    "heavy-ball",
    "nesterov",
    "momentum-without-history",
    "dense",
    "diagonal",
    "ekfac",
)

MODES = (("exact", "exact"), ("exact", "quadratic"), ("linear", "exact"), ("linear", "quadratic"))
"""Of the loss and the FSD; `test_terms` and `test_objective_modes` have the quadratic loss."""


@final
class Shift(apo.UpdateRule):
    """θ' = θ + φ: the rule whose φ is the step itself, so that dQ/dφ = q at any lookahead."""

    def __init__(self, step: list[Tensor]) -> None:
        super().__init__()
        self.step = nn.ParameterList(nn.Parameter(s) for s in step)

    def init_state(self, params: list[Tensor]) -> dict[str, list[Tensor]]:
        """No memory."""
        return {}

    def forward(
        self, params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]]
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """φ, and no state."""
        return list(self.step), state


def engine(
    case: MetaCase,
    rule_of: Callable[[nn.Module], apo.UpdateRule],
    loss: Any = "exact",
    fsd: Any = "exact",
) -> apo.APO:
    """An APO on the case's twin, with the oracle's g in `.grad` and SGD(lr=1) over φ."""
    model = bridge.twin(case.problem.network, case.theta)
    bridge.set_gradients(model, case.gradient, case.problem.network)
    rule = rule_of(model)
    objective = apo.ProximalObjective(
        bridge.discrepancy(case.discrepancy),
        *case.weights,
        loss=loss,
        fsd=fsd,
    )
    return apo.APO(model, rule, objective, torch.optim.SGD(rule.parameters(), lr=1.0))


def meta_backward(optimizer: apo.APO, case: MetaCase, scale: float = 1.0) -> apo.ProximalTerms:
    """`meta_backward` with the loss on the case's B and the outputs on its B'."""
    return optimizer.meta_backward(
        loss=bridge.loss_closure(case.problem, optimizer.model, case.batch),
        outputs=bridge.outputs_closure(optimizer.model, case.other.inputs),
        weight=scale,
    )


@final
@dataclass(frozen=True)
class RuleTwin:
    """One update rule on both sides, with φ as one vector in the oracle's coordinates.

    Attributes:
        build: the engine's rule on a model, at φ = 0 steps of history and its initial φ.
        set_phi: puts φ into the engine's rule.
        phi: φ, (k,).
        lookahead: the oracle's φ -> θ', analytic, (k,) -> (n,).
        hand_derived: the oracle's q -> dQ/dφ, (n,) -> (k,).
        gradient_of: dQ/dφ from the engine's rule, (k,).
        e_lookahead: rounding bound of θ' in units of u, (n,).
        reach: bound of the norm of (∂u/∂φ)ᵀ, so that an error of q arrives at most so large.
        momentum: v before the step, (n,), zero for a rule without.
    """

    build: Callable[[nn.Module], apo.UpdateRule]
    set_phi: Callable[[apo.UpdateRule, Array], None]
    phi: Array
    lookahead: Callable[[Array], Array]
    hand_derived: Callable[[Array], Array]
    gradient_of: Callable[[apo.UpdateRule], Array]
    e_lookahead: Array
    reach: float
    momentum: Array

    def start(self, optimizer: apo.APO, case: MetaCase) -> None:
        """Set φ, and v where the rule has it."""
        self.set_phi(optimizer.rule, self.phi)
        if "momentum" in optimizer.rule_state:
            tensors = bridge.to_tensors(self.momentum, case.problem.network)
            optimizer.rule_state = {"momentum": tensors}


def rule_twin(name: str, case: MetaCase, recipe: ScaledNormal, mu: float = 0.9) -> RuleTwin:
    """The rule of that name at a φ drawn by `recipe`, at the case's θ and g."""
    if name == "dense":
        return _dense(case, recipe)
    if name == "diagonal":
        return _diagonal(case, recipe)
    if name == "ekfac":
        return _ekfac(case, recipe)
    return _sgd(name, case, recipe, mu)


def _sgd(name: str, case: MetaCase, recipe: ScaledNormal, mu: float) -> RuleTwin:
    theta, g, layers = case.theta, case.gradient, case.problem.network.layers
    per_layer = name == "sgd-per-layer"
    phi = recipe.around(np.full(len(layers) if per_layer else 1, np.log(0.1)))
    v = ScaledNormal(1.0, recipe.seed + 1).around(np.zeros_like(g))
    steps: dict[str, Callable[[Any], Array]] = {
        "sgd": lambda eta: update_rules.sgd(theta, g, eta),
        "sgd-per-layer": lambda eta: update_rules.sgd_per_layer(theta, g, eta, layers),
        "heavy-ball": lambda eta: update_rules.heavy_ball(theta, g, v, eta, mu).theta,
        "nesterov": lambda eta: update_rules.nesterov(theta, g, v, eta, mu).theta,
        "momentum-without-history": lambda eta: update_rules.sgd(theta, g, eta),
    }

    def direction() -> Array:
        if name == "heavy-ball":
            return mu * v + g
        return g + mu * (mu * v + g) if name == "nesterov" else g

    def hand_derived(q: Array) -> Array:
        if per_layer:
            return meta_gradients.per_layer_log_lr_gradient(q, g, phi, layers)
        return np.array([meta_gradients.log_lr_gradient(q, direction(), float(phi[0]))])

    def build(model: nn.Module) -> apo.UpdateRule:
        momentum = 0.0 if name in ("sgd", "sgd-per-layer") else mu
        return apo.rules.SGD(
            model,
            momentum=momentum,
            nesterov=name == "nesterov",
            per_layer=per_layer,
            lookahead_momentum=name != "momentum-without-history",
        )

    def log_lr(rule: apo.UpdateRule) -> nn.Parameter:
        assert isinstance(rule, apo.rules.SGD)
        return rule.log_lr

    def set_phi(rule: apo.UpdateRule, value: Array) -> None:
        with torch.no_grad():
            log_lr(rule).copy_(bridge.tensor(value.reshape(log_lr(rule).shape)))

    eta = float(np.exp(phi).max())
    terms = np.abs(g) + (1 + mu) * np.abs(v)
    return RuleTwin(
        build,
        set_phi,
        phi,
        lambda value: steps[name](np.exp(value) if per_layer else np.exp(value[0])),
        hand_derived,
        lambda rule: bridge.phi_gradient(log_lr(rule)).reshape(-1),
        np.abs(theta) + 20.0 * eta * terms,
        eta * float(np.linalg.norm(terms)),
        v,
    )


def _dense(case: MetaCase, recipe: ScaledNormal) -> RuleTwin:
    theta, g, network = case.theta, case.gradient, case.problem.network
    n = network.size
    P = 0.3 * recipe.around(np.eye(n))

    def preconditioner(rule: apo.UpdateRule) -> apo.Dense:
        assert isinstance(rule, apo.rules.Preconditioned)
        (P,) = bridge.preconditioners_of(rule)
        assert isinstance(P, apo.Dense)
        return P

    def set_phi(rule: apo.UpdateRule, value: Array) -> None:
        assert isinstance(rule, apo.rules.Preconditioned)
        bridge.set_dense(rule, value.reshape(n, n), network)

    def gradient_of(rule: apo.UpdateRule) -> Array:
        gradient = bridge.tensor(bridge.phi_gradient(preconditioner(rule).P))
        return bridge.to_oracle_matrix(gradient, network).reshape(-1)

    return RuleTwin(
        lambda model: apo.rules.Preconditioned(model, apo.Dense),
        set_phi,
        P.reshape(-1),
        lambda value: update_rules.preconditioned(theta, g, value.reshape(n, n)),
        lambda q: meta_gradients.dense_gradient(q, g).reshape(-1),
        gradient_of,
        np.abs(theta) + (n + 3) * np.abs(P) @ np.abs(g),
        float(np.linalg.norm(g)),
        np.zeros(n),
    )


def _diagonal(case: MetaCase, recipe: ScaledNormal) -> RuleTwin:
    theta, g, network = case.theta, case.gradient, case.problem.network
    s = 0.3 * recipe.around(np.ones(network.size))

    def set_phi(rule: apo.UpdateRule, value: Array) -> None:
        assert isinstance(rule, apo.rules.Preconditioned)
        bridge.set_diagonal(rule, value, network)

    def gradient_of(rule: apo.UpdateRule) -> Array:
        return bridge.to_vector(
            [bridge.tensor(bridge.phi_gradient(p)) for p in rule.parameters()], network
        )

    return RuleTwin(
        lambda model: apo.rules.Preconditioned(model, apo.Diagonal),
        set_phi,
        s,
        lambda value: theta - value**2 * g,
        lambda q: meta_gradients.diagonal_gradient(q, g, s),
        gradient_of,
        np.abs(theta) + 5.0 * s**2 * np.abs(g),
        float(2.0 * np.max(np.abs(s * g))),
        np.zeros_like(g),
    )


def _ekfac(case: MetaCase, recipe: ScaledNormal) -> RuleTwin:
    """φ: A, B, S of each layer (columns stacked), then s of its bias."""
    theta, g, network = case.theta, case.gradient, case.problem.network
    layers = network.layers
    blocks = [EKFACBlocks(b.A, b.B, 0.3 * b.S) for b in recipe.blocks(layers)]
    scales = [
        None if layer.bias is None else 0.3 * recipe.around(np.ones(layer.shape[0]))
        for layer in layers
    ]

    def pack(values: list[tuple[EKFACBlocks, Array | None]]) -> Array:
        pieces = []
        for block, s in values:
            pieces += [vec(factor) for factor in block]
            if s is not None:
                pieces.append(s)
        return np.concatenate(pieces)

    def unpack(phi: Array) -> list[tuple[EKFACBlocks, Array | None]]:
        values, start = [], 0

        def take(shape: tuple[int, int]) -> Array:
            nonlocal start
            start += shape[0] * shape[1]
            return unvec(phi[start - shape[0] * shape[1] : start], shape)

        for layer in layers:
            out, in_ = layer.shape
            block = EKFACBlocks(take((in_, in_)), take((out, out)), take((out, in_)))
            values.append((block, None if layer.bias is None else take((out, 1))[:, 0]))
        return values

    def lookahead(phi: Array) -> Array:
        pieces = []
        for layer, (block, s) in zip(layers, unpack(phi), strict=True):
            product = update_rules.ekfac_product(*block, layer.weight_matrix(g))
            pieces.append(theta[layer.weight] - vec(product))
            if layer.bias is not None and s is not None:
                pieces.append(theta[layer.bias] - s**2 * g[layer.bias])
        return np.concatenate(pieces)

    def hand_derived(q: Array) -> Array:
        return pack(
            [
                (
                    meta_gradients.ekfac_gradient(
                        layer.weight_matrix(q), layer.weight_matrix(g), *block
                    ),
                    None
                    if s is None or layer.bias is None
                    else meta_gradients.diagonal_gradient(q[layer.bias], g[layer.bias], s),
                )
                for layer, block, s in zip(layers, blocks, scales, strict=True)
            ]
        )

    def set_phi(rule: apo.UpdateRule, value: Array) -> None:
        assert isinstance(rule, apo.rules.Preconditioned)
        values = unpack(value)
        bridge.set_ekfac(rule, [block for block, _ in values], [s for _, s in values])

    def gradient_of(rule: apo.UpdateRule) -> Array:
        assert isinstance(rule, apo.rules.Preconditioned)
        pieces = []
        for P in bridge.preconditioners_of(rule):
            parameters = (P.A, P.B, P.S) if isinstance(P, apo.EKFAC) else tuple(P.parameters())
            pieces += [vec(bridge.phi_gradient(p)) for p in parameters]
        return np.concatenate(pieces)

    return RuleTwin(
        lambda model: apo.rules.Preconditioned(model, apo.EKFAC),
        set_phi,
        pack(list(zip(blocks, scales, strict=True))),
        lookahead,
        hand_derived,
        gradient_of,
        np.abs(theta) + _ekfac_terms(layers, blocks, scales, g),
        max(
            [
                _ekfac_reach(block, layer.weight_matrix(g))
                for layer, block in zip(layers, blocks, strict=True)
            ]
            + [
                2.0 * float(np.max(np.abs(s))) * float(np.linalg.norm(g))
                for s in scales
                if s is not None
            ]
        ),
        np.zeros_like(g),
    )


def _ekfac_terms(
    layers: tuple[Layer, ...], blocks: list[EKFACBlocks], scales: list[Array | None], g: Array
) -> Array:
    """Rounding bound of Pg: four products, so four sums of the absolute terms, (n,)."""
    pieces = []
    for layer, block, s in zip(layers, blocks, scales, strict=True):
        A, B, S = (np.abs(factor) for factor in block)
        terms = update_rules.ekfac_product(A, B, S, np.abs(layer.weight_matrix(g)))
        pieces.append((2 * sum(layer.shape) + 12) * vec(terms))
        if layer.bias is not None and s is not None:
            pieces.append(5.0 * s**2 * np.abs(g[layer.bias]))
    return np.concatenate(pieces)


def _ekfac_reach(block: EKFACBlocks, V: Array) -> float:
    """Bound of ‖dQ/d(A, B, S)‖ / ‖q‖: each is a product of the five Frobenius norms."""
    a, b, s, v = (float(np.linalg.norm(factor)) for factor in (*block, V))
    return 2.0 * v * a * b * s * float(np.sqrt((b * s) ** 2 + (a * s) ** 2 + (a * b) ** 2))
