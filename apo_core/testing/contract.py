"""What every rule owes the engine: pure updates of the right form, a state, and words on φ."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace

import torch
from torch import nn

from apo_core.testing.trial import NotApplicable, Trial, clones, same, tensors_of
from apo_core.types import trainable_parameters
from apo_core.update_rule import UpdateRule

ACCELERATORS = ("cuda", "mps", "xpu")
"""Where `check_devices` looks for a second device."""


def check_updates(trial: Trial) -> None:
    """One finite update for each parameter, of its shape, dtype and device."""
    params, grads, state = trial.inputs()
    updates, _ = trial.rule(params, grads, state)
    assert len(updates) == len(params), (
        f"one update for each of the {len(params)} parameters is needed, got {len(updates)}; the "
        "engine adds them in order."
    )
    for name, p, u in zip(trainable_parameters(trial.model), params, updates, strict=True):
        assert u.shape == p.shape, (
            f"the update of `{name}` must have shape {tuple(p.shape)}, got {tuple(u.shape)}; it is "
            "added to the parameter."
        )
        assert u.dtype == p.dtype, (
            f"the update of `{name}` must be {p.dtype}, got {u.dtype}; round it once, at the end."
        )
        assert u.device == p.device, (
            f"the update of `{name}` must be on {p.device}, got {u.device}."
        )
        assert bool(u.isfinite().all()), (
            f"the update of `{name}` must be finite at a finite gradient, got {u}; the engine "
            "skips such a step."
        )


def check_purity(trial: Trial) -> None:
    """Neither the arguments, φ, buffers, nor the random state change, and a second call agrees."""
    params, grads, state = trial.inputs()
    held = [*trial.rule.parameters(), *trial.rule.buffers()]
    arguments = [*params, *grads, *tensors_of(state)]
    before, kept = clones(arguments), clones(held)
    random_state = torch.get_rng_state()
    first, first_state = trial.rule(params, grads, state)
    second, second_state = trial.rule(params, grads, state)
    assert torch.equal(random_state, torch.get_rng_state()), (
        "the update must draw no random numbers: the lookahead and the step must be the same."
    )
    assert same(before, arguments), (
        "params, grads and state must not be changed in place: the same gradients serve the "
        "lookahead and the step."
    )
    assert same(kept, held), "φ and buffers must not change in `forward`: only Q's descent moves φ."
    first, second = [*first, *tensors_of(first_state)], [*second, *tensors_of(second_state)]
    assert same(first, second), (
        "two calls with equal arguments must agree: the lookahead would count as a step; keep what "
        "the rule remembers in the state that it returns."
    )


def check_state(trial: Trial) -> None:
    """A state of one graph-free tensor for each parameter, whose entries last and change."""
    params, grads = trial.params, trial.gradients()
    start = trial.start(params)
    _, state = trial.rule(params, grads, start)
    for name, tensors in state.items():
        assert len(tensors) == len(params), (
            f"`state[{name!r}]` must hold one tensor for each of the {len(params)} parameters, got "
            f"{len(tensors)}; so it is saved, loaded, and kept where a parameter has no gradient."
        )
        assert not any(t.requires_grad for t in tensors), (
            f"`state[{name!r}]` must have no graph: the state is fixed for φ (P22 footnote 1), and "
            "a graph would grow with every step."
        )
    lost = sorted(set(start) - set(state))
    assert not lost, (
        f"the next state must keep the entries of `init_state`, got one without {lost}; the rule "
        "would forget them after one step."
    )
    if not start:
        return
    assert not same(tensors_of(start), tensors_of(state)), (
        "the next state must differ from the first one after a step with a non-zero gradient, got "
        "it unchanged; return what the rule has to remember."
    )


def check_empty_state(trial: Trial) -> None:
    """An empty state `{}` gives a finite update, where the lookahead leaves the history out."""
    params, grads = trial.params, trial.gradients()
    start = trial.start(params)
    if trial.rule.lookahead_from_state and start:
        raise NotApplicable("the lookahead starts from the rule's state, which is never empty")
    updates, _ = trial.rule(params, grads, {})
    assert all(bool(u.isfinite().all()) for u in updates), (
        "an empty state must give finite updates: the meta-step looks ahead with `{}`, as if there "
        "were no history (P18 section 5)."
    )


def check_zero_gradient(trial: Trial) -> None:
    """Finite updates and finite φ-gradients at g = 0, as in a dead unit."""
    params, grads, state = trial.inputs()
    states = {"after a step": state, "before the first step": trial.start(params)}
    for when, known in states.items():
        updates, _ = trial.rule(params, [torch.zeros_like(g) for g in grads], known)
        total = torch.stack([u.sum() for u in updates]).sum()
        pulled: tuple[torch.Tensor | None, ...] = ()
        if total.requires_grad:
            pulled = torch.autograd.grad(total, list(trial.phi.values()), allow_unused=True)
        for value in [*updates, *(p for p in pulled if p is not None)]:
            assert bool(value.isfinite().all()), (
                f"a zero gradient {when} must give finite updates and derivatives, got {value}; "
                "add an ε under the root or the fraction."
            )


def check_dtypes(trial: Trial) -> None:
    """For float64, float32 and bfloat16 parameters: their dtype, and φ in at least 32 bits."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rebuilt = _rebuilt(trial, dtype=dtype)
        for name, phi in rebuilt.phi.items():
            assert phi.dtype in (torch.float32, torch.float64), (
                f"φ `{name}` must be float32 or float64 for {dtype} parameters, got {phi.dtype}; "
                "meta-steps are smaller than 16 bits resolve."
            )
        check_updates(rebuilt)


