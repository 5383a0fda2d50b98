"""Q, its addends, its gradient q at the lookahead, and its approximation Q-hat."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reference import (
    MLP,
    CategoricalKL,
    MetaObjective,
    Problem,
    SquaredError,
    approximate_meta_objective,
    complex_step_jacobian,
    fsd_hessian,
    preconditioned,
    proximity_matrix,
)
from reference.arrays import Array
from reference.problem import Batch
from verification.l0_oracle import high_precision as hp
from verification.l0_oracle.rounding import (
    divergence_value_error,
    gradient_error,
    loss_gradient_error,
    loss_value_error,
    meta_gradient_error,
    meta_value_error,
    pass_errors,
)
from verification.profiles import share
from verification.strategies import (
    DISCREPANCIES,
    LOSSES,
    SMOOTH,
    MetaCase,
    ProximityWeights,
    ScaledNormal,
    batches,
    meta_cases,
    networks,
    parameters,
    proximity_weights,
    scaled_normals,
)
from verification.tolerances import BITWISE, PROPAGATED, PROPAGATED_COMPLEX, ROUNDING, assert_close


def value_error(case: MetaCase, lookahead: Array) -> float:
    """Bound of the rounding of Q, in units of u."""
    args = case.theta, lookahead, case.batch, case.other.inputs
    return meta_value_error(case.objective(), *args)


@given(case=meta_cases(), step=scaled_normals())
def test_terms_are_the_three_weighted_addends(case: MetaCase, step) -> None:
    """Each addend example by example from the loss, the divergence and the distance."""
    u = step.around(case.theta)
    terms = case.objective().terms(case.theta, u, case.batch, case.other.inputs)
    network, loss = case.problem.network, case.problem.loss
    X, T = case.batch
    losses = [loss.value(network.outputs(u, X[n : n + 1]), T[n : n + 1])[0] for n in range(len(X))]
    divergences = [
        case.discrepancy.value(network.outputs(u, x[None]), network.outputs(case.theta, x[None]))[0]
        for x in case.other.inputs
    ]
    here, there = (pass_errors(network, v, case.other.inputs) for v in (u, case.theta))
    passes = pass_errors(network, u, X)
    fsd, wsd = case.weights
    moved = sum((a - b) ** 2 for a, b in zip(u, case.theta, strict=True)) / 2
    expected = {
        "loss": (
            np.mean(losses),
            loss_value_error(passes, loss.gradient(passes.z, T), np.array(losses)),
        ),
        "fsd": (fsd * np.mean(divergences), fsd * divergence_value_error(here, there)),
        "wsd": (wsd * moved, (len(u) + 4) * wsd * moved),
    }
    for name, (value, scale) in expected.items():
        actual = np.float64(getattr(terms, name))
        assert_close(actual, np.float64(value), PROPAGATED, size=1, scale=scale, what=name)
    assert terms.total == terms.loss + terms.fsd + terms.wsd


@given(case=meta_cases(), step=scaled_normals())
def test_q_is_the_complex_step_of_the_total(case: MetaCase, step) -> None:
    u, objective = step.around(case.theta), case.objective()
    args = case.batch, case.other.inputs
    numeric = complex_step_jacobian(lambda v: objective.terms(case.theta, v, *args).total[None], u)
    assert_close(
        objective.lookahead_gradient(case.theta, u, *args),
        numeric[0],
        PROPAGATED_COMPLEX,
        size=1,
        scale=meta_gradient_error(objective, case.theta, u, *args),
        what="q",
    )


def loss_curvature_size(case: MetaCase, d: Array) -> float:
    """Norm of the terms of E[(J d)^T |d^2 L/dz^2| (J d)] and of what J's curvature adds to H d.

    Each layer's curvature is at most that of its activations, 1, times the weights around it.
    """
    network, X = case.problem.network, case.batch.inputs
    paths = np.prod(
        [1.0 + np.linalg.norm(case.theta[layer.parameters]) for layer in network.layers]
    )
    return float((paths * (1.0 + np.abs(X).max())) ** 2 * (1.0 + np.abs(d).sum()) ** 2)


def slope_error(case: MetaCase, d: Array) -> float:
    """Bound for g^T d."""
    loss, (X, T) = case.problem.loss, case.batch
    passes = pass_errors(case.problem.network, case.theta, X)
    dL = loss.gradient(passes.z, T)
    e_g = gradient_error(passes, dL, loss_gradient_error(passes, dL))
    return e_g * float(np.linalg.norm(d)) + (len(d) + 2) * float(np.abs(case.gradient) @ d)


def gauss_newton_error(case: MetaCase, d: Array) -> float:
    """Bound for 1/2 d^T G_J d: J, and |d^2 L/dz^2| <= 1 known to e_z."""
    passes = pass_errors(case.problem.network, case.theta, case.batch.inputs)
    N, C = passes.z.shape
    known = np.max(passes.e_z + 16.0 * (1.0 + np.abs(passes.z)), axis=1) + len(d) + 2 * C + N
    change = np.abs(passes.J) @ d  # (N, C)
    bend = np.sum(change, axis=1) * np.sum(change * known[:, None] + 2 * passes.e_J @ d, axis=1)
    return float(np.mean(bend))


def bend_error(case: MetaCase, d: Array) -> float:
    """Bound for 1/2 d^T H d of an MLP: the moduli of J_B's second derivative along d.

    z' and z'' are carried through with every term by its modulus and every slope and curvature at
    most 1. An activation's own third derivative is at most 2: so much its error counts.
    """
    network, (X, T) = case.problem.network, case.batch
    passes = pass_errors(network, case.theta, X)
    inputs = [np.abs(a) for a in network.trace(case.theta, X).layer_inputs]
    a1 = a2 = np.zeros_like(inputs[0])
    s1 = s2 = np.zeros_like(passes.z)
    for layer, a in zip(network.layers, inputs, strict=True):
        W, dW = np.abs(layer.weight_matrix(case.theta)), layer.weight_matrix(d)
        s1 = a1 @ W.T + a @ dW.T + (0.0 if layer.bias is None else d[layer.bias])
        s2 = a2 @ W.T + 2.0 * a1 @ dW.T
        a1, a2 = s1, s1**2 + s2
    dL = np.abs(case.problem.loss.gradient(passes.z, T))
    terms = float(np.mean(np.sum(dL * s2, axis=1) + np.sum(s1, axis=1) ** 2))
    return terms * (2.0 * float(passes.e_z.max()) + 34.0 * len(inputs) + len(d) + len(X))


approximations = pytest.mark.parametrize(
    ("loss", "fsd"),
    [
        ("linear", "exact"),
        ("quadratic", "exact"),
        ("gauss_newton", "exact"),
        ("exact", "quadratic"),
    ],
)


@approximations
@given(case=meta_cases(), step=scaled_normals())
def test_q_of_half_an_approximation_is_the_complex_step_of_its_total(
    loss: str, fsd: str, case: MetaCase, step
) -> None:
    u, objective = step.around(case.theta), case.objective(loss, fsd)
    args = case.batch, case.other.inputs
    numeric = complex_step_jacobian(lambda v: objective.terms(case.theta, v, *args).total[None], u)
    G = fsd_hessian(case.problem.network, case.discrepancy, case.theta, case.other.inputs)
    d = np.abs(u) + np.abs(case.theta)
    curved = case.weights.fsd * float(np.linalg.norm(np.abs(G) @ d)) * 2 * len(d)
    if loss in ("quadratic", "gauss_newton"):
        curved += loss_curvature_size(case, d) * len(d)
    scale = curved + meta_gradient_error(case.objective(), case.theta, u, *args)
    scale += meta_gradient_error(case.objective(), case.theta, case.theta, *args)
    q = objective.lookahead_gradient(case.theta, u, *args)
    assert_close(q, numeric[0], PROPAGATED_COMPLEX, size=1, scale=scale, what="q")


@given(case=meta_cases(kinds=["linear", "fixed-head"]), step=scaled_normals())
def test_on_linear_networks_both_quadratic_losses_agree(case: MetaCase, step) -> None:
    """H by complex steps of g, G_J by products of Jacobians; with squared error exact as well."""
    u = step.around(case.theta)
    args = case.theta, u, case.batch, case.other.inputs
    kinds = ["quadratic", "gauss_newton"]
    if isinstance(case.problem.loss, SquaredError):
        kinds.append("exact")
    first, *others = (case.objective(kind).terms(*args).loss for kind in kinds)
    d = np.abs(u - case.theta)
    size = value_error(case, u) + slope_error(case, d) + gauss_newton_error(case, d)
    for kind, other in zip(kinds[1:], others, strict=True):
        assert_close(
            np.float64(other), np.float64(first), PROPAGATED_COMPLEX, size=1, scale=size, what=kind
        )


# Where nothing is 0 or 1, and no layer so wide that its bound is far from what happens.
ONE_UNIT = MetaCase(
    Problem(MLP([1, 1, 1], bias=False), SquaredError()),
    np.array([0.7, -0.9]),
    Batch(np.array([[0.3]]), np.array([[0.6]])),
    Batch(np.array([[0.4]]), np.array([[0.1]])),
    CategoricalKL(),
    ProximityWeights(0.1, 0.1),
)


@share(0.5)
@given(case=meta_cases(kinds=["mlp"], smooth=True), step=scaled_normals())
@example(case=ONE_UNIT, step=ScaledNormal(1.0, 1))
@example(case=ONE_UNIT, step=ScaledNormal(1.0, 2))
@example(case=ONE_UNIT, step=ScaledNormal(1.0, 3))
def test_the_quadratic_loss_is_the_second_taylor_polynomial(case: MetaCase, step) -> None:
    """Along the step: J_B(theta) + J' + J''/2, with the derivatives from g at complex steps."""
    u = step.around(case.theta)
    d, problem, args = u - case.theta, case.problem, case.batch
    h = 1e-30
    slope = np.imag(problem.value(case.theta + 1j * h * d, *args)) / h
    bend = np.imag(problem.gradient(case.theta + 1j * h * d, *args)) @ d / h
    expected = problem.value(case.theta, *args) + slope + 0.5 * bend
    actual = case.objective("quadratic").terms(case.theta, u, args, case.other.inputs).loss
    d = np.abs(d)
    added = 4.0 * float(problem.value(case.theta, *args) + abs(slope) + abs(bend))
    assert_close(
        np.float64(actual),
        np.float64(expected),
        PROPAGATED_COMPLEX,
        size=1,
        iterations=2,  # both sides take complex steps
        scale=added + slope_error(case, d) + bend_error(case, d),
        what="loss",
    )


