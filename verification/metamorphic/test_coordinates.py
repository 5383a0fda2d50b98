"""Other coordinates for the same function: what follows them, and what does not.

Hidden units are permuted by Π: W₁ → ΠW₁, b₁ → Πb₁, W₂ → W₂Πᵀ. Inputs are mapped by T: x → Tx and
W₁ → W₁T⁻¹, so that ∇W₁ → ∇W₁Tᵀ, while a step that follows is ΔW₁ → ΔW₁T⁻¹. For an orthogonal T both
are the same: gradient descent follows rotations of the inputs, as the natural gradient does. It is
only for other T that they part. What acts on single entries follows no rotation.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

import apo_core as apo
from apo_core.rules.kfac_factors import Factors
from verification.metamorphic.training import (
    HIDDEN,
    IN,
    RULES,
    Batches,
    Setting,
    build,
    compare,
    run,
    setting,
)
from verification.profiles import share
from verification.tolerances import recording

SEEDS = st.integers(0, 2**16)
FOLLOWS_ROTATIONS = [
    "sgd",
    "sgd per layer",
    "heavy ball",
    "nesterov",
    "heavy ball ahead",
    "dense",
    "ekfac",
    "grouped",
    "kfac",
]
ENTRY_BY_ENTRY = ["diagonal", "rmsprop", "adamw", "any optimizer"]


def mapped_inputs(start: Setting, T: Tensor) -> Setting:
    """x → Tx and W₁ → W₁T⁻¹; EKFAC's A of the first layer → T⁻ᵀA, which eq. 9 needs to follow."""
    weight = "first.weight"

    def prepare(rule: apo.UpdateRule) -> None:
        start.prepare(rule)
        for module in rule.modules():
            if isinstance(module, apo.EKFAC) and len(module.A) == IN:
                with torch.no_grad():
                    module.A.copy_(torch.linalg.solve(T.T, module.A))

    return replace(
        start,
        theta=start.theta | {weight: start.theta[weight] @ torch.linalg.inv(T)},
        batches=[Batches(b.x @ T.T, b.y, b.x_other @ T.T) for b in start.batches],
        prepare=prepare,
    )


def check_inputs(start: Setting, T: Tensor, slopes: bool = True, solve: float = 1.0) -> None:
    """Q, θ and (`slopes`) ‖dQ/dφ‖ of the run in the mapped inputs are those of the old ones."""
    found, expected = run(mapped_inputs(start, T)), run(start)
    weight = "first.weight"
    found = found._replace(theta=found.theta | {weight: found.theta[weight] @ T})
    if not slopes:
        found = found._replace(slopes=expected.slopes)
    compare(found, expected, start, phi=False, solve=solve)


def rotation(n: int) -> Tensor:
    """An orthogonal matrix, from the present random state."""
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]


@pytest.mark.parametrize("rule", RULES)
@share(0.05)
@given(seed=SEEDS)
def test_the_order_of_the_hidden_units_does_not_count(rule: str, seed: int) -> None:
    """u(Πθ, Πφ, B) = Π u(θ, φ, B); at the start φ is the same for all units, so Πφ = φ."""
    start = setting(rule, seed)
    order = torch.randperm(HIDDEN)
    inverse = order.argsort()

    def permuted(theta: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
        first, bias, last = (theta[n] for n in ("first.weight", "first.bias", "last.weight"))
        return theta | {
            "first.weight": first[order],
            "first.bias": bias[order],
            "last.weight": last[:, order],
        }

    found = run(replace(start, theta=permuted(start.theta, order)))
    compare(found._replace(theta=permuted(found.theta, inverse)), run(start), start, phi=False)


@pytest.mark.parametrize("rule", FOLLOWS_ROTATIONS)
@share(0.05)
@given(seed=SEEDS)
def test_a_rotation_of_the_inputs_is_followed(rule: str, seed: int) -> None:
    """u(θR⁻¹; Rx) = u(θ; x)R⁻¹ for orthogonal R."""
    start = setting(rule, seed)
    check_inputs(start, rotation(IN))


@pytest.mark.parametrize("rule", ENTRY_BY_ENTRY)
def test_what_acts_on_single_entries_follows_no_rotation(rule: str) -> None:
    start = setting(rule, 0)
    with recording(), pytest.raises(AssertionError, match="error/tolerance"):
        check_inputs(start, rotation(IN))


def stretch() -> Tensor:
    """An invertible matrix of condition 4 that is not orthogonal, from the present random state."""
    return rotation(IN) * torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64) @ rotation(IN)


def undamped(rule: apo.UpdateRule) -> None:
    """K-FAC whose first layer has a γ that rounding hides; η alone is learned."""
    assert isinstance(rule, apo.rules.KFAC)
    rule.log_damping.requires_grad_(False)
    rule.log_damping.data[0] = -300.0


def condition(start: Setting) -> float:
    """κ(A) + κ(B) of the first layer on the first mini-batch; later ones average more examples.

    A and B are inverted each for itself, and the relative errors κ eps of a product add.
    """
    optimizer = build(start)
    model, rule = optimizer.model, optimizer.rule
    assert isinstance(rule, apo.rules.KFAC)
    with rule.observe(model):
        cross_entropy(model(start.batches[0].x), start.batches[0].y).backward()
    first = rule.factors[rule.factored.index("first")]
    assert isinstance(first, Factors)
    return float(torch.linalg.cond(first.A) + torch.linalg.cond(first.B))


@pytest.mark.loose(
    "The condition numbers of A and B are for the worst right-hand side, all of it along their "
    "smallest eigenvectors; a gradient is made of the same examples and has least there."
)
@share(0.25)
@given(seed=SEEDS)
def test_undamped_kfac_follows_any_linear_map_of_the_inputs(seed: int) -> None:
    """A → T̄AT̄ᵀ and g → g(I ⊗ T̄ᵀ) give Δ → Δ(I ⊗ T̄⁻¹), T̄ being T with a 1 for the bias.

    Without λ_WSD, since ‖Δ‖ depends on the coordinates.
    """
    many = setting("kfac per layer", seed, examples=64)
    start = replace(many, prepare=undamped, wsd_weight=0.0)
    T = stretch()
    check_inputs(start, T, solve=condition(mapped_inputs(start, T)))


@share(0.25)
@given(seed=SEEDS)
def test_steps_of_ekfac_follow_if_its_A_does(seed: int) -> None:
    """A → T⁻ᵀA for any invertible T; φ is held, since gradient descent on A follows no such map."""
    start = replace(setting("ekfac", seed), wsd_weight=0.0, meta_lr=lambda name: 0.0)
    check_inputs(start, stretch(), slopes=False)


@pytest.mark.parametrize(
    "rule", ["sgd", "heavy ball", "adamw", "diagonal", "dense", "kfac", "grouped"]
)
def test_what_does_not_follow_a_map_that_is_no_rotation(rule: str) -> None:
    """Gradient descent, entries alone, a P that stays, and damping."""
    start = replace(setting(rule, 0), wsd_weight=0.0)
    with recording(), pytest.raises(AssertionError, match="error/tolerance"):
        check_inputs(start, stretch(), slopes=False)


def test_the_wsd_does_not_follow() -> None:
    start = replace(setting("kfac per layer", 0), prepare=undamped, wsd_weight=0.1)
    T = stretch()
    with recording(), pytest.raises(AssertionError, match="error/tolerance"):
        check_inputs(start, T, solve=condition(mapped_inputs(start, T)))
