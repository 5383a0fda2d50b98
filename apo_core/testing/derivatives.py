"""The meta-gradient: φ acts, its derivative is right, and meta-optimization reaches the optimum.

symbol    meaning
D(h)      (f(φ + hd) − f(φ − hd)) / 2h, in error by h²f'''/6 and higher orders
|D(2h) − D(h)|   h²|f'''|/2 to leading order: three times what D(h) lacks
h         eps^(1/3), times the largest |φ| if that is above 1

To the truncation the checks add eps^(1/2) of the values' scale: values that err by C·eps make D(h)
err by C·eps^(2/3), and the kit, which does not know the formula, leaves C = eps^(−1/6) to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from apo_core.meta_gradient import MetaProblem
from apo_core.objective import ProximalObjective
from apo_core.optimizer import APO
from apo_core.testing.trial import (
    MAX_SIZE,
    NotApplicable,
    Task,
    Trial,
    at,
    clones,
    eps_of,
    flat,
    norm,
    quadratic,
)
from apo_core.types import Tensors, trainable_parameters


def check_differentiability(trial: Trial) -> None:
    """The update depends on every φ, differentiably."""
    for name, pulled in _meta_gradient(trial, trial.inputs()).items():
        assert pulled is not None, (
            f"the updates must depend on `{name}`, got no graph to it; compute them from the "
            "parameter itself, without .data, .item() or detach(), or APO cannot learn it."
        )
        assert bool(pulled.isfinite().all()), (
            f"the derivative in `{name}` must be finite, got {pulled}; the meta-step would be "
            "skipped."
        )
        assert bool((pulled != 0).any()), (
            f"`{name}` must have an effect on the update, got a derivative of 0; a φ without "
            "effect is never learned. Freeze it by requires_grad_(False), or remove it."
        )


def check_meta_gradient(trial: Trial) -> None:
    """(∂u/∂φ)ᵀ w agrees with central differences for every φ, in a random direction each."""
    params, grads, state = trial.inputs()
    weights = [trial.draw(p) for p in params]

    def value() -> float:
        with torch.no_grad():
            updates, _ = trial.rule(params, grads, state)
        return float(flat(weights) @ flat(updates))

    with torch.no_grad():
        steps, _ = trial.rule(params, grads, state)
    learned = list(trial.phi.values())
    eps = eps_of([*params, *learned])
    pulled = _meta_gradient(trial, (params, grads, state), weights)
    for name, phi in trial.phi.items():
        gradient = pulled[name]
        assert gradient is not None, f"the updates must depend on `{name}`, got no graph to it."
        direction = [trial.draw(p) if p is phi else torch.zeros_like(p) for p in learned]
        expected, truncation, h = _difference(trial, value, direction, eps)
        got = float((gradient * direction[list(trial.phi).index(name)]).sum())
        # A rule may form its update as a difference of parameters, which errs by eps ‖θ‖.
        rounding = norm(weights) * (eps**0.5 * norm(steps) + 4 * eps * norm(params) / h)
        _require_near(got, expected, truncation + rounding, f"the derivative in `{name}`")


def check_gradient_of_q(trial: Trial) -> None:
    """The dQ/dφ of a meta-step agrees with central differences of the Q that it reports."""
    task = trial.task()
    optimizer = trial.optimizer(task)
    if trial.rule.lookahead_from_state and optimizer.rule_state:
        trial.train(optimizer, task, 1)  # so that a memory is not empty
    trial.backward(task)
    loss, outputs = trial.closures(task)
    trial.rule.zero_grad()
    terms = optimizer.meta_backward(loss=loss, outputs=outputs)
    state = optimizer.rule_state if trial.rule.lookahead_from_state else {}
    named = trainable_parameters(trial.model)
    problem = MetaProblem(trial.model, trial.rule, task.objective, named, state, loss, outputs)
    learned = list(trial.phi.values())
    direction = [trial.draw(p) for p in learned]
    eps = eps_of([*trial.params, *learned])
    got = float(flat([p.grad for p in learned if p.grad is not None]) @ flat(direction))
    expected, truncation, _ = _difference(
        trial, lambda: float(problem.terms().total), direction, eps
    )
    scale = sum(abs(float(term)) for term in terms) + abs(expected)
    _require_near(got, expected, truncation + eps**0.5 * scale, "dQ/dφ")


def check_replicas(trial: Trial) -> None:
    """The dQ/dφ of two halves of B average to that of B, and both halves' steps are the same."""
    halves = [trial.synthetic(), trial.synthetic()]
    halves = [Task(half.loss, None, ProximalObjective(wsd_weight=0.1)) for half in halves]

    def mean(model: torch.nn.Module) -> Tensor:
        return 0.5 * (halves[0].loss(model) + halves[1].loss(model))

    whole = Task(mean, None, halves[0].objective)
    trial.start(trial.params)
    gradients, ends = [], []
    for task in (*halves, whole):
        replica = trial.copy()
        optimizer = replica.optimizer(task)
        replica.backward(whole)  # DistributedDataParallel gives every rank the mean gradient
        optimizer.meta_backward(loss=lambda task=task, model=replica.model: task.loss(model))
        gradients.append(flat([p.grad for p in replica.phi.values() if p.grad is not None]))
        optimizer.step()
        ends.append(flat(replica.params))
    eps = eps_of([*trial.params, *trial.phi.values()])
    error = float((0.5 * (gradients[0] + gradients[1]) - gradients[2]).norm())
    allowed = eps**0.5 * float(gradients[0].norm() + gradients[1].norm())
    assert error <= allowed, (
        "the dQ/dφ of two ranks must average to that of one process with the whole batch, got an "
        f"error of {error:.1e} where {allowed:.1e} is allowed; dQ/dφ must be linear in ∇Q."
    )
    assert torch.equal(ends[0], ends[1]), (
        "replicas with equal gradients must take equal steps bit for bit, or ranks drift apart; "
        "a step may depend on θ, g, φ and the state alone."
    )