@share(0.5)
@given(case=meta_cases(kinds=["mlp"], smooth=True), step=scaled_normals())
def test_the_gauss_newton_loss_bends_with_the_outputs_alone(case: MetaCase, step) -> None:
    """J_B(theta) + E[dL/dz v] + 1/2 E[v (d^2 L/dz^2) v] with v = J d, all by complex steps."""
    u = step.around(case.theta)
    d, problem, (X, T) = u - case.theta, case.problem, case.batch
    h, z = 1e-30, problem.network.outputs(case.theta, X)
    v = np.imag(problem.network.outputs(case.theta + 1j * h * d, X)) / h
    bend = np.sum(np.imag(problem.loss.gradient(z + 1j * h * v, T)) / h * v)
    slope = np.sum(problem.loss.gradient(z, T) * v)
    expected = problem.value(case.theta, X, T) + (slope + 0.5 * bend) / len(X)
    actual = case.objective("gauss_newton").terms(case.theta, u, case.batch, X).loss
    size = value_error(case, case.theta) + slope_error(case, np.abs(d))
    size += gauss_newton_error(case, np.abs(d))
    assert_close(
        np.float64(actual),
        np.float64(expected),
        PROPAGATED_COMPLEX,
        size=1,
        scale=size,
        what="loss",
    )


