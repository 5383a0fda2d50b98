"""Q(φ) as a pure function: what `torch.func` finds through the network is what APO finds without.

symbol   meaning
S        mean over the examples of Σ_c |∂z_c/∂θ|, (n,): what a pass backward adds, in absolute terms
Δ        u(θ, φ, g) − θ
K        ‖∂Δ/∂φ‖, by which an error of q = ∇_θ' Q arrives in dQ/dφ
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.nn.functional import cross_entropy

import apo_core as apo
from apo_core import functional
from verification import bridge
from verification.engine.scenes import RULES, Scene, scene, values
from verification.profiles import share
from verification.strategies import ALL_DISCREPANCIES
from verification.tolerances import CENTRAL_DIFFERENCE, FUNCTION, assert_close

LOSSES, FSDS = ("exact", "linear", "quadratic"), ("exact", "quadratic")
FUNCTIONAL = [name for name in RULES if name not in ("any optimizer", "grouped")]
Params = dict[str, Tensor]

seeds = st.integers(0, 2**16)
functional_rules = pytest.mark.parametrize("rule", FUNCTIONAL)
all_modes = pytest.mark.parametrize(("loss", "fsd"), list(itertools.product(LOSSES, FSDS)))
bounded_apart = pytest.mark.loose(
    "S, the step and K are bounded each by itself; all are attained at once by one example, one "
    "output and one sign alone. And most passes do the same operations in the same order."
)


def trained(rule: str, seed: int, loss: Any = "exact", fsd: Any = "exact") -> Scene:
    """A scene with a memory, a φ of its own and g in `.grad`; in evaluation mode, so pure."""
    objective = apo.ProximalObjective("kl", 0.3, 0.1, loss, fsd)
    s = scene(rule, seed=seed, objective=objective, meta_lr=0.0)
    s.run(1)
    with torch.no_grad():
        for phi in s.optimizer.rule.parameters():
            phi.add_(0.1 * torch.randn_like(phi))
    s.model.eval()
    s.backward()
    return s


def theta_of(s: Scene) -> Params:
    """θ by name, without a graph."""
    return {name: p.detach() for name, p in s.model.named_parameters()}


def phi_of(s: Scene) -> Params:
    """φ by name, without a graph."""
    return {name: p.detach() for name, p in s.optimizer.rule.named_parameters()}


def loss_of(model: nn.Module, params: Params, x: Tensor, y: Tensor) -> Tensor:
    """J_B(θ)."""
    return cross_entropy(functional_call(model, params, (x,)), y)


def q_of(s: Scene) -> Callable[[Params], Tensor]:
    """φ -> Q at the scene's θ, g and memory."""
    grads = {name: p.grad for name, p in s.model.named_parameters() if p.grad is not None}
    return lambda phi: apo.meta_objective(
        phi,
        theta_of(s),
        grads,
        rule=s.optimizer.rule,
        objective=s.optimizer.objective,
        loss=lambda params: loss_of(s.model, params, s.x, s.y),
        outputs=lambda params: functional_call(s.model, params, (s.x_other,)),
        state=s.optimizer.rule_state,
    )


def flat(tensors: Any) -> np.ndarray:
    """All entries, (n,)."""
    return torch.cat([t.detach().reshape(-1) for t in tensors]).numpy()


def by_first_order(s: Scene) -> tuple[float, np.ndarray]:
    """Q and dQ/dφ as APO has them; 0 for a φ that is not learned."""
    rule = s.optimizer.rule
    rule.zero_grad()
    terms = s.optimizer.meta_backward(loss=s.loss, outputs=s.outputs)
    return float(terms.total), flat(
        torch.zeros_like(p) if p.grad is None else p.grad for p in rule.parameters()
    )


def sizes(s: Scene) -> tuple[float, float]:
    """What Q and dQ/dφ amount to in absolute terms, (1 + λ)(1 + S|Δ|(1 + S|Δ|)) and K |∇_θ'|.

    The slopes of the loss and of the KL in the outputs are at most 1 and about |z − z₀| ≤ S|Δ|,
    their curvatures at most 1; tanh bends the outputs no more than the products of its slopes.
    """
    objective, rule = s.optimizer.objective, s.optimizer.rule
    inputs = torch.cat([s.x, s.x_other])
    J = jacrev(lambda params: functional_call(s.model, params, (inputs,)))(theta_of(s))
    S = flat(j.abs().sum(1).mean(0) for j in J.values())
    grads = [p.grad for p in s.model.parameters() if p.grad is not None]
    state = s.optimizer.rule_state if rule.lookahead_from_state else {}

    def updates(phi: Params) -> tuple[Tensor, ...]:
        arguments = (list(theta_of(s).values()), grads, state)
        return tuple(functional_call(rule, phi, arguments)[0])

    K = np.sqrt(
        sum(float(k.square().sum()) for j in jacrev(updates)(phi_of(s)) for k in j.values())
    )
    step = np.abs(flat(updates(phi_of(s))))
    change, weight = float(S @ step), 1.0 + objective.fsd_weight
    q = weight * float(np.linalg.norm(S)) * (1 + change) + objective.wsd_weight * step.max()
    return weight * (1 + change * (1 + change)) + float(step @ step), K * q


