"""The one training loop: any model, any problem, a `torch.optim` optimizer or an APO.

symbol   here       meaning
B        `batch`    the mini-batch of the gradient and of Q's loss term
B'       `other`    the mini-batch of Q's function space discrepancy
g        `.grad`    ∇J_B(θ)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import apo_core as apo
from experiments.metering import PeakBytes
from experiments.problems import Batch, Problem
from experiments.recipes import hyperparameters, recipe
from experiments.records import Outcome, Trial
from experiments.registry import Context

Progress = Callable[[int, int, str], None]

TERMS = ("q_loss", "q_fsd", "q_wsd", "meta_gradient")

# Passes of one mini-batch through the network; a backward pass counts as two forward ones.
STEP_PASSES = 3.0
LOSS_PASSES = 3.0  # of a meta-step, at θ'
DISCREPANCY_PASSES = 4.0  # the outputs at θ, and at θ' with their backward pass
TRUST_PASSES = 2.0  # each of the two again after φ has moved, J_B(θ) before; no step is halved

METERED_STEPS = 11  # with two meta-steps at K = 10, the second with everything that a state holds


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    problem: Problem,
    *,
    steps: int,
    record_every: int,
    meta_loss_batch: Literal["same", "fresh"] = "same",
    discrepancy_batch: Literal["same", "fresh"] = "fresh",
    metered_steps: int = METERED_STEPS,
    progress: Progress = lambda done, total, text: None,
) -> Outcome:
    """Take `steps` steps and record every `record_every` of them, and the last.

    A run has diverged when a mini-batch's loss or gradient, or an evaluation, is not finite, or
    when the optimizer cannot factorize its matrices. It stops there; its metrics are infinite.

    Args:
        model: trained in place.
        optimizer: a `torch.optim` optimizer over the model's parameters, or an APO.
        problem: gives mini-batches, their loss and the evaluation.
        steps: how many to take, at least 1.
        record_every: steps from one point of the curves to the next.
        meta_loss_batch: whether Q's loss term is on the mini-batch of the gradient, as in P22
            eq. 12, or on another, as in eq. 13.
        discrepancy_batch: whether Q's function space discrepancy is on a fresh mini-batch, as in
            P22 eq. 12, or on that of the gradient, as in eq. 14.
        metered_steps: in the first so many steps the memory is measured on the CPU, which slows
            them to about a third on a small network.
        progress: called with (done, total, text) at every point of record.

    Returns:
        curves: "step", from 0; what `problem.evaluate` returns, from before the first step to after
            the last; "seconds" of steps and meta-steps so far, and "passes", the same in passes of
            a mini-batch through the network: 3 a step, 7 a meta-step (3 without discrepancy) and 4
            (2) more with a trust region, what is halved there and what an optimizer draws by itself
            (KFAC's factors) left out; "step_ratio" = ‖Δθ‖/‖g‖, the
            effective learning rate of the last step; what `hyperparameters` finds, such as
            "learning_rate"; and of an APO the last meta-step's "q_loss", "q_fsd", "q_wsd" (the
            addends of Q, weights included) and "meta_gradient" (its norm). NaN stands where there
            is no value yet.
        metrics: what `evaluate` returned last, infinite if the run diverged; "steps" taken,
            "passes", "skipped_meta_steps" of an APO, the seconds of training, meta-steps and
            evaluation, and "peak_bytes": on CUDA what the device's allocator had given out at the
            most; on the CPU the parameters, the buffers and all that the metered steps make.
    """
    metrics: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    params = [p for p in model.parameters() if p.requires_grad]
    amortized = optimizer if isinstance(optimizer, apo.APO) else None
    seconds = {"training": 0.0, "meta": 0.0, "evaluation": 0.0}
    passes = 0.0
    on_cuda = bool(params) and params[0].is_cuda
    meter, held = PeakBytes(), _held_bytes(model, optimizer)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(params[0].device)
    terms: dict[str, float] = dict.fromkeys(TERMS, math.nan) if amortized else {}

    def evaluate(step: int, step_ratio: float) -> bool:
        began = perf_counter()
        with evaluation_mode(optimizer):
            values = problem.evaluate(model)
        metrics.update(values, steps=float(step))
        row = {"step": float(step), "seconds": seconds["training"], "passes": passes}
        row |= {"step_ratio": step_ratio, **values, **terms}
        row |= hyperparameters(optimizer)
        for name, value in row.items():
            curves.setdefault(name, []).append(value)
        seconds["evaluation"] += perf_counter() - began
        progress(step, steps, f"loss {values['loss']:.3g}")
        return all(map(math.isfinite, values.values()))

    finite = evaluate(0, math.nan)
    for step in range(1, steps + 1):
        began = perf_counter()
        metered = meter if step <= metered_steps and not on_cuda else nullcontext()
        batch = problem.batch("loss")
        with metered:
            optimizer.zero_grad()
            loss = problem.loss(model, batch)
            loss.backward()
        gradient_norm = _norm([p.grad for p in params if p.grad is not None])
        finite = math.isfinite(loss.item()) and math.isfinite(gradient_norm)
        if not finite:
            metrics["steps"] = float(step - 1)
            break
        passes += STEP_PASSES
        if amortized is not None and amortized.meta_due:
            began_meta = perf_counter()
            with metered:
                terms = _meta_step(
                    amortized,
                    problem,
                    model,
                    batch if meta_loss_batch == "same" else problem.batch("loss"),
                    batch if discrepancy_batch == "same" else problem.batch("discrepancy"),
                )
            passes += _meta_passes(amortized.objective)
            seconds["meta"] += perf_counter() - began_meta
        due = step % record_every == 0 or step == steps
        before = [p.detach().clone() for p in params] if due else []
        try:
            with metered:
                optimizer.step(partial(_known, loss))
        except torch.linalg.LinAlgError:
            finite = False
            metrics["steps"] = float(step - 1)
            break
        seconds["training"] += perf_counter() - began
        if due:
            moved = _norm([p.detach() - b for p, b in zip(params, before, strict=True)])
            finite = evaluate(step, moved / gradient_norm if gradient_norm else 0.0)
            if not finite:
                break

    if not finite:
        metrics.update(dict.fromkeys(problem.evaluate(model), math.inf))
    metrics["passes"] = passes
    metrics["peak_bytes"] = float(
        torch.cuda.max_memory_allocated(params[0].device) if on_cuda else held + meter.peak
    )
    if amortized is not None:
        metrics["skipped_meta_steps"] = float(amortized.skipped_meta_steps)
    seconds["training"] -= seconds["meta"]
    metrics.update({f"{name}_seconds": value for name, value in seconds.items()})
    return Outcome(metrics, curves)


def train_trial(
    trial: Trial,
    context: Context,
    model: nn.Module,
    problem: Problem,
    *,
    steps: int,
    record_every: int,
) -> Outcome:
    """`train` with the trial's recipe, its progress told to the context."""
    return train(
        model,
        recipe(trial.options).build(model, problem),
        problem,
        steps=steps,
        record_every=record_every,
        progress=context.progress,
    )