@share(0.25)
@given(st.data())
def test_q_and_its_terms_equal_differences_in_fifty_digits(data: st.DataObject) -> None:
    """The whole meta-objective against a scalar mpmath twin that shares no code."""
    loss_name = data.draw(st.sampled_from(list(LOSSES)), label="loss")
    rho_name = data.draw(st.sampled_from(list(DISCREPANCIES)), label="discrepancy")
    network = data.draw(
        networks(kinds=["mlp"], activations=SMOOTH, max_width=2, max_hidden=1), label="network"
    )
    assert isinstance(network, MLP)
    loss = LOSSES[loss_name]
    case = MetaCase(
        problem=Problem(network, loss),
        theta=data.draw(parameters(network), label="theta"),
        batch=data.draw(batches(network, loss, max_size=3), label="B"),
        other=data.draw(batches(network, loss, max_size=3), label="B'"),
        discrepancy=DISCREPANCIES[rho_name],
        weights=data.draw(proximity_weights(), label="weights"),
    )
    u = data.draw(scaled_normals(), label="step").around(case.theta)
    bias = network.layers[0].bias is not None
    theta = hp.numbers(case.theta)

    def outputs(v: hp.Vector, x: Array) -> hp.Vector:
        return hp.mlp(v, hp.numbers(x), network.widths, network.activation, bias)

    def terms(v: hp.Vector) -> list:
        lossy = [
            hp.squared_error(outputs(v, x), hp.numbers(t))
            if loss_name == "squared_error"
            else hp.cross_entropy(outputs(v, x), int(t))
            for x, t in zip(*case.batch, strict=True)
        ]
        apart = [
            hp.DIVERGENCES[rho_name](outputs(v, x), outputs(theta, x)) for x in case.other.inputs
        ]
        fsd, wsd = hp.numbers(case.weights)
        distance = sum((a - b) ** 2 for a, b in zip(v, theta, strict=True))
        return [sum(lossy) / len(lossy), fsd * sum(apart) / len(apart), wsd / 2 * distance]

    args = case.theta, u, case.batch, case.other.inputs
    with hp.context():
        exact = np.array(terms(hp.numbers(u)), dtype=float)
    actual = np.array(case.objective().terms(*args))
    assert_close(actual, exact, PROPAGATED, size=1, scale=value_error(case, u), what="terms")
    assert_close(
        case.objective().lookahead_gradient(*args),
        hp.gradient(lambda v: sum(terms(v)), hp.numbers(u)),
        PROPAGATED,
        size=1,
        scale=meta_gradient_error(case.objective(), *args),
        what="q",
    )


