"""Divergences of the outputs: values, derivatives, and the identities between them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import Bregman, CategoricalKL, SquaredEuclidean, complex_step_jacobian
from reference.arrays import Array
from reference.discrepancies import BernoulliKL, GaussianKL, bregman_of
from reference.losses import GaussianNLL
from verification.l0_oracle import high_precision as hp
from verification.l0_oracle.rounding import divergence_size
from verification.profiles import share
from verification.strategies import ALL_DISCREPANCIES, CONVEX_LOSSES
from verification.strategies.outputs import output_shape, outputs, targets
from verification.tolerances import BITWISE, COMPLEX_STEP, FUNCTION, ROUNDING, assert_close

seeds = st.integers(0, 2**16)
spreads = st.floats(0.0, 20.0)
names = pytest.mark.parametrize("name", list(ALL_DISCREPANCIES))


def draw_pair(seed: int, spread: float, name: str = "kl") -> tuple[Array, Array]:
    """Outputs z at theta' and z0 at theta."""
    rng = np.random.default_rng(seed)
    shape = output_shape(name, rng)
    z0 = outputs(name, shape, spread, rng)
    return z0 + outputs(name, shape, spread, rng), z0


@names
@given(seed=seeds, spread=spreads)
def test_value_equals_its_definition_in_fifty_digits(name: str, seed: int, spread: float) -> None:
    z, z0 = draw_pair(seed, spread, name)
    with hp.context():
        exact = [
            hp.DIVERGENCES[name](hp.numbers(a), hp.numbers(b)) for a, b in zip(z, z0, strict=True)
        ]
    assert_close(
        ALL_DISCREPANCIES[name].value(z, z0),
        np.array(exact, dtype=float),
        FUNCTION,
        scale=divergence_size(name, z, z0),
        what="rho",
    )


@names
@given(seed=seeds, spread=spreads)
def test_gradient_is_the_complex_step_of_the_value(name: str, seed: int, spread: float) -> None:
    z, z0 = draw_pair(seed, spread, name)
    rho = ALL_DISCREPANCIES[name]
    for n in range(len(z)):
        numeric = complex_step_jacobian(lambda u, n=n: rho.value(u[None], z0[n : n + 1]), z[n])[0]
        assert_close(
            rho.gradient(z, z0)[n],
            numeric,
            COMPLEX_STEP,
            scale=divergence_size(name, z[n : n + 1], z0[n : n + 1]),
            what=f"d rho/dz of example {n}",
        )


@names
@given(seed=seeds, spread=spreads)
def test_output_hessian_is_the_complex_step_of_the_gradient_at_no_change(
    name: str, seed: int, spread: float
) -> None:
    _, z0 = draw_pair(seed, spread, name)
    rho = ALL_DISCREPANCIES[name]
    for n, row in enumerate(z0):
        numeric = complex_step_jacobian(lambda u, row=row: rho.gradient(u[None], row[None])[0], row)
        assert_close(
            np.array(rho.output_hessian(z0)[n]),
            numeric,
            COMPLEX_STEP,
            scale=divergence_size(name, row[None], row[None]),
            what=f"H_rho of example {n}",
        )


@names
@given(seed=seeds, spread=spreads)
def test_value_and_gradient_vanish_at_no_change(name: str, seed: int, spread: float) -> None:
    """Exactly: equal numbers are subtracted."""
    _, z0 = draw_pair(seed, spread, name)
    rho = ALL_DISCREPANCIES[name]
    assert_close(rho.value(z0, z0), np.zeros(len(z0)), BITWISE, what="rho(z0, z0)")
    assert_close(rho.gradient(z0, z0), np.zeros_like(z0), BITWISE, what="d rho/dz")


@names
@given(seed=seeds, spread=spreads)
def test_value_is_not_negative(name: str, seed: int, spread: float) -> None:
    z, z0 = draw_pair(seed, spread, name)
    value = ALL_DISCREPANCIES[name].value(z, z0)
    assert (value >= -FUNCTION.allowed(size=z.shape[1]) * divergence_size(name, z, z0)).all(), value


@given(seed=seeds, spread=spreads)
def test_bregman_of_the_cross_entropy_is_kl_from_current_to_lookahead(
    seed: int, spread: float
) -> None:
    z, z0 = draw_pair(seed, spread)
    bregman, kl, size = (
        Bregman("cross_entropy"),
        CategoricalKL("current_lookahead"),
        divergence_size("kl", z, z0),
    )
    assert_close(bregman.value(z, z0), kl.value(z, z0), FUNCTION, scale=size, what="rho")
    assert_close(bregman.gradient(z, z0), kl.gradient(z, z0), FUNCTION, scale=size, what="d rho/dz")


@given(seed=seeds, spread=spreads)
def test_bregman_of_the_squared_error_is_the_squared_distance(seed: int, spread: float) -> None:
    z, z0 = draw_pair(seed, spread)
    bregman, squared = Bregman("squared_error"), SquaredEuclidean()
    size = divergence_size("kl", z, z0)
    assert_close(bregman.value(z, z0), squared.value(z, z0), ROUNDING, scale=size, what="rho")
    assert_close(
        bregman.gradient(z, z0), squared.gradient(z, z0), ROUNDING, scale=size, what="d rho/dz"
    )