def check_optimum(trial: Trial) -> None:
    """`linear in phi`: L-BFGS on Q reaches the least Q that the normal equations give."""
    if "linear in phi" not in trial.rule.claims:
        raise NotApplicable("the rule does not claim `linear in phi`")
    numbers = sum(p.numel() for p in trial.phi.values())
    if numbers > MAX_SIZE:
        raise NotApplicable(f"φ has {numbers} entries; use a model for which it has {MAX_SIZE}")
    trial.rule.lookahead_from_state = True
    start = trial.start(trial.params)
    curvatures, targets = trial.coefficients()
    task = Task(quadratic(curvatures, targets), None, ProximalObjective(wsd_weight=0.1))
    trial.backward(task)
    triples = zip(curvatures, trial.params, targets, strict=True)
    grads = [c * (p - t) for c, p, t in triples]

    def update() -> Tensor:
        with torch.no_grad():
            return flat(trial.rule(trial.params, grads, start)[0])

    # Q = J_B(θ) + gᵀu + ½ Σ c u², with λ_WSD in c
    g, c = flat(grads), flat(curvatures) + 0.1
    expected = _least(trial, update, g, c)
    solver = torch.optim.LBFGS(
        trial.rule.parameters(),
        max_iter=100,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    trial.meta_step(APO(trial.model, trial.rule, task.objective, solver), task)
    error = float((update() - expected).norm())
    # A line search cannot see a decrease of Q below its rounding n eps |Q|, and Q rises by
    # ½ c_min r² at a distance r from the optimum.
    eps, size = eps_of([*trial.params, *trial.phi.values()]), g.numel() + 8
    q = float(task.loss(trial.model).detach()) + 0.5 * float((g.square() / c).sum())
    allowed = (2 * size * eps * q / float(c.min())) ** 0.5
    assert error <= allowed, (
        f"meta-optimization must reach the optimum over φ, got a step at a distance {error:.2e} "
        f"from it, allowed {allowed:.2e}; either the derivative in φ is wrong or the update is "
        "not affine in φ."
    )


def _least(trial: Trial, update: Callable[[], Tensor], g: Tensor, c: Tensor) -> Tensor:
    """The u with the least gᵀu + ½ Σ c u² among those that an affine u(φ) can be, (n,)."""
    phi = clones(list(trial.phi.values()))
    origin, columns = update(), []
    for unit in torch.eye(sum(p.numel() for p in phi)):
        pieces = zip(unit.split([p.numel() for p in phi]), phi, strict=True)
        with at(trial.rule, [p + e.view(p.shape).to(p) for e, p in pieces]):
            columns.append(update() - origin)  # of an affine function, its derivative
    jacobian, root = torch.stack(columns, 1).cpu(), c.sqrt().cpu()  # (n, |φ|), (n,)
    target = -g.cpu() / root - root * origin.cpu()
    # By singular values: several φ may give one u.
    best = torch.linalg.lstsq(root[:, None] * jacobian, target, driver="gelsd").solution
    return origin + (jacobian @ best).to(origin)


def _meta_gradient(
    trial: Trial,
    inputs: tuple[Tensors, Tensors, dict[str, Tensors]],
    weights: Tensors | None = None,
) -> dict[str, Tensor | None]:
    """(∂u/∂φ)ᵀ w for each φ, None without a graph; w is drawn if not given."""
    updates, _ = trial.rule(*inputs)
    reached = [
        (u, w)
        for u, w in zip(updates, weights or [trial.draw(u) for u in updates], strict=True)
        if u.requires_grad
    ]
    if not reached:
        return dict.fromkeys(trial.phi)
    steps, drawn = zip(*reached, strict=True)
    pulled = torch.autograd.grad(steps, list(trial.phi.values()), drawn, allow_unused=True)
    return dict(zip(trial.phi, pulled, strict=True))


def _difference(
    trial: Trial, value: Callable[[], float], direction: Tensors, eps: float
) -> tuple[float, float, float]:
    """D(h) of `value` in φ, an upper estimate of its truncation, and h."""
    centre = clones(list(trial.phi.values()))
    largest = max(float(p.abs().max()) for p in centre if p.numel())
    h = eps ** (1 / 3) * max(1.0, largest)

    def slope(step: float) -> float:
        sides = []
        for sign in (step, -step):
            moved = [c + sign * d for c, d in zip(centre, direction, strict=True)]
            with at(trial.rule, moved):
                sides.append(value())
        return (sides[0] - sides[1]) / (2 * step)

    near, far = slope(h), slope(2 * h)
    return near, abs(far - near), h


def _require_near(got: float, expected: float, allowed: float, what: str) -> None:
    assert abs(got - expected) <= allowed, (
        f"{what} must agree with central differences, expected {expected}, got {got}, allowed "
        f"error {allowed}; a wrong one sends the meta-optimizer astray."
    )
