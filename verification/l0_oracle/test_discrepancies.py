"""Divergences of the outputs: values, derivatives, and the identities between them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import Bregman, CategoricalKL, SquaredEuclidean, complex_step_jacobian
from reference.arrays import Array
from verification.l0_oracle import high_precision as hp
from verification.strategies import DISCREPANCIES, LOSSES
from verification.tolerances import COMPLEX_STEP, FUNCTION, ROUNDING, assert_close

seeds = st.integers(0, 2**16)
spreads = st.floats(0.0, 20.0)
names = pytest.mark.parametrize("name", list(DISCREPANCIES))


def draw_pair(seed: int, spread: float) -> tuple[Array, Array]:
    """Outputs z at theta' and z0 at theta."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 4)), int(rng.integers(1, 5)))
    z0 = spread * rng.standard_normal(shape)
    return z0 + spread * rng.standard_normal(shape), z0


def term_size(z: Array, z0: Array) -> float:
    """Bound of the terms of rho and of its derivatives: products of two outputs."""
    size = 1.0 + float(np.linalg.norm(z) + np.linalg.norm(z0))
    return size**2


@names
@given(seed=seeds, spread=spreads)
def test_value_equals_its_definition_in_fifty_digits(name: str, seed: int, spread: float) -> None:
    z, z0 = draw_pair(seed, spread)
    with hp.context():
        exact = [
            hp.DIVERGENCES[name](hp.numbers(a), hp.numbers(b)) for a, b in zip(z, z0, strict=True)
        ]
    assert_close(
        DISCREPANCIES[name].value(z, z0),
        np.array(exact, dtype=float),
        FUNCTION,
        scale=term_size(z, z0),
        what="rho",
    )


@names
@given(seed=seeds, spread=spreads)
def test_gradient_is_the_complex_step_of_the_value(name: str, seed: int, spread: float) -> None:
    z, z0 = draw_pair(seed, spread)
    rho = DISCREPANCIES[name]
    for n in range(len(z)):
        numeric = complex_step_jacobian(lambda u, n=n: rho.value(u[None], z0[n : n + 1]), z[n])[0]
        assert_close(
            rho.gradient(z, z0)[n],
            numeric,
            COMPLEX_STEP,
            scale=term_size(z[n], z0[n]),
            what=f"d rho/dz of example {n}",
        )


@names
@given(seed=seeds, spread=spreads)
def test_output_hessian_is_the_complex_step_of_the_gradient_at_no_change(
    name: str, seed: int, spread: float
) -> None:
    _, z0 = draw_pair(seed, spread)
    rho = DISCREPANCIES[name]
    for n, row in enumerate(z0):
        numeric = complex_step_jacobian(lambda u, row=row: rho.gradient(u[None], row[None])[0], row)
        assert_close(
            np.array(rho.output_hessian(z0)[n]),
            numeric,
            COMPLEX_STEP,
            scale=1.0 + float(np.linalg.norm(row)),
            what=f"H_rho of example {n}",
        )


@names
@given(seed=seeds, spread=spreads)
def test_value_and_gradient_vanish_at_no_change(name: str, seed: int, spread: float) -> None:
    _, z0 = draw_pair(seed, spread)
    rho, zeros = DISCREPANCIES[name], np.zeros(len(z0))
    size = term_size(z0, z0)
    assert_close(rho.value(z0, z0), zeros, FUNCTION, scale=size, what="rho(z0, z0)")
    assert_close(rho.gradient(z0, z0), np.zeros_like(z0), FUNCTION, scale=size, what="d rho/dz")


@names
@given(seed=seeds, spread=spreads)
def test_value_is_not_negative(name: str, seed: int, spread: float) -> None:
    z, z0 = draw_pair(seed, spread)
    value = DISCREPANCIES[name].value(z, z0)
    assert (value >= -FUNCTION.allowed(size=z.shape[1]) * term_size(z, z0)).all(), value