@pytest.mark.parametrize("name", list(CONVEX_LOSSES))
@given(seed=seeds, spread=spreads)
def test_bregman_of_a_loss_does_not_depend_on_its_target(
    name: str, seed: int, spread: float
) -> None:
    """P18 eq. 8 with the loss itself, at any target, is the divergence of its potential."""
    z, z0 = draw_pair(seed, spread, name)
    loss = CONVEX_LOSSES[name]
    t = targets(loss, (len(z), z.shape[1]), np.random.default_rng(seed + 1))
    linear = np.sum(loss.gradient(z0, t) * (z - z0), axis=1)
    printed = loss.value(z, t) - loss.value(z0, t) - linear
    size = divergence_size(f"bregman-{name}", z, z0) * (1.0 + float(np.linalg.norm(t))) ** 2
    assert_close(bregman_of(loss).value(z, z0), printed, FUNCTION, scale=size, what="rho")


def test_eq_8_with_a_gaussian_likelihood_is_no_divergence() -> None:
    """In (mu, log sigma) the target stays, and as the loss is not convex rho falls below zero."""
    loss, z0, z = GaussianNLL(), np.array([[0.0, 0.0]]), np.array([[1.0, 1.0]])

    def eq_8(t: float) -> float:
        T = np.array([[t]])
        linear = np.sum(loss.gradient(z0, T) * (z - z0), axis=1)
        return float((loss.value(z, T) - loss.value(z0, T) - linear)[0])

    # 1 + (t - 1)^2 / (2 e^2) at z, less t^2 / 2 at z0, less the slope (-t, 1 - t^2) times (1, 1).
    for t in (-1.0, 0.0, 2.0):
        exact = (t - 1.0) ** 2 * np.exp(-2.0) / 2.0 + t**2 / 2.0 + t
        assert_close(np.float64(eq_8(t)), np.float64(exact), FUNCTION, scale=8.0, what="eq. 8")
    assert eq_8(-1.0) < -0.2 < 0.0 < eq_8(0.0) < eq_8(2.0)
    with pytest.raises(
        ValueError, match=r"must be convex and linear in its target.* got GaussianNLL"
    ):
        bregman_of(loss)


@share(0.1)
@given(seed=seeds, spread=st.floats(0.0, 10.0))
def test_bregman_of_the_poisson_loss_is_kl_from_current_to_lookahead(
    seed: int, spread: float
) -> None:
    """Against the sum over counts, of rates of at most 150: beyond 600 lies less than 1e-100."""
    z, z0 = (np.minimum(v, 5.0) for v in draw_pair(seed, spread, "poisson"))
    with hp.context():
        exact = [
            hp.poisson_kl(hp.numbers(b), hp.numbers(a), 600) for a, b in zip(z, z0, strict=True)
        ]
    scale = divergence_size("bregman-poisson", z, z0)
    value = Bregman("poisson").value(z, z0)
    assert_close(value, np.array(exact, dtype=float), FUNCTION, scale=scale, what="rho")


@pytest.mark.parametrize("order", ["lookahead_current", "current_lookahead"])
@given(seed=seeds, spread=spreads)
def test_kl_of_one_bit_is_the_categorical_kl_of_two_classes(
    order: str, seed: int, spread: float
) -> None:
    """Logits (z, 0) of two classes are the logit z of a bit."""
    z, z0 = (v[:, :1] for v in draw_pair(seed, spread))
    pair, pair0 = (np.hstack([v, np.zeros_like(v)]) for v in (z, z0))
    size, bit, two = divergence_size("kl", z, z0), BernoulliKL(order), CategoricalKL(order)
    assert_close(bit.value(z, z0), two.value(pair, pair0), FUNCTION, size=4, scale=size, what="rho")
    slope = two.gradient(pair, pair0)[:, :1]
    assert_close(bit.gradient(z, z0), slope, FUNCTION, size=4, scale=size, what="d rho/dz")


@pytest.mark.parametrize("order", ["lookahead_current", "current_lookahead"])
@given(seed=seeds, spread=spreads)
def test_kl_of_unit_gaussians_is_half_the_squared_distance(
    order: str, seed: int, spread: float
) -> None:
    z, z0 = draw_pair(seed, spread)
    pair, pair0 = (np.hstack([v, np.zeros_like(v)]) for v in (z, z0))
    expected, size = SquaredEuclidean().value(z, z0), divergence_size("kl", z, z0)
    actual = GaussianKL(order).value(pair, pair0)
    assert_close(actual, expected, ROUNDING, size=2 * z.shape[1], scale=size, what="rho")


@given(seed=seeds, spread=spreads)
def test_without_the_half_everything_doubles(seed: int, spread: float) -> None:
    """P18 eq. 7 is twice 1/2 ||z - z0||^2, and so is its output Hessian; doubling is exact."""
    z, z0 = draw_pair(seed, spread)
    with_half, without = SquaredEuclidean(), SquaredEuclidean(half=False)
    assert_close(without.value(z, z0), 2 * with_half.value(z, z0), BITWISE, what="rho")
    assert_close(without.gradient(z, z0), 2 * with_half.gradient(z, z0), BITWISE, what="d rho/dz")
    assert_close(
        np.array(without.output_hessian(z0)), 2 * with_half.output_hessian(z0), BITWISE, what="H"
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
    for divergence in (BernoulliKL, GaussianKL):
        with pytest.raises(ValueError, match=r"`order` must be one of .* got 'both'; choose one"):
            divergence("both")