def assert_equal_rounded(got: Any, expected: Any, s: Scene, size: float, what: str) -> None:
    """To the rounding of forward, backward and once more through every layer, on both sides."""
    terms = sum(p.numel() for p in s.model.parameters())
    passes = 3 * len(s.model)
    assert_close(got, expected, FUNCTION, size=terms, iterations=passes, scale=size, what=what)


@bounded_apart
@functional_rules
@all_modes
@given(seed=seeds)
@share(0.05)
def test_unrolled_derivatives_are_the_first_order_ones(
    rule: str, loss: str, fsd: str, seed: int
) -> None:
    s = trained(rule, seed, loss, fsd)
    Q, phi, (q_size, slope_size) = q_of(s), phi_of(s), sizes(s)
    value, slope = by_first_order(s)
    assert_equal_rounded(float(Q(phi)), value, s, q_size, "Q")
    learned = {name for name, p in s.optimizer.rule.named_parameters() if p.requires_grad}
    unrolled = {n: g if n in learned else 0 * g for n, g in grad(Q)(phi).items()}
    assert_equal_rounded(flat(unrolled.values()), slope, s, slope_size, "dQ/dφ")


@bounded_apart
@functional_rules
@pytest.mark.parametrize("mode", ["exact", "quadratic"])
@given(seed=seeds)
@share(0.05)
def test_vmap_over_phi_is_a_loop(rule: str, mode: str, seed: int) -> None:
    s = trained(rule, seed, mode, mode)
    Q, phi, (q_size, slope_size) = q_of(s), phi_of(s), sizes(s)
    members = [phi, {name: p - 0.1 * torch.randn_like(p) for name, p in phi.items()}]
    together = {name: torch.stack([m[name] for m in members]) for name in phi}
    q, slopes = vmap(Q)(together), vmap(grad(Q))(together)
    for i, member in enumerate(members):
        # At most 2 = e^0.7 times the step of the first, and four times its square.
        assert_equal_rounded(float(q[i]), float(Q(member)), s, 4 * q_size, "Q")
        one = flat(grad(Q)(member).values())
        got = flat(slope[i] for slope in slopes.values())
        assert_equal_rounded(got, one, s, 4 * slope_size, "dQ/dφ")


@bounded_apart
@functional_rules
@given(seed=seeds)
@share(0.05)
def test_vmap_over_mini_batches_is_a_loop(rule: str, seed: int) -> None:
    """Each with its own g, also where the rule's formula is one of `torch._foreach_*`."""
    s = trained(rule, seed)
    params, phi, (q_size, _) = theta_of(s), phi_of(s), sizes(s)

    def Q(x: Tensor, y: Tensor, x_other: Tensor) -> Tensor:
        def loss(params: Params) -> Tensor:
            return loss_of(s.model, params, x, y)

        return apo.meta_objective(
            phi,
            params,
            grad(loss)(params),
            rule=s.optimizer.rule,
            objective=s.optimizer.objective,
            loss=loss,
            outputs=lambda params: functional_call(s.model, params, (x_other,)),
            state=s.optimizer.rule_state,
        )

    other = torch.randn_like(s.x)
    batches = [torch.stack(pair) for pair in ((s.x, other), (s.y, s.y.flip(0)), (other, s.x))]
    together = vmap(Q)(*batches)
    for i in range(2):
        s.x, s.y, s.x_other = (batch[i] for batch in batches)
        s.backward()
        assert_equal_rounded(float(together[i]), by_first_order(s)[0], s, 4 * q_size, "Q")


@bounded_apart
@all_modes
@given(seed=seeds)
@share(0.05)
def test_vmap_over_an_ensemble_is_each_member(loss: str, fsd: str, seed: int) -> None:
    """Two θ, each with its g and φ."""
    s = trained("ekfac", seed, loss, fsd)
    members = [theta_of(s), {name: 0.9 * p for name, p in theta_of(s).items()}]
    together = {name: torch.stack([m[name] for m in members]) for name in members[0]}

    def Q(params: Params) -> Tensor:
        def own(params: Params) -> Tensor:
            return loss_of(s.model, params, s.x, s.y)

        return apo.meta_objective(
            phi_of(s),
            params,
            grad(own)(params),
            rule=s.optimizer.rule,
            objective=s.optimizer.objective,
            loss=own,
            outputs=lambda params: functional_call(s.model, params, (s.x_other,)),
        )

    q = vmap(Q)(together)
    for i, member in enumerate(members):
        s.model.load_state_dict(member, strict=False)
        s.backward()
        assert_equal_rounded(float(q[i]), by_first_order(s)[0], s, sizes(s)[0], "Q")