def check_devices(trial: Trial) -> None:
    """On every accelerator here: updates on the parameters' device, and near those of the CPU."""
    found = [name for name in ACCELERATORS if _available(name)]
    if not found:
        raise NotApplicable("this machine has no accelerator")
    for name in found:
        here, there = (
            _rebuilt(trial, dtype=torch.float32, device=device) for device in ("cpu", name)
        )
        check_updates(there)
        grads = here.gradients()
        on_cpu, _ = here.rule(here.params, grads, here.start(here.params))
        params = there.params
        moved, _ = there.rule(params, [g.to(name) for g in grads], there.start(params))
        # The kit does not know the formula's condition: half of float32's digits are left to it.
        for a, b in zip(on_cpu, moved, strict=True):
            error, size = float((a - b.cpu()).norm().detach()), float(a.norm().detach())
            assert error <= torch.finfo(torch.float32).eps ** 0.5 * size, (
                f"the update on {name} must be that of the CPU, got a relative error of "
                f"{error / size:.1e}; make tensors on the device of their parameter."
            )


def check_empty_parameter(trial: Trial) -> None:
    """A parameter without entries gets an update without entries, and disturbs no other."""
    model = trial.copy().model
    model.register_parameter("nothing", nn.Parameter(trial.params[0].new_zeros(0)))
    rebuilt = _rebuilt(replace(trial, model=model))
    names = list(trainable_parameters(model))
    params, grads, state = rebuilt.inputs()
    updates, _ = rebuilt.rule(params, grads, state)
    got = tuple(updates[names.index("nothing")].shape)
    assert got == (0,), f"the update of an empty parameter must be empty, (0,), got {got}."
    assert all(bool(u.isfinite().all()) for u in updates), (
        "the updates beside an empty parameter must be finite: a mean over no entries is NaN."
    )


def check_deep_copy(trial: Trial) -> None:
    """A deep copy takes the same step, also once the original's φ has changed."""
    params, grads, state = trial.inputs()
    twin = trial.copy()
    expected, _ = trial.rule(params, grads, state)
    expected = clones(expected)
    with torch.no_grad():
        for phi in trial.phi.values():
            phi.add_(0.5)
    got, _ = twin.rule(params, grads, state)
    assert same(expected, got), (
        "a deep copy of the rule must take the step of the original, and share nothing with it: "
        "populations and checkpoints are made of copies."
    )


def check_documentation(trial: Trial) -> None:
    """The docstrings name each φ, or the quantity of which it is a coordinate, and that."""
    for name in trial.phi:
        owner, leaf = _owner(trial.rule, name), name.rpartition(".")[2]
        words = set(re.findall(r"\w+", (inspect.getdoc(type(owner)) or "").lower()))
        assert words & {leaf.lower(), leaf.lower().removeprefix("log_")}, (
            f"the docstring of {type(owner).__name__} must say what `{leaf}` is, and its unit, got "
            "no mention of it; whoever chooses a meta-learning rate or reads a log needs it."
        )
        assert not leaf.startswith("log_") or any(word.startswith("log") for word in words), (
            f"the docstring of {type(owner).__name__} must say that `{leaf}` is a logarithm, got "
            "no word of it; a meta-step of 0.1 then multiplies the quantity by 1.1."
        )


def _owner(rule: UpdateRule, name: str) -> nn.Module:
    """The innermost module that is no plain container of torch and holds the φ of that name."""
    path = name.split(".")[:-1]
    for end in range(len(path), 0, -1):
        module = rule.get_submodule(".".join(path[:end]))
        if not type(module).__module__.startswith("torch."):
            return module
    return rule


def _rebuilt(trial: Trial, dtype: torch.dtype | None = None, device: str | None = None) -> Trial:
    """The trial with the rule built anew on a converted copy of the model."""
    if trial.build is None:
        raise NotApplicable("it needs the rule's class or a factory, got an instance")
    if hasattr(trial.rule, "observe"):
        raise NotApplicable("a rule that observes passes would need mini-batches in every dtype")
    model = trial.copy().model.to(device=device, dtype=dtype)
    return replace(trial, rule=trial.build(model), model=model, given=None)


def _available(kind: str) -> bool:
    module = getattr(torch, kind, None)
    return module is not None and bool(module.is_available())
