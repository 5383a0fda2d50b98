"""ρ(z, z₀), its slope and its curvature, against the oracle; and what every divergence obeys."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import apo_core as apo
from apo_core.discrepancies import resolve_discrepancy
from reference.analytic import sigmoid, softplus
from reference.arrays import Array
from verification import bridge
from verification.l0_oracle.rounding import divergence_size
from verification.strategies import ALL_DISCREPANCIES
from verification.strategies.outputs import exponentiated
from verification.tolerances import FUNCTION, assert_close

every_discrepancy = pytest.mark.parametrize("name", ALL_DISCREPANCIES)

pairs = st.builds(
    lambda examples, outputs, scale, distance, seed: _pair(
        examples, outputs, scale, 10.0**distance, seed
    ),
    examples=st.integers(1, 4),
    outputs=st.integers(1, 5),
    scale=st.floats(0.0, 30.0),
    distance=st.floats(-6.0, 1.0),
    seed=st.integers(0, 2**16),
)

Pair = tuple[Array, Array]


def _pair(examples: int, outputs: int, scale: float, distance: float, seed: int) -> Pair:
    """z and z₀, (N, C): from nearly equal to far apart, from uniform to saturated softmax."""
    first, second = np.random.default_rng(seed).standard_normal((2, examples, outputs))
    return scale * first + distance * second, scale * first


def fitted(name: str, pair: Pair) -> Pair:
    """The pair as outputs of this discrepancy: small exponents, an even number for Gaussians."""
    z, z0 = (0.1 * side if exponentiated(name) else side for side in pair)
    if name.startswith("gaussian"):
        z, z0 = (np.concatenate([side, 0.5 * side[:, ::-1]], axis=1) for side in (z, z0))
    return z, z0


def slope_size(name: str, z: Array, z0: Array) -> float:
    """What the terms of ∂ρ/∂z and of H_ρ amount to.

    p r of KL(p ‖ p₀): an error of r, as large as the logits, times their spread.
    """
    if exponentiated(name):
        return divergence_size(name, z, z0)
    size = 1.0 + float(np.linalg.norm(z) + np.linalg.norm(z0))
    return size * (1.0 + 2.0 * float(np.abs(z - z0).max()))


@every_discrepancy
@given(pair=pairs)
def test_value_of_each_example(name: str, pair: Pair) -> None:
    rho = ALL_DISCREPANCIES[name]
    z, z0 = fitted(name, pair)
    assert_close(
        bridge.array(bridge.discrepancy(rho).per_example(bridge.tensor(z), bridge.tensor(z0))),
        rho.value(z, z0),
        FUNCTION,
        size=z.shape[1],
        iterations=3,
        scale=divergence_size(name, z, z0),
        what="ρ",
    )


@every_discrepancy
@given(pair=pairs)
def test_fsd_is_the_mean_over_examples(name: str, pair: Pair) -> None:
    rho = ALL_DISCREPANCIES[name]
    z, z0 = fitted(name, pair)
    assert_close(
        float(bridge.discrepancy(rho)(bridge.tensor(z), bridge.tensor(z0))),
        np.mean(rho.value(z, z0)),
        FUNCTION,
        size=z.size,
        iterations=3,
        scale=divergence_size(name, z, z0),
        what="D_F",
    )


@every_discrepancy
@given(pair=pairs)
def test_slope(name: str, pair: Pair) -> None:
    """∂ρ/∂z by autograd; z₀ is constant."""
    rho = ALL_DISCREPANCIES[name]
    z, z0 = fitted(name, pair)
    outputs, current = bridge.tensor(z).requires_grad_(), bridge.tensor(z0)
    (slope,) = torch.autograd.grad(
        bridge.discrepancy(rho).per_example(outputs, current).sum(), outputs
    )
    assert_close(
        bridge.array(slope),
        rho.gradient(z, z0),
        FUNCTION,
        size=z.shape[1],
        iterations=3,
        scale=slope_size(name, z, z0),
        what="∂ρ/∂z",
    )


@every_discrepancy
@given(pair=pairs)
def test_curvature_at_equal_outputs(name: str, pair: Pair) -> None:
    """H_ρ by differentiating twice, at z = z₀."""
    rho = ALL_DISCREPANCIES[name]
    _, z0 = fitted(name, pair)
    for row in z0:
        current = bridge.tensor(row[None])
        hessian = torch.autograd.functional.hessian(
            lambda z, z0=current: bridge.discrepancy(rho).per_example(z, z0).sum(), current
        )
        assert isinstance(hessian, torch.Tensor)
        count = len(row)
        assert_close(
            bridge.array(hessian.reshape(count, count)),
            rho.output_hessian(row[None])[0],
            FUNCTION,
            iterations=4,
            scale=slope_size(name, row[None], row[None]),
            what="H_ρ",
        )


@every_discrepancy
@given(pair=pairs)
def test_no_difference_is_no_discrepancy(name: str, pair: Pair) -> None:
    """ρ(z₀, z₀) = 0 exactly, on the same tensor's values."""
    z0 = bridge.tensor(fitted(name, pair)[1])
    assert float(bridge.discrepancy(ALL_DISCREPANCIES[name])(z0.clone(), z0)) == 0.0