@given(seed=seeds)
@share(0.1)
def test_the_hessian_in_log_rates_is_that_of_a_parabola(seed: int) -> None:
    """Q̂ = a η + b η² with η = e^φ has the second derivative a η + 4 b η² in φ."""
    s = trained("sgd", seed, "linear", "quadratic")
    terms = s.optimizer.meta_backward(loss=s.loss, outputs=s.outputs)
    curvature = jacrev(jacrev(q_of(s)))(phi_of(s))["log_lr"]["log_lr"]
    expected = terms.loss + 4 * (terms.fsd + terms.wsd)
    assert_equal_rounded(float(curvature), float(expected), s, 4 * sizes(s)[1], "d²Q̂/dφ²")


# torch.func's forward mode scripts a few formulas, of which torch itself warns.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@all_modes
@given(seed=seeds)
@share(0.05)
def test_the_hessian_is_the_slope_of_the_first_order_meta_gradient(
    loss: str, fsd: str, seed: int
) -> None:
    """Per layer, along a unit direction v, by central differences of APO's dQ/dφ."""
    s = trained("sgd per layer", seed, loss, fsd)
    phi, h = phi_of(s)["log_lr"].clone(), np.finfo(float).eps ** (1 / 3)
    v = torch.randn_like(phi)
    v /= v.norm()

    def slope(t: float) -> np.ndarray:
        with torch.no_grad():
            s.optimizer.rule.get_parameter("log_lr").copy_(phi + t * v)
        return by_first_order(s)[1]

    # The truncation needs the third derivative of the slope: its third difference.
    third = (slope(0.02) - 2 * slope(0.01) + 2 * slope(-0.01) - slope(-0.02)) / (2 * 0.01**3)
    expected = (slope(h) - slope(-h)) / (2 * h)
    curvature = hessian(q_of(s))({"log_lr": phi})["log_lr"]["log_lr"]
    terms = sum(p.numel() for p in s.model.parameters())
    assert_close(
        (curvature @ v).numpy(),
        expected,
        CENTRAL_DIFFERENCE,
        size=terms,
        scale=float(np.linalg.norm(third)) + sizes(s)[1],
        what="H v",
    )


MASK = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
FORMS: dict[str, tuple[Callable[[Tensor], Any], Any]] = {
    **{name: (lambda z: z, bridge.discrepancy(rho)) for name, rho in ALL_DISCREPANCIES.items()},
    "a callable": (lambda z: z, lambda z, z0: (z - z0).pow(4).mean()),
    "several": (lambda z: {"a": z[:, :2], "b": z[:, 2:]}, {"a": "kl", "b": "squared_error"}),
    "in a list": (lambda z: [z[:, :3], z[:, 1:]], "kl"),
    "masked": (lambda z: apo.Masked(z, MASK), "kl"),
    "masked, by a vjp": (lambda z: apo.Masked(z, MASK), apo.Bregman("poisson")),
    "masked tokens": (lambda z: apo.Masked(z.view(5, 2, 2), MASK.outer(MASK[2:4])), "kl"),
    "one masked": (lambda z: (z[:, :3], apo.Masked(z[:, 1:], MASK)), {1: "kl", 0: "kl"}),
}


@pytest.mark.loose("20 is for the exponentials of the Gaussian, and serves all forms.")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fsd", FSDS)
@given(seed=seeds)
@share(0.1)
def test_every_discrepancy_and_every_form_of_outputs(form: str, fsd: Any, seed: int) -> None:
    torch.manual_seed(seed)
    returned, discrepancy = FORMS[form]
    model = nn.Linear(3, 4, dtype=torch.float64)
    x = torch.rand(5, 3, dtype=torch.float64)
    rule = apo.rules.Preconditioned(model, apo.Diagonal, 0.3)
    objective = apo.ProximalObjective(discrepancy, 1.0, 0.0, "linear", fsd)
    optimizer = apo.APO(model, rule, objective, torch.optim.SGD(rule.parameters(), lr=0.1))
    grads = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = grads[name]

    def Q(phi: Params) -> Tensor:
        return apo.meta_objective(
            phi,
            {name: p.detach() for name, p in model.named_parameters()},
            grads,
            rule=rule,
            objective=objective,
            loss=_unused,
            outputs=lambda params: returned(functional_call(model, params, (x,))),
        )

    phi = {name: p.detach() for name, p in rule.named_parameters()}
    terms = optimizer.meta_backward(loss=_unused, outputs=lambda: returned(model(x)))
    # Weights and inputs below 1 and |g| below 5: steps and outputs below 3, e^z below 20, of which
    # the Gaussian has squares. Each of three chained products sums at most 16 terms.
    for got, expected, what in (
        (float(Q(phi)), float(terms.total), "Q"),
        (flat(grad(Q)(phi).values()), flat(p.grad for p in rule.parameters()), "dQ/dφ"),
    ):
        assert_close(got, expected, FUNCTION, size=16, iterations=6, scale=20.0, what=what)