def train_epochs(
    trial: Trial,
    context: Context,
    model: nn.Module,
    problem: Problem,
    *,
    steps_per_epoch: int,
    points: int,
) -> Outcome:
    """`train_trial` for the trial's "epochs", with about so many points of record."""
    steps = trial.options["epochs"] * steps_per_epoch
    return train_trial(
        trial, context, model, problem, steps=steps, record_every=max(1, steps // points)
    )


@contextmanager
def evaluation_mode(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """θ is what the optimizer would have judged: the average, where it is Schedule-Free."""
    switch: Any = optimizer if hasattr(optimizer, "eval") else None
    if switch is not None:
        switch.eval()
    try:
        yield
    finally:
        if switch is not None:
            switch.train()


def _meta_step(
    amortized: apo.APO, problem: Problem, model: nn.Module, batch: Batch, other: Batch
) -> dict[str, float]:
    """φ ← φ − α ∇Q(φ) on B and B'; the addends of Q and the norm of ∇Q for the curves."""
    with warnings.catch_warnings():
        # counted in the record as "skipped_meta_steps"
        warnings.filterwarnings("ignore", "a meta-step was skipped", RuntimeWarning)
        q = amortized.meta_step(
            loss=partial(problem.loss, model, batch),
            outputs=partial(problem.outputs, model, other),
        )
    gradients = [p.grad for p in amortized.rule.parameters() if p.grad is not None]
    values = (q.loss.item(), q.fsd.item(), q.wsd.item(), _norm(gradients))
    return dict(zip(TERMS, values, strict=True))


def _meta_passes(objective: apo.ProximalObjective) -> float:
    """What a meta-step runs through the network."""
    trust = TRUST_PASSES if objective.trust_factor is not None else 0.0
    discrepancy = DISCREPANCY_PASSES + trust if objective.fsd_weight > 0 else 0.0
    return LOSS_PASSES + trust + discrepancy


def _known(loss: Tensor) -> Any:
    """A closure for optimizers that ask for the loss of the gradient that they are given."""
    return loss


def _held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of parameters and buffers, and of the φ and the state that the optimizer was built with."""
    tensors = tree_leaves((list(model.parameters()), list(model.buffers()), optimizer.state_dict()))
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _norm(tensors: list[Tensor]) -> float:
    """The Euclidean norm of all entries."""
    return torch.stack(torch._foreach_norm(tensors)).norm().item()
