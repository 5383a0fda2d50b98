"""The checks by name, and the two ways to run them: all at once, or one a pytest test."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from apo_core.testing import claims, contract, derivatives, training
from apo_core.testing.trial import Build, NotApplicable, Task, Trial
from apo_core.update_rule import UpdateRule

CHECKS: dict[str, Callable[[Trial], None]] = {
    "updates": contract.check_updates,
    "purity": contract.check_purity,
    "state": contract.check_state,
    "differentiability": derivatives.check_differentiability,
    "meta-gradient": derivatives.check_meta_gradient,
    "zero gradient": contract.check_zero_gradient,
    "empty state": contract.check_empty_state,
    "claims": claims.check_claims,
    "descent": claims.check_descent,
    "psd": claims.check_psd,
    "dense": claims.check_dense,
    "linear in phi": claims.check_linear_in_phi,
    "scale invariance": claims.check_scale_invariance,
    "scale equivariance": claims.check_scale_equivariance,
    "translation invariance": claims.check_translation_invariance,
    "permutation equivariance": claims.check_permutation_equivariance,
    "rotation equivariance": claims.check_rotation_equivariance,
    "elementwise": claims.check_elementwise,
    "save and load": training.check_save_load,
    "deep copy": contract.check_deep_copy,
    "meta-step": training.check_meta_step,
    "step": training.check_step,
    "resume": training.check_resume,
    "missing gradient": training.check_missing_gradient,
    "non-finite gradient": training.check_non_finite_gradient,
    "gradient of Q": derivatives.check_gradient_of_q,
    "replicas": derivatives.check_replicas,
    "optimum": derivatives.check_optimum,
    "dtypes": contract.check_dtypes,
    "devices": contract.check_devices,
    "empty parameter": contract.check_empty_parameter,
    "documentation": contract.check_documentation,
}
"""The checks by name, in the order in which they run."""


class Result(NamedTuple):
    """What one check found; a check that failed unexpectedly is an exception instead."""

    outcome: Literal["passed", "skipped", "expected failure"]
    reason: str = ""


def check_update_rule(
    rule: UpdateRule | Build,
    model: nn.Module,
    task: Task | None = None,
    *,
    seed: int = 0,
    checks: Iterable[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    gradient_scale: float = 1.0,
) -> dict[str, Result]:
    """Run checks on copies of `rule` and `model`, and stop at the first that fails.

    Args:
        rule: the rule under test, built on `model`; or its class, or a function model -> rule,
            with which more checks apply (other dtypes and devices). φ must stand where the rule is
            differentiable.
        model: any small module; its parameters in float64 make the checks sharpest.
        task: passes of the model, and Q. By default a quadratic loss of the parameters, without a
            pass.
        seed: of all random numbers.
        checks: names from `CHECKS`; all by default.
        expected_failures: a reason for each check that is known to fail.
        gradient_scale: the size of an entry of the random gradients; those of the task have theirs.

    Returns:
        For each check whether it passed, or was skipped or failed as expected, and why.

    Raises:
        AssertionError: a check failed, or passed where a failure was expected; it is named.
        TypeError: `rule` is neither an UpdateRule nor makes one.
        ValueError: a name is that of no check.
    """
    chosen = list(CHECKS if checks is None else checks)
    known = dict(expected_failures or {})
    _require_names("checks", chosen)
    _require_names("expected_failures", known)
    options: dict[str, Any] = {"seed": seed, "gradient_scale": gradient_scale}
    return {
        name: _run(name, rule, model, task, expected=known.get(name), **options) for name in chosen
    }


def parametrize_with_checks(
    rules: Sequence[Build],
    model: Callable[[], nn.Module] | None = None,
    task: Task | None = None,
    *,
    expected_failures: Mapping[str, str] | None = None,
) -> Any:
    """A pytest decorator: the test takes `check` and calls it, once for each rule and check.

    Args:
        rules: classes of rules, or functions model -> rule.
        model: makes the model; by default a perceptron in float64.
        task: as in `check_update_rule`.
        expected_failures: a reason for each check that is known to fail, for all the rules: the
            test is marked as a strict xfail.

    Raises:
        ValueError: `expected_failures` names no check.
    """
    pytest = importlib.import_module("pytest")  # the caller's: the engine does not depend on it
    known = dict(expected_failures or {})
    _require_names("expected_failures", known)
    make = model or perceptron

    def run(rule: Build, name: str) -> None:
        result = _run(name, rule, make(), task)
        if result.outcome == "skipped":
            pytest.skip(result.reason)

    def marks(name: str) -> list[Any]:
        expected = {"reason": known.get(name), "raises": AssertionError, "strict": True}
        return [pytest.mark.xfail(**expected)] if name in known else []

    cases = [
        pytest.param(
            partial(run, rule, name),
            id=f"{getattr(rule, '__name__', type(rule).__name__)}-{name}",
            marks=marks(name),
        )
        for rule in rules
        for name in CHECKS
    ]
    return pytest.mark.parametrize("check", cases)


def perceptron() -> nn.Module:
    """A small network in float64, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def _run(
    name: str,
    rule: UpdateRule | Build,
    model: nn.Module,
    task: Task | None,
    *,
    seed: int = 0,
    gradient_scale: float = 1.0,
    expected: str | None = None,
) -> Result:
    """One check on copies; torch's random state is as before afterwards."""
    build = None if isinstance(rule, UpdateRule) else rule
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("error", "a (meta-)?step was skipped", RuntimeWarning)
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        trial = Trial(*_copies(rule, model), generator, build, task, gradient_scale)
        try:
            CHECKS[name](trial)
        except NotApplicable as reason:
            return Result("skipped", str(reason))
        except Exception as failure:
            if expected is not None:
                return Result("expected failure", expected)
            raise AssertionError(_message(name, trial.rule, failure)) from failure
    if expected is not None:
        raise AssertionError(
            f"{type(trial.rule).__name__} passes `{name}`, which was expected to fail ({expected});"
            " take it out of `expected_failures`."
        )
    return Result("passed")


def _message(name: str, rule: UpdateRule, failure: Exception) -> str:
    start = f"{type(rule).__name__} fails `{name}`: "
    if isinstance(failure, AssertionError):
        return f"{start}{failure}"
    demand = (CHECKS[name].__doc__ or "").partition("\n")[0]
    return f"{start}{type(failure).__name__}: {failure} (The check demands: {demand})"


def _copies(rule: object, model: nn.Module) -> tuple[UpdateRule, nn.Module]:
    """Copies of rule and model that belong together, or a rule made for a copy of the model."""
    if callable(rule) and not isinstance(rule, nn.Module):
        model = copy.deepcopy(model)
        rule = rule(model)
    else:
        rule, model = copy.deepcopy((rule, model))
    if not isinstance(rule, UpdateRule):
        raise TypeError(
            f"`rule` must be an UpdateRule, or make one, got {type(rule).__name__}; subclass "
            "apo_core.UpdateRule."
        )
    return rule, model


def _require_names(argument: str, names: Iterable[str]) -> None:
    unknown = sorted(set(names) - set(CHECKS))
    if unknown:
        raise ValueError(f"`{argument}` must be chosen from {list(CHECKS)}, got {unknown}.")