@given(case=meta_cases())
def test_without_a_step_q_is_the_cost_gradient(case: MetaCase) -> None:
    """At theta' = theta both proximity terms and their gradients vanish."""
    args = case.theta, case.theta, case.batch, case.other.inputs
    terms = case.objective().terms(*args)
    assert_close(np.array(terms[1:]), np.zeros(2), BITWISE, what="proximity")
    q = case.objective().lookahead_gradient(*args)
    assert_close(q, case.gradient, BITWISE, what="q")


@given(case=meta_cases(), step=scaled_normals())
def test_q_hat_of_one_batch_is_eq_43(case: MetaCase, step) -> None:
    """The linear loss and the quadratic FSD at theta - P g, against eq. 43 with this one g."""
    n = len(case.theta)
    P = step.around(np.eye(n))
    G = fsd_hessian(case.problem.network, case.discrepancy, case.theta, case.other.inputs)
    M = proximity_matrix(G, *case.weights)
    g = case.gradient
    u = preconditioned(case.theta, g, P)
    objective = case.objective().approximation()
    terms = objective.terms(case.theta, u, case.batch, case.other.inputs)
    cost = case.problem.value(case.theta, *case.batch)
    # theta - P g - theta is known to eps |theta|.
    d = np.abs(P) @ np.abs(g) + np.abs(case.theta) + np.abs(u)
    scale = float(np.abs(g) @ d + d @ np.abs(M) @ d + abs(cost))
    assert_close(
        np.float64(terms.total - cost),
        np.float64(approximate_meta_objective(P, g[None], M)),
        ROUNDING,
        size=3 * n,
        scale=scale,
        what="Q-hat",
    )


@given(case=meta_cases(), step=scaled_normals())
def test_eq_43_is_a_mean_over_batches(case: MetaCase, step) -> None:
    gradients = case.problem.example_gradients(case.theta, *case.batch)
    n = len(case.theta)
    P = step.around(np.eye(n))
    G = fsd_hessian(case.problem.network, case.discrepancy, case.theta, case.other.inputs)
    fsd, wsd = case.weights
    printed = np.mean(
        [-g @ P @ g + fsd / 2 * g @ P.T @ G @ P @ g + wsd / 2 * g @ P.T @ P @ g for g in gradients]
    )
    a, M = np.abs(gradients), fsd * np.abs(G) + wsd * np.eye(n)
    steps = a @ np.abs(P).T
    scale = float(np.sum(a * steps) + np.einsum("mi,ij,mj->", steps, M, steps))
    assert_close(
        np.float64(approximate_meta_objective(P, gradients, proximity_matrix(G, fsd, wsd))),
        np.float64(printed),
        ROUNDING,
        size=4 * n + len(gradients),
        scale=scale,
        what="Q-hat",
    )


@given(case=meta_cases(), weight=st.floats(0.0, 100.0))
def test_the_loss_batch_and_the_fsd_batch_stay_apart(case: MetaCase, weight: float) -> None:
    """The FSD addend does not see B, the loss addend does not see B'."""
    objective = MetaObjective(case.problem, case.discrepancy, weight, 0.0)
    u = case.theta + 0.5
    both = objective.terms(case.theta, u, case.batch, case.other.inputs)
    swapped = objective.terms(case.theta, u, case.other, case.other.inputs)
    changed = objective.terms(case.theta, u, case.batch, case.batch.inputs)
    assert_close(np.float64(swapped.fsd), np.float64(both.fsd), BITWISE, what="FSD")
    assert_close(np.float64(changed.loss), np.float64(both.loss), BITWISE, what="loss")


def test_meta_objectives_check_their_options() -> None:
    problem = Problem(MLP([2, 2]), SquaredError())
    with pytest.raises(ValueError, match=r"`fsd_weight` must be non-negative and finite, got -1.0"):
        MetaObjective(problem, CategoricalKL(), -1.0, 0.0)
    with pytest.raises(ValueError, match=r"`wsd_weight` must be non-negative and finite, got nan"):
        MetaObjective(problem, CategoricalKL(), 1.0, float("nan"))
    with pytest.raises(ValueError, match=r"`loss` must be one of .* got 'cubic'; choose one"):
        MetaObjective(problem, CategoricalKL(), 1.0, 1.0, loss="cubic")
    with pytest.raises(ValueError, match=r"`G` must have shape \(n, n\), got \(2, 3\)"):
        proximity_matrix(np.ones((2, 3)), 1.0, 1.0)