def _unused(*_: object) -> Tensor:
    raise AssertionError("the linear loss term needs no pass")


def test_nothing_moves() -> None:
    """Neither θ, nor buffers, nor φ, nor the memory, nor `.grad`, nor the random state."""
    s = trained("adamw", 0, "quadratic", "quadratic")
    state = [t for ts in s.optimizer.rule_state.values() for t in ts]
    held_by = [*s.model.parameters(), *s.optimizer.rule.parameters()]
    grads = [p.grad for p in held_by if p.grad is not None]

    def trace() -> list[Tensor]:
        held = [*s.model.buffers(), *state, *grads]
        phi = values(s.optimizer.rule)
        return [*values(s.model), *phi, *(t.clone() for t in held), torch.get_rng_state()]

    before = trace()
    Q, phi = q_of(s), phi_of(s)
    given_phi = {name: p.clone() for name, p in phi.items()}
    vmap(grad(Q))({name: torch.stack([p, p + 1]) for name, p in phi.items()})
    jacrev(grad(Q))(phi)
    assert all(map(torch.equal, before, trace()))
    assert all(torch.equal(given_phi[name], p) for name, p in phi.items())
    assert all(p.grad is None or any(p.grad is g for g in grads) for p in held_by)


def test_the_example_of_the_module() -> None:
    s = trained("sgd", 0)
    scope = {"apo": apo, "torch": torch, "F": torch.nn.functional, "model": s.model}
    scope |= {"x": s.x, "y": s.y, "x_other": s.x_other, "objective": s.optimizer.objective}
    assert functional.__doc__ is not None
    exec(functional.__doc__.split("```")[1].removeprefix("python"), scope)
    s.optimizer.rule.load_state_dict(scope["phi"])
    q_size, slope_size = sizes(s)
    value, slope = by_first_order(s)
    assert_equal_rounded(float(scope["Q"](scope["phi"])), value, s, q_size, "Q")
    assert_equal_rounded(flat(scope["slope"].values()), slope, s, slope_size, "dQ/dφ")
    assert scope["curve"].shape == (5,)


def test_the_rule_keeps_what_phi_leaves_out() -> None:
    s = trained("rmsprop", 0)
    phi = phi_of(s)
    assert torch.equal(q_of(s)({"log_eps": phi["log_eps"]}), q_of(s)(phi))


@pytest.mark.parametrize("rule", ["any optimizer", "grouped"])
def test_a_rule_that_moves_an_optimizer_is_refused(rule: str) -> None:
    s = trained(rule, 0)
    message = "`rule` must be a pure function of φ, got LearningRate, .*; use rules.SGD, RMSprop or"
    with pytest.raises(TypeError, match=message):
        q_of(s)(phi_of(s))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"phi": {"lr": torch.ones(())}},
            r"`phi` must have the names \['log_lr'\], got \['lr'\]; take φ from rule.named_param",
        ),
        (
            {"grads": {"weight": torch.ones(2, 2)}},
            r"`grads` must have the names \['weight', 'bias'\], got \['weight'\]; take φ from",
        ),
        (
            {"outputs": None},
            "`outputs` must be a function of the parameters, got None while `fsd_weight` > 0; pass",
        ),
        (
            {"loss": lambda params: params["bias"]},
            r"`loss` must return a scalar tensor, got \(2,\); reduce over the batch with mean",
        ),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    model = nn.Linear(2, 2)
    rule = apo.rules.SGD(model)
    theta = {name: p.detach() for name, p in model.named_parameters()}
    arguments: dict[str, Any] = {
        "phi": {},
        "params": theta,
        "grads": theta,
        "rule": rule,
        "objective": apo.ProximalObjective("kl", 0.1),
        "loss": lambda params: params["bias"].sum(),
        "outputs": lambda params: functional_call(model, params, (torch.ones(1, 2),)),
    }
    with pytest.raises(ValueError, match=message):
        apo.meta_objective(**(arguments | changes))
