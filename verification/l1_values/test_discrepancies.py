"""ρ(z, z₀), its slope and its curvature, against the oracle; and what every divergence obeys."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import apo_core as apo
from reference.arrays import Array
from reference.discrepancies import Discrepancy
from verification import bridge
from verification.strategies import DISCREPANCIES
from verification.tolerances import FUNCTION, assert_close

pytestmark = pytest.mark.parametrize("rho", DISCREPANCIES.values(), ids=DISCREPANCIES.keys())

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


def _pair(
    examples: int, outputs: int, scale: float, distance: float, seed: int
) -> tuple[Array, Array]:
    """z and z₀, (N, C): from nearly equal to far apart, from uniform to saturated softmax."""
    first, second = np.random.default_rng(seed).standard_normal((2, examples, outputs))
    return scale * first + distance * second, scale * first


def magnitude(z: Array, z0: Array) -> float:
    """What the terms of ρ amount to: squares of outputs, or outputs themselves."""
    return float(1.0 + np.linalg.norm(z) + np.linalg.norm(z0))


@given(pair=pairs)
def test_value_of_each_example(rho: Discrepancy, pair: tuple[Array, Array]) -> None:
    z, z0 = pair
    assert_close(
        bridge.array(bridge.discrepancy(rho).per_example(bridge.tensor(z), bridge.tensor(z0))),
        rho.value(z, z0),
        FUNCTION,
        size=z.shape[1],
        iterations=3,
        scale=magnitude(z, z0) ** 2,
        what="ρ",
    )


@given(pair=pairs)
def test_fsd_is_the_mean_over_examples(rho: Discrepancy, pair: tuple[Array, Array]) -> None:
    z, z0 = pair
    assert_close(
        float(bridge.discrepancy(rho)(bridge.tensor(z), bridge.tensor(z0))),
        np.mean(rho.value(z, z0)),
        FUNCTION,
        size=z.size,
        iterations=3,
        scale=magnitude(z, z0) ** 2,
        what="D_F",
    )


@given(pair=pairs)
def test_slope(rho: Discrepancy, pair: tuple[Array, Array]) -> None:
    """∂ρ/∂z by autograd; z₀ is constant."""
    z, z0 = pair
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
        # p r of KL(p || p0): an error of r, as large as the logits, times their spread
        scale=magnitude(z, z0) * (1.0 + 2.0 * float(np.abs(z - z0).max())),
        what="∂ρ/∂z",
    )


@given(pair=pairs)
def test_curvature_at_equal_outputs(rho: Discrepancy, pair: tuple[Array, Array]) -> None:
    """H_ρ by differentiating twice, at z = z₀."""
    _, z0 = pair
    for example in z0:
        current = bridge.tensor(example[None])
        hessian = torch.autograd.functional.hessian(
            lambda z, z0=current: bridge.discrepancy(rho).per_example(z, z0).sum(), current
        )
        assert isinstance(hessian, torch.Tensor)
        count = len(example)
        assert_close(
            bridge.array(hessian.reshape(count, count)),
            rho.output_hessian(example[None])[0],
            FUNCTION,
            iterations=4,
            scale=magnitude(example, example),
            what="H_ρ",
        )


@given(pair=pairs)
def test_no_difference_is_no_discrepancy(rho: Discrepancy, pair: tuple[Array, Array]) -> None:
    """ρ(z₀, z₀) = 0 exactly, on the same tensor's values."""
    z0 = bridge.tensor(pair[1])
    assert float(bridge.discrepancy(rho)(z0.clone(), z0)) == 0.0


@given(pair=pairs)
def test_positions_are_summed(rho: Discrepancy, pair: tuple[Array, Array]) -> None:
    """Outputs (batch, positions, C) count as one example with the sum over its positions."""
    z, z0 = (bridge.tensor(side) for side in pair)
    twin = bridge.discrepancy(rho)
    assert_close(
        bridge.array(twin.per_example(z[None], z0[None])),
        bridge.array(twin.per_example(z, z0).sum()[None]),
        FUNCTION,
        size=z.numel(),
        iterations=3,
        scale=magnitude(*pair) ** 2,
        what="ρ of one example with positions",
    )


@given(pair=pairs)
def test_a_callable_potential_is_the_named_one(rho: Discrepancy, pair: tuple[Array, Array]) -> None:
    """Bregman of a user's ψ; for the other discrepancies, the callable that they are."""
    twin = bridge.discrepancy(rho)
    if isinstance(twin, apo.Bregman):
        named = twin.potential
        own = apo.Bregman(lambda z: named(z))
    else:
        own = apo.ProximalObjective(lambda z, z0: twin(z, z0), 1.0).discrepancy
    z, z0 = (bridge.tensor(side) for side in pair)
    assert float(own(z, z0)) == float(twin(z, z0))
