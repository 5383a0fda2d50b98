"""The unit of the loss: scaled with λ_FSD, λ_WSD and φ, it leaves every step as it was."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import apo_core as apo
from verification.metamorphic.training import RULES, Result, Setting, compare, run, setting
from verification.profiles import share
from verification.tolerances import recording

C = 4.0  # a power of two, whose root is one: multiplying by it rounds nothing
STRUCTURES = ["diagonal", "dense", "ekfac"]

# φ → φ · C^power for P and its factors, φ → φ + power · log C for logarithms. P, P = s² and η of a
# gradient step, g being C times as large, shrink by C; what a rule that divides by |g| adds to it,
# ε, grows by C; K-FAC's B, and with it γ, by C², so that η (A ⊗ B + γI)⁻¹ g needs C times the η.
GRADIENT_STEPS = ["sgd", "sgd per layer", "heavy ball", "nesterov", "heavy ball ahead"]
POWERS: dict[str, dict[str, float]] = {
    **{name: {"log_lr": -1.0} for name in GRADIENT_STEPS},
    "rmsprop": {"log_eps": 1.0},
    "adamw": {"log_eps": 1.0},
    "diagonal": {"S": -0.5},
    "dense": {"P": -1.0},
    "ekfac": {"S": -0.5},
    "kfac": {"log_lr": 1.0, "log_damping": 2.0},
    "kfac per layer": {"log_lr": 1.0, "log_damping": 2.0},
}


def scaled(start: Setting, power: Callable[[str], float]) -> Setting:
    """C · J, C · λ_FSD, C · λ_WSD, and φ in their unit.

    Q and dQ/dφ of a logarithm grow by C; so the meta-optimizer's learning rate falls by C, and by
    C^(1 − 2 power) where φ itself is multiplied by C^power.
    """

    def prepare(rule: apo.UpdateRule) -> None:
        start.prepare(rule)
        with torch.no_grad():
            for name, p in rule.named_parameters():
                if name.startswith("log_"):
                    p += power(name) * math.log(C)
                else:
                    p *= C ** power(name)

    def meta_lr(name: str) -> float:
        own = 0.0 if name.startswith("log_") else power(name)
        return start.meta_lr(name) / C ** (1 - 2 * own)

    return replace(
        start,
        loss_scale=C,
        fsd_weight=C * start.fsd_weight,
        wsd_weight=C * start.wsd_weight,
        prepare=prepare,
        meta_lr=meta_lr,
    )


def scaled_back(result: Result, power: Callable[[str], float]) -> Result:
    """Q, dQ/dφ and φ in the old unit."""
    phi, slopes = {}, {}
    for name, value in result.phi.items():
        log = name.startswith("log_")
        phi[name] = value - power(name) * math.log(C) if log else value / C ** power(name)
    for name, slope in result.slopes.items():
        slopes[name] = slope / C ** (1.0 if name.startswith("log_") else 1.0 - power(name))
    return Result(result.terms / C, slopes, result.theta, phi)


def hold_rho(rule: apo.UpdateRule) -> None:
    """RMSprop's η / s^ρ has the unit of η alone at ρ = ½: with another ρ it depends on ρ."""
    if isinstance(rule, apo.rules.RMSprop):
        rule.log_rho.requires_grad_(False)


@pytest.mark.parametrize("rule", POWERS)
@share(0.05)
@given(seed=st.integers(0, 2**16))
def test_the_unit_of_the_loss_does_not_count(rule: str, seed: int) -> None:
    """Q(φ_c; cJ, cλ_FSD, cλ_WSD) = c Q(φ; J, λ_FSD, λ_WSD), with the same steps.

    Of RMSprop's φ, ρ is held at ½.
    """
    start = replace(setting(rule, seed), prepare=hold_rho)

    def power(name: str) -> float:
        return POWERS[rule].get(name.rpartition(".")[2], 0.0)

    changed, expected = run(scaled(start, power)), run(start)
    compare(scaled_back(changed, power), expected, start)
    if rule in STRUCTURES:  # nothing is rounded that was not
        assert all(torch.equal(changed.theta[n], p) for n, p in expected.theta.items())


@pytest.mark.parametrize("rule", POWERS)
def test_without_phi_it_counts(rule: str) -> None:
    """Where φ stays in the old unit, the steps are others: φ is no pure number, nor is λ."""
    start = setting(rule, 0)
    changed = run(scaled(start, lambda name: 0.0))
    with recording(), pytest.raises(AssertionError, match="error/tolerance"):
        compare(scaled_back(changed, lambda name: 0.0), run(start), start)


def test_the_unit_of_rmsprops_learning_rate_depends_on_rho() -> None:
    """While ρ is learned, η / s^ρ with s in the square of the gradient's unit has no fixed unit."""
    start = setting("rmsprop", 0)

    def power(name: str) -> float:
        return POWERS["rmsprop"].get(name, 0.0)

    changed = scaled_back(run(scaled(start, power)), power)
    with recording(), pytest.raises(AssertionError, match="error/tolerance"):
        compare(changed, run(start), start)


@pytest.mark.parametrize("rule", RULES)
@share(0.05)
@given(seed=st.integers(0, 2**16))
def test_float32_is_float64_to_first_order(rule: str, seed: int) -> None:
    """‖run₃₂ − run₆₄‖ ≤ bound(2⁻²³): rounding of each operation, amplified as θ and x are.

    From θ, x and φ that float32 holds exactly.
    """
    start = setting(rule, seed)
    single = replace(
        start,
        theta={name: p.float() for name, p in start.theta.items()},
        batches=[b._replace(x=b.x.float(), x_other=b.x_other.float()) for b in start.batches],
    )
    double = replace(
        start,
        theta={name: p.double() for name, p in single.theta.items()},
        batches=[b._replace(x=b.x.double(), x_other=b.x_other.double()) for b in single.batches],
    )
    compare(run(single), run(double), double, dtype=np.float32)