@given(seed=seeds, spread=spreads)
def test_bregman_of_the_cross_entropy_is_kl_from_current_to_lookahead(
    seed: int, spread: float
) -> None:
    z, z0 = draw_pair(seed, spread)
    bregman, kl, size = (
        Bregman("cross_entropy"),
        CategoricalKL("current_lookahead"),
        term_size(z, z0),
    )
    assert_close(bregman.value(z, z0), kl.value(z, z0), FUNCTION, scale=size, what="rho")
    assert_close(bregman.gradient(z, z0), kl.gradient(z, z0), FUNCTION, scale=size, what="d rho/dz")


@given(seed=seeds, spread=spreads)
def test_bregman_of_the_squared_error_is_the_squared_distance(seed: int, spread: float) -> None:
    z, z0 = draw_pair(seed, spread)
    bregman, squared = Bregman("squared_error"), SquaredEuclidean()
    size = term_size(z, z0)
    assert_close(bregman.value(z, z0), squared.value(z, z0), ROUNDING, scale=size, what="rho")
    assert_close(
        bregman.gradient(z, z0), squared.gradient(z, z0), ROUNDING, scale=size, what="d rho/dz"
    )


@pytest.mark.parametrize("name", list(LOSSES))
@given(seed=seeds, spread=spreads)
def test_bregman_of_a_loss_does_not_depend_on_its_target(
    name: str, seed: int, spread: float
) -> None:
    """P18 eq. 8 with the loss itself, at any target, is the divergence of its potential."""
    z, z0 = draw_pair(seed, spread)
    rng, loss = np.random.default_rng(seed + 1), LOSSES[name]
    t = (
        rng.integers(z.shape[1], size=len(z))
        if name == "cross_entropy"
        else rng.normal(size=z.shape)
    )
    linear = np.sum(loss.gradient(z0, t) * (z - z0), axis=1)
    printed = loss.value(z, t) - loss.value(z0, t) - linear
    size = term_size(z, z0) + float(np.linalg.norm(t)) ** 2
    assert_close(Bregman(name).value(z, z0), printed, FUNCTION, scale=size, what="rho")


@given(seed=seeds, spread=spreads)
def test_without_the_half_everything_doubles(seed: int, spread: float) -> None:
    """P18 eq. 7 is twice 1/2 ||z - z0||^2, and so is its output Hessian."""
    z, z0 = draw_pair(seed, spread)
    with_half, without = SquaredEuclidean(), SquaredEuclidean(half=False)
    assert_close(without.value(z, z0), 2 * with_half.value(z, z0), ROUNDING, what="rho")
    assert_close(without.gradient(z, z0), 2 * with_half.gradient(z, z0), ROUNDING, what="d rho/dz")
    assert_close(
        np.array(without.output_hessian(z0)), 2 * with_half.output_hessian(z0), ROUNDING, what="H"
    )


def test_kl_orders_differ_but_share_their_output_hessian() -> None:
    z, z0 = np.array([[2.0, 0.0]]), np.array([[0.0, 0.0]])
    there, back = CategoricalKL("lookahead_current"), CategoricalKL("current_lookahead")
    # KL(p || 1/2) = log 2 - entropy(p), KL(1/2 || p) = -log 2 - mean log p.
    p = np.array([1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(2.0))])
    assert_close(there.value(z, z0), [np.log(2) + p @ np.log(p)], FUNCTION, scale=1.0)
    assert_close(back.value(z, z0), [-np.log(2) - np.log(p).mean()], FUNCTION, scale=1.0)
    assert_close(there.output_hessian(z0), back.output_hessian(z0), ROUNDING)


def test_discrepancies_check_their_options() -> None:
    with pytest.raises(ValueError, match=r"`order` must be one of .* got 'forward'; choose one"):
        CategoricalKL("forward")
    with pytest.raises(ValueError, match=r"`potential` must be one of .* got 'entropy'"):
        Bregman("entropy")
