"""What a rule may claim in `UpdateRule.claims`, and whether it is so, for every φ.

symbol   meaning
u(θ, g)  the update from the state before the first step, unless said otherwise
P        the matrix of a rule that is linear in g: u = −Pg
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from apo_core.testing.trial import MAX_SIZE, NotApplicable, Trial, at, clones, eps_of, flat, norm
from apo_core.types import State, Tensors

CLAIMS: dict[str, str] = {
    "descent": "⟨g, u⟩ < 0 for every θ and g ≠ 0, at the first step",
    "psd": "u = −Pg with a symmetric positive semidefinite P, at the first step",
    "linear in phi": "u(½φ + ½φ') = ½u(φ) + ½u(φ')",
    "scale invariant": "u of c·g at every step is u of g, c > 0",
    "scale equivariant": "u of c·g at every step is c·u of g, c > 0",
    "translation invariant": "u does not depend on θ",
    "permutation equivariant": "permuting a parameter's entries permutes its update",
    "rotation equivariant": "rotating a parameter, as a vector, rotates its update",
}
"""Every claim that a rule may make, and what it says: for every φ."""


def check_claims(trial: Trial) -> None:
    """Every claim is one that the kit knows, so that none goes unchecked."""
    unknown = sorted(set(trial.rule.claims) - set(CLAIMS))
    assert not unknown, (
        f"`claims` must be chosen from {sorted(CLAIMS)}, got {unknown}; the kit checks these, and "
        "users rely on them."
    )


def check_descent(trial: Trial) -> None:
    """`descent`: ⟨g, u⟩ < 0 for random g and −g, at θ and 1000 θ, at φ, −φ and a random φ."""
    _require_claim(trial, "descent")
    params = trial.params
    start = trial.start(params)
    for where in _phis(trial):
        grads = trial.gradients()
        for sign, size in itertools.product((1.0, -1.0), (1.0, 1e3)):  # a decay shows at large θ
            g = [sign * gradient for gradient in grads]
            slope = float(flat(g) @ _step(trial, [size * p for p in params], g, start))
            assert slope < 0, (
                f"the update must be a descent direction at {where}, ⟨g, u⟩ < 0, got {slope}; a "
                "wrong sign climbs the loss. The update is added to θ: −ηg, not ηg."
            )


def check_psd(trial: Trial) -> None:
    """`psd`: u = −Pg, P symmetric with no negative eigenvalue, at φ, −φ and a random one."""
    _require_claim(trial, "psd")
    params = trial.params
    start = trial.start(params)
    n = sum(p.numel() for p in params)
    if n > MAX_SIZE:
        raise NotApplicable(f"the model has {n} parameters; use one of at most {MAX_SIZE}")
    eps = eps_of([*params, *trial.phi.values()])
    for where in _phis(trial):
        P = _matrix(trial, params, start)
        grads = trial.gradients()
        size = float(P.norm())
        # The formula's condition is unknown: half the digits are left to it.
        error = float((P @ flat(grads) + _step(trial, params, grads, start)).norm())
        assert error <= eps**0.5 * size * norm(grads), (
            f"the update must be linear in g at {where}, −Pg, got {error:.2e} between P by columns "
            "and the update; without it there is no P to be semidefinite."
        )
        skew = float((P - P.T).norm())
        assert skew <= eps**0.5 * size, (
            f"P must be symmetric at {where}, got ‖P − Pᵀ‖ = {skew:.2e} beside ‖P‖ = {size:.2e}; "
            "Theorem 1's optimum is, and a semidefinite P is a metric."
        )
        least = float(torch.linalg.eigvalsh(0.5 * (P + P.T))[0])
        assert least >= -(eps**0.5) * size, (
            f"P must be positive semidefinite at {where}, got the eigenvalue {least:.2e} beside "
            f"‖P‖ = {size:.2e}; along its eigenvector every step climbs. Write P as a square, BBᵀ."
        )


def check_dense(trial: Trial) -> None:
    """Where a rule has `dense()`, it is the P of u = −Pg."""
    dense = getattr(trial.rule, "dense", None)
    if dense is None:
        raise NotApplicable("the rule has no dense()")
    params = trial.params
    start = trial.start(params)
    if sum(p.numel() for p in params) > MAX_SIZE:
        raise NotApplicable(f"the model has more than {MAX_SIZE} parameters")
    eps = eps_of([*params, *trial.phi.values()])
    for where in _phis(trial):
        P = dense().detach().double()
        grads = trial.gradients()
        n = flat(grads).numel()
        assert tuple(P.shape) == (n, n), f"dense() must have shape ({n}, {n}), got {tuple(P.shape)}"
        error = float((P @ flat(grads) + _step(trial, params, grads, start)).norm())
        allowed = eps**0.5 * float(P.norm()) * norm(grads)
        assert error <= allowed, (
            f"dense() must be the P of the update −Pg at {where}, each parameter flattened "
            f"row-major, got a difference of {error:.2e}, allowed {allowed:.2e}; oracles compare "
            "dense(), so a wrong one hides a wrong step."
        )


def check_linear_in_phi(trial: Trial) -> None:
    """`linear in phi`: the update half-way between two φ is half-way between theirs."""
    _require_claim(trial, "linear in phi")
    params, grads = trial.params, trial.gradients()
    start = trial.start(params)
    ends = [clones(list(trial.phi.values()))]
    ends.append([p + trial.draw(p) for p in ends[0]])
    ends.append([0.5 * (a + b) for a, b in zip(*ends, strict=True)])
    updates = []
    for phi in ends:
        with at(trial.rule, phi):
            updates.append(_step(trial, params, grads, start))
    eps = eps_of([*params, *trial.phi.values()])
    error = float((0.5 * (updates[0] + updates[1]) - updates[2]).norm())
    allowed = eps**0.5 * float(updates[0].norm() + updates[1].norm())
    assert error <= allowed, (
        f"the update must be affine in φ, got {error:.2e} off half-way, allowed {allowed:.2e}; "
        "closed-form optima of Q̂ hold for affine rules alone (exp(φ) and φ² are not)."
    )


def check_scale_invariance(trial: Trial) -> None:
    """`scale invariant`: gradients multiplied by c > 0 at every step give the same updates."""
    _require_claim(trial, "scale invariant")
    for c in (1e-3, 1e3):
        _require_equivariant(trial, lambda ts, c=c: [c * t for t in ts], None, None, f"{c}·g")


def check_scale_equivariance(trial: Trial) -> None:
    """`scale equivariant`: gradients multiplied by c > 0 give updates multiplied by c."""
    _require_claim(trial, "scale equivariant")
    for c in (1e-3, 1e3):

        def times(ts: Tensors, c: float = c) -> Tensors:
            return [c * t for t in ts]

        _require_equivariant(trial, times, None, times, f"{c}·g")


def check_translation_invariance(trial: Trial) -> None:
    """`translation invariant`: the same gradients at another θ give the same updates."""
    _require_claim(trial, "translation invariant")
    shifts = [trial.draw(p) for p in trial.params]

    def shifted(ts: Tensors) -> Tensors:
        return [t + s for t, s in zip(ts, shifts, strict=True)]

    _require_equivariant(trial, None, shifted, None, "θ + a")


def check_permutation_equivariance(trial: Trial) -> None:
    """`permutation equivariant`: θ and g permuted within each parameter permute the updates."""
    _require_claim(trial, "permutation equivariant")
    orders = [torch.randperm(p.numel(), generator=trial.generator) for p in trial.params]

    def permuted(ts: Tensors) -> Tensors:
        pairs = zip(ts, orders, strict=True)
        return [t.reshape(-1)[order.to(t.device)].view(t.shape) for t, order in pairs]

    _require_equivariant(trial, permuted, permuted, permuted, "permuted θ and g")


def check_rotation_equivariance(trial: Trial) -> None:
    """`rotation equivariant`: θ and g rotated within each parameter rotate the updates."""
    _require_claim(trial, "rotation equivariant")
    if max(p.numel() for p in trial.params) > MAX_SIZE:
        raise NotApplicable(f"a parameter has more than {MAX_SIZE} entries")
    squares = [trial.draw(p.new_zeros(p.numel(), p.numel())) for p in trial.params]
    rotations = [torch.linalg.qr(square)[0] for square in squares]

    def rotated(ts: Tensors) -> Tensors:
        return [(R @ t.reshape(-1)).view(t.shape) for t, R in zip(ts, rotations, strict=True)]

    _require_equivariant(trial, rotated, rotated, rotated, "rotated θ and g")


def check_elementwise(trial: Trial) -> None:
    """`elementwise`: a change of one entry of θ and g changes that entry of the update alone."""
    if not getattr(trial.rule, "elementwise", False):
        raise NotApplicable("the rule does not set `elementwise`")
    params, grads, state = trial.inputs()
    before = _step(trial, params, grads, state)
    for index, p in enumerate(params):
        if p.numel() == 0:
            continue
        entry = int(torch.randint(p.numel(), (1,), generator=trial.generator))
        moved = [clones(params), clones(grads)]
        for tensors in moved:
            tensors[index].view(-1)[entry] += 1.0
        changed = _step(trial, moved[0], moved[1], state) != before
        place = sum(q.numel() for q in params[:index]) + entry
        changed[place] = False
        assert not bool(changed.any()), (
            f"a change of entry {entry} of parameter {index} must change no other entry of the "
            f"update, got {int(changed.sum())} changed; a rank of FSDP2 sees its own shard alone."
        )


def _require_claim(trial: Trial, claim: str) -> None:
    if claim not in trial.rule.claims:
        raise NotApplicable(f"the rule does not claim `{claim}`")


def _phis(trial: Trial) -> Iterator[str]:
    """Moves the rule to φ, to −φ, and to φ plus standard normal noise, one after the other."""
    own = clones(list(trial.phi.values()))
    places = {
        "its φ": own,
        "−φ": [-p for p in own],
        "a random φ": [p + trial.draw(p) for p in own],
    }
    for where, phi in places.items():
        with at(trial.rule, phi):
            yield where


def _step(trial: Trial, params: Tensors, grads: Tensors, state: State) -> Tensor:
    """u as one vector (n,)."""
    with torch.no_grad():
        return flat(trial.rule(params, grads, state)[0])


def _matrix(trial: Trial, params: Tensors, state: State) -> Tensor:
    """P by columns, (n, n): minus the updates of unit gradients."""
    sizes = [p.numel() for p in params]
    columns = []
    for unit in torch.eye(sum(sizes), dtype=params[0].dtype, device=params[0].device):
        pieces = zip(unit.split(sizes), params, strict=True)
        columns.append(-_step(trial, params, [e.view(p.shape) for e, p in pieces], state))
    return torch.stack(columns, 1)


def _require_equivariant(
    trial: Trial,
    of_grads: Callable[[Tensors], Tensors] | None,
    of_params: Callable[[Tensors], Tensors] | None,
    of_updates: Callable[[Tensors], Tensors] | None,
    what: str,
) -> None:
    """The second of two updates, after inputs were mapped, is the mapped second update."""
    params, history = trial.params, [trial.gradients(), trial.gradients()]
    start = trial.start(params)

    def second(params: Tensors, history: list[Tensors]) -> Tensors:
        with torch.no_grad():
            _, state = trial.rule(params, history[0], start)
            return trial.rule(params, history[1], state)[0]

    def mapped(function: Callable[[Tensors], Tensors] | None, tensors: Tensors) -> Tensors:
        return tensors if function is None else function(tensors)

    moved = mapped(of_params, params)
    others = [mapped(of_grads, grads) for grads in history]
    eps = eps_of([*params, *trial.phi.values()])
    for where in _phis(trial):
        expected = mapped(of_updates, second(params, history))
        error = float((flat(second(moved, others)) - flat(expected)).norm())
        # Half the digits are left to the formula; one that subtracts θ from θ' errs by eps ‖θ‖.
        allowed = eps**0.5 * norm(expected) + 4 * eps * (norm(params) + norm(moved))
        assert error <= allowed, (
            f"the update for {what} must be the one that the claim predicts at {where}, got a "
            f"difference of {error:.2e}, allowed {allowed:.2e}; take the claim back, or find what "
            "breaks it (an ε, a weight decay, a norm)."
        )