@every_discrepancy
@given(pair=pairs)
def test_positions_are_summed(name: str, pair: Pair) -> None:
    """Outputs (batch, positions, C) count as one example with the sum over its positions."""
    sides = fitted(name, pair)
    z, z0 = (bridge.tensor(side) for side in sides)
    twin = bridge.discrepancy(ALL_DISCREPANCIES[name])
    assert_close(
        bridge.array(twin.per_example(z[None], z0[None])),
        bridge.array(twin.per_example(z, z0).sum()[None]),
        FUNCTION,
        size=z.numel(),
        iterations=3,
        scale=divergence_size(name, *sides),
        what="ρ of one example with positions",
    )


@every_discrepancy
@given(pair=pairs)
def test_a_callable_potential_is_the_named_one(name: str, pair: Pair) -> None:
    """Bregman of a user's ψ; for the other discrepancies, the callable that they are."""
    rho = ALL_DISCREPANCIES[name]
    twin = bridge.discrepancy(rho)
    if isinstance(twin, apo.Bregman):
        named = twin.potential
        own = apo.Bregman(lambda z: named(z))
    else:
        own = resolve_discrepancy(lambda z, z0: twin(z, z0))
    z, z0 = (bridge.tensor(side) for side in fitted(name, pair))
    assert float(own(z, z0)) == float(twin(z, z0))


SHORT_NAMES = {
    "squared_error": "squared-error",
    "kl": "kl-lookahead-current",
    "bernoulli_kl": "bernoulli-kl-lookahead-current",
    "gaussian_kl": "gaussian-kl-lookahead-current",
    "bregman_squared_error": "bregman-squared-error",
    "bregman_cross_entropy": "bregman-cross-entropy",
    "bregman_binary_cross_entropy": "bregman-binary-cross-entropy",
    "bregman_poisson": "bregman-poisson",
}


@pytest.mark.parametrize(("short", "name"), SHORT_NAMES.items())
@given(pair=pairs)
def test_a_short_name_is_the_discrepancy_itself(short: str, name: str, pair: Pair) -> None:
    z, z0 = (bridge.tensor(side) for side in fitted(name, pair))
    twin = bridge.discrepancy(ALL_DISCREPANCIES[name])
    assert float(resolve_discrepancy(short)(z, z0)) == float(twin(z, z0))


thousands = st.lists(
    st.tuples(*[st.sampled_from([-1e3, -999.9375, -20.5, 0.0, 20.5, 999.9375, 1e3])] * 2),
    min_size=1,
    max_size=4,
)
"""Logits at θ' and at θ, exact in float32."""


@pytest.mark.parametrize("name", [n for n in ALL_DISCREPANCIES if not exponentiated(n)])
@given(logits=thousands)
def test_logits_of_a_thousand_in_single_precision(name: str, logits: list[Pair]) -> None:
    """ρ, its slope and its curvature are finite, and those of the oracle in float64."""
    z, z0 = np.array(logits).T[:, None]
    rho, size = ALL_DISCREPANCIES[name], z.shape[1]
    twin = bridge.discrepancy(rho)
    outputs = bridge.tensor(z).float().requires_grad_()
    current = bridge.tensor(z0).float()
    value = twin.per_example(outputs, current)
    (slope,) = torch.autograd.grad(value.sum(), outputs, create_graph=True)
    hessian = torch.autograd.functional.hessian(lambda u: twin(u, current), current)
    assert isinstance(hessian, torch.Tensor)
    for got, expected, scale, what in (
        (value, rho.value(z, z0), divergence_size(name, z, z0), "ρ"),
        (slope, rho.gradient(z, z0), slope_size(name, z, z0), "∂ρ/∂z"),
        (hessian[0, :, 0], rho.output_hessian(z0)[0], slope_size(name, z0, z0), "H_ρ"),
    ):
        assert_close(
            bridge.array(got),
            expected.astype(np.float32),
            FUNCTION.at(np.float32),
            size=size,
            iterations=4,
            scale=scale,
            what=what,
        )


@pytest.mark.parametrize("order", ["lookahead_current", "current_lookahead"])
@given(logits=thousands)
@example(logits=[(20.5, 999.9375)])
@example(logits=[(999.9375, 20.5)])
def test_the_bernoulli_kl_adds_no_large_terms_that_cancel(order: str, logits: list[Pair]) -> None:
    """In float32 it errs by its own terms p log p alone, not by the logits."""
    z, z0 = np.array(logits).T[:, None]
    first, second = (z, z0) if order == "lookahead_current" else (z0, z)
    terms = [
        sigmoid(sign * first) * (softplus(-sign * first) + softplus(-sign * second))
        for sign in (1.0, -1.0)
    ]
    # The oracle does add the logits: in float64, so that they count by the ratio of the two eps.
    oracle = (1.0 + np.abs(z).sum() + np.abs(z0).sum()) * float(
        np.finfo(np.float64).eps / np.finfo(np.float32).eps
    )
    name = f"bernoulli-kl-{order.replace('_', '-')}"
    rho = bridge.discrepancy(ALL_DISCREPANCIES[name])
    assert_close(
        bridge.array(rho.per_example(bridge.tensor(z).float(), bridge.tensor(z0).float())),
        ALL_DISCREPANCIES[name].value(z, z0).astype(np.float32),
        FUNCTION.at(np.float32),
        size=z.shape[1],
        iterations=3,
        scale=float(np.sum(terms)) + oracle,
        what="ρ",
    )
