"""The rule inside APO: meta-steps, steps, checkpoints, and gradients that are missing or broken."""

from __future__ import annotations

import copy
import io
import math
import warnings

import torch

from apo_core.testing.trial import NotApplicable, Trial, clones, same, tensors_of
from apo_core.types import trainable_parameters


def check_meta_step(trial: Trial) -> None:
    """A meta-step changes φ and nothing else: θ, `.grad`, buffers, state, random numbers."""
    task = trial.task()
    optimizer = trial.optimizer(task)
    trial.backward(task)
    kept = {
        "θ": list(trial.model.parameters()),
        "the gradients": [p.grad for p in trial.model.parameters() if p.grad is not None],
        "the model's buffers": list(trial.model.buffers()),
        "the rule's buffers": list(trial.rule.buffers()),
        "the rule's state": tensors_of(optimizer.rule_state),
    }
    before = {what: clones(tensors) for what, tensors in kept.items()}
    random_state, phi = torch.get_rng_state(), clones(list(trial.phi.values()))
    trial.meta_step(optimizer, task)
    for what, tensors in kept.items():
        assert same(before[what], tensors), (
            f"a meta-step must leave {what} alone: it only looks ahead, and the step that follows "
            "starts where it did."
        )
    assert torch.equal(random_state, torch.get_rng_state()), (
        "a meta-step must leave the random state alone, or runs with another interval differ."
    )
    assert not same(phi, list(trial.phi.values())), (
        "a meta-step must change φ, got it unchanged; nothing would be learned."
    )


def check_step(trial: Trial) -> None:
    """A step moves θ by the update of `forward`, and keeps the state that it returned."""
    task = trial.task()
    optimizer = trial.optimizer(task)
    trial.train(optimizer, task, 1)
    trial.backward(task)
    params = clones(trial.params)
    held = trainable_parameters(trial.model).values()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in held]
    with torch.no_grad():
        updates, state = trial.rule(params, grads, copy.deepcopy(optimizer.rule_state))
    optimizer.step()
    expected = [p + u for p, u in zip(params, updates, strict=True)]
    assert same(expected, trial.params), (
        "a step must add the update of `forward` to θ bit for bit: what was looked ahead to is "
        "what is done."
    )
    assert same(tensors_of(state), tensors_of(optimizer.rule_state)), (
        "a step must keep the state that `forward` returned; the next update needs it."
    )
    assert not same(params, trial.params), "a step must move θ, got it unchanged."


def check_save_load(trial: Trial) -> None:
    """φ is all in `state_dict`: a loaded rule takes the same step."""
    params, grads, state = trial.inputs()
    saved = copy.deepcopy(trial.rule.state_dict())
    expected, _ = trial.rule(params, grads, state)
    expected = clones(expected)
    with torch.no_grad():
        for phi in trial.rule.parameters():
            phi.add_(0.5)
    trial.rule.load_state_dict(saved)
    got, _ = trial.rule(params, grads, state)
    assert same(expected, got), (
        "a rule with its `state_dict` loaded must take the step that it took when it was saved; "
        "keep φ in nn.Parameters and other tensors in buffers."
    )


def check_resume(trial: Trial) -> None:
    """A run that is saved after 2 steps and loaded into a fresh rule goes on bit for bit."""
    task, fresh = trial.task(), trial.copy()
    optimizer = trial.optimizer(task)
    trial.train(optimizer, task, 2)
    file = io.BytesIO()
    torch.save({"model": trial.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    random_state = torch.get_rng_state()
    trial.train(optimizer, task, 2)

    with torch.no_grad():
        for phi in fresh.rule.parameters():
            phi.add_(0.5)  # so that there is something to overwrite
    again = fresh.optimizer(task)
    file.seek(0)
    try:
        loaded = torch.load(file, weights_only=True)
    except Exception as error:
        raise AssertionError(
            "the state must load with weights_only=True, got something else than tensors in lists "
            "by name; checkpoints from strangers must be safe to open."
        ) from error
    fresh.model.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(random_state)
    fresh.train(again, task, 2)
    for what, ended, resumed in (
        ("θ", trial.params, fresh.params),
        ("φ", list(trial.phi.values()), list(fresh.phi.values())),
    ):
        assert same(clones(ended), clones(resumed)), (
            f"{what} after 2 steps, a checkpoint and 2 steps must be that after 4 steps, bit for "
            "bit; what a step needs of its past belongs into the state that `forward` returns, or "
            "into buffers of the rule, not into attributes."
        )


def check_missing_gradient(trial: Trial) -> None:
    """A parameter without a gradient stays, its state too, and the others move."""
    held = list(trainable_parameters(trial.model).values())
    if len(held) == 1:
        raise NotApplicable("the model has one parameter alone")
    task = trial.task()
    optimizer = trial.optimizer(task)
    trial.train(optimizer, task, 1)
    trial.backward(task)
    held[-1].grad = None
    before, state = clones(held), copy.deepcopy(optimizer.rule_state)
    trial.meta_step(optimizer, task)
    optimizer.step()
    after = optimizer.rule_state
    assert torch.equal(before[-1], held[-1]), (
        "a parameter without gradient must stay: it took no part in the loss (a frozen branch)."
    )
    assert all(torch.equal(state[name][-1], after[name][-1]) for name in state.keys() & after), (
        "the state of a parameter without gradient must stay, as in torch.optim."
    )
    assert not same(before[:-1], clones(held[:-1])), "the other parameters must move, got none."
    assert all(bool(p.isfinite().all()) for p in [*held, *trial.phi.values()]), (
        "θ and φ must stay finite where a gradient is missing."
    )


def check_non_finite_gradient(trial: Trial) -> None:
    """A gradient with a NaN or an infinity changes neither θ, φ nor the state; training goes on."""
    task = trial.task()
    optimizer = trial.optimizer(task)
    trial.train(optimizer, task, 1)
    for value in (math.nan, math.inf):
        trial.backward(task)
        first = next(p for p in trial.model.parameters() if p.grad is not None)
        assert first.grad is not None
        first.grad.view(-1)[0] = value
        rule = trial.rule
        kept = [*trial.model.parameters(), *rule.parameters(), *rule.buffers()]
        before, state = clones(kept), copy.deepcopy(optimizer.rule_state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the engine says what it skips
            trial.meta_step(optimizer, task)
            optimizer.step()
        assert same(before, kept), (
            f"a gradient with {value} must change neither θ nor φ; one bad mini-batch would end "
            "the run."
        )
        assert same(tensors_of(state), tensors_of(optimizer.rule_state)), (
            f"a gradient with {value} must leave the state as it was; a NaN in a moving average "
            "never leaves it."
        )
    trial.train(optimizer, task, 1)
    assert not same(before[: len(trial.params)], trial.params), (
        "training must go on after a gradient that was not finite, got no step; the rule keeps "
        "something of it outside the state."
    )
    assert all(bool(p.isfinite().all()) for p in [*trial.params, *trial.phi.values()]), (
        "θ and φ must be finite after a gradient that was not, got NaN or infinity; the rule keeps "
        "something of it outside the state."
    )
