"""Slips of both papers: what the printed form gives, and what was meant.

| where | printed | meant |
|---|---|---|
| P22 eq. 9 | W (m_i, m_i+1), A (m_i+1), B (m_i) | m_i is the output size: W (out, in) |
| P22 eq. 15 | D_F(u, theta, x) under E over x~ | D_F(u, theta, x~) |
| P22 eq. 16 | D_F(f(x~, u), f(x~, theta)) | rho of the outputs |
| P22 eq. 27 | H = Hessian of J_B at the running theta | at theta^(t) |
| P22 eq. 34 | J^T H_rho J for every theta | at theta = theta^(t) (test_curvature) |
| P22 eq. 38 | lambda_FSD d^T G d | lambda_FSD / 2 d^T G d, as in eq. 43 |
| P22 eq. 46 | G for (G + G^T) / 2 | G is symmetric, being a Hessian (test_derivation) |
| P22 eq. 47 | F | G, as in eq. 46 and 48 |
| P22 eq. 53 | Da_l = W^T Ds_l+1 | W_l+1 |
| P22 app. H.2 | G_l = A_l^-1 kron B_l^-1 | its inverse is, and A_l is of a, not a-bar (necessity) |
| P18 section 1 | D(f(theta), f(g(theta, phi))) | the other order, as in eq. 2 and 11 |
| P18 eq. 5 | lambda d^T G d | lambda / 2 d^T G d, of which eq. 6 is the arg min |
| P18 eq. 9 | p(y | z) in the numerator | p(y | z~) |
| P18 eq. 16 | d^T H d is the second order of eq. 8 | d^T H d / 2; lambda = 1/2 makes up for it |
| P18 Lemma 1 | geodesic towards +g_k | towards -g_k |
| P18 Lemma 1 | C^2 G^2 gamma^3 norm(g)^4 / 8 | the same with norm(g)^2, or without G^2 |
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import (
    MLP,
    Batch,
    Bregman,
    CategoricalKL,
    CrossEntropy,
    FixedHead,
    Linear,
    MetaObjective,
    Problem,
    SquaredError,
    SquaredEuclidean,
    approximate_meta_gradient,
    approximate_meta_objective,
    complex_step_jacobian,
    dense,
    ekfac_matrix,
    exact_fisher,
    exact_step,
    fsd_hessian,
    preconditioned,
    proximity_matrix,
)
from reference.analytic import log_softmax, softmax
from reference.arrays import Array
from verification.strategies import MetaCase, meta_cases, spd_matrices, weights
from verification.tolerances import COMPLEX_STEP, FUNCTION, ROUNDING, SOLVE, assert_close

seeds = st.integers(0, 2**16)
moderate = weights(min_decade=-1.0, max_decade=1.0, zero=False)
symmetric = spd_matrices(max_size=3, max_condition=1e2, max_log_scale=0.5)


def eq_38(P: Array, G: Array, gradients: Array, fsd: float, wsd: float) -> Array:
    """E[g^T d + lambda_FSD d^T G d + lambda_WSD / 2 ||d||^2] with d = -P g, as printed, (1,)."""
    steps = [(g, -P @ g) for g in gradients]
    return np.array([np.mean([g @ d + fsd * (d @ G @ d) + wsd / 2 * (d @ d) for g, d in steps])])


@given(G=symmetric, fsd=moderate, wsd=moderate, seed=seeds)
def test_eq_38_as_printed_is_minimized_by_a_doubled_fsd_weight(G, fsd, wsd, seed: int) -> None:
    """Its arg min is (2 lambda_FSD G + lambda_WSD I)^-1; at P* its gradient is lambda_FSD G P* S.

    The value is a loop over eq. 38, its gradient a complex step of it, the minimizer the solution
    of the normal equations over all P: no two of the three share a formula.
    """
    n = len(G.matrix)
    g = np.random.default_rng(seed).standard_normal((2 * n, n))
    S = g.T @ g / len(g)

    def gradient(P: Array) -> Array:
        flat = complex_step_jacobian(
            lambda phi: eq_38(phi.reshape(n, n), G.matrix, g, fsd, wsd), P.ravel()
        )
        return flat.reshape(n, n)

    M = proximity_matrix(G.matrix, fsd, wsd)
    meant, printed = np.linalg.inv(M), dense(g, M + fsd * G.matrix).P
    condition = float(np.linalg.cond(M + fsd * G.matrix) * np.linalg.cond(S))
    inverse = np.linalg.inv(2 * fsd * G.matrix + wsd * np.eye(n))
    assert_close(printed, inverse, SOLVE, condition=condition, size=n * n, what="arg min")
    scale = float(np.trace(S))  # of the addend E[g g^T] that the two others cancel
    size = 3 * n + len(g)
    zero = np.zeros((n, n))
    at_minimum = gradient(printed)
    assert_close(at_minimum, zero, SOLVE, condition=condition, size=size, scale=scale)
    left = fsd * G.matrix @ meant @ S
    assert_close(gradient(meant), left, SOLVE, condition=condition, size=size, scale=scale)


def test_eq_38_as_printed_shortens_every_step() -> None:
    """G = I, lambda_FSD = 1, lambda_WSD = 0: eq. 43 gives P = I, eq. 38 half of it."""
    g = np.eye(2)
    printed = dense(g, 2.0 * proximity_matrix(np.eye(2), 1.0, 0.0)).P
    assert_close(printed, 0.5 * np.eye(2), SOLVE, what="arg min of eq. 38")
    values = [eq_38(P, np.eye(2), g, 1.0, 0.0).item() for P in (np.eye(2), 0.5 * np.eye(2))]
    assert values == [0.0, -0.25]  # at P* no descent is left


def softmax_case() -> tuple[Problem, Array, Array]:
    """A softmax model with inputs whose predictions differ: (problem, theta, X)."""
    problem = Problem(Linear(2, 2, bias=False), CrossEntropy())
    theta = np.array([1.0, -1.0, 0.5, 0.0])
    return problem, theta, np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])


@pytest.mark.parametrize(
    ("discrepancy", "slip"), [(CategoricalKL(), False), (SquaredEuclidean(), True)]
)
def test_eq_47_as_printed_holds_for_the_kl_alone(discrepancy, slip: bool) -> None:
    """F = G only where the discrepancy is the model's own KL, and eq. 47 is stated for any.

    With the squared distance of logits, (lambda_FSD F + lambda_WSD I)^-1 leaves eq. 46 unsolved,
    and Q-hat above its minimum by 1/2 E||(P_F - P*) g||_M^2.
    """
    problem, theta, X = softmax_case()
    G = fsd_hessian(problem.network, discrepancy, theta, X)
    F = exact_fisher(problem, theta, X)
    M, M_F = proximity_matrix(G, 1.0, 0.1), proximity_matrix(F, 1.0, 0.1)
    P, P_F = np.linalg.inv(M), np.linalg.inv(M_F)
    g = np.random.default_rng(0).standard_normal((9, len(theta)))
    residual = np.linalg.norm(approximate_meta_gradient(P_F, g, M))
    steps = g @ (P_F - P).T
    excess = 0.5 * np.mean(np.sum(steps * (steps @ M), axis=1))
    best, value = (approximate_meta_objective(Q, g, M) for Q in (P, P_F))
    condition = float(np.linalg.cond(M) * np.linalg.cond(M_F))
    scale = abs(best) + float(np.linalg.norm(P_F) ** 2 * np.linalg.norm(M) * np.sum(g**2) / len(g))
    assert_close(
        np.float64(value - best), excess, SOLVE, condition=condition, scale=scale, what="excess"
    )
    if slip:
        assert np.linalg.norm(F - G) > 0.5 * np.linalg.norm(G)
        assert residual > 1.0
        assert value > 0.0 > best  # worse than no step at all
    else:
        assert_close(F, G, FUNCTION, size=len(X) * 2, what="F and G")
        assert residual <= SOLVE.allowed(condition=condition, size=len(g)) * np.sum(g**2)


@given(data=st.data(), seed=seeds)
def test_eq_9_fits_a_weight_that_is_out_by_in(data: st.DataObject, seed: int) -> None:
    """A_l (activations) stands left in A kron B only if vec stacks the columns of an (out, in) W.

    A layer that multiplies from the right, s = a W with W (in, out), has the block B_l kron A_l:
    if m_i were the input size, eq. 9's A would be the factor of the gradients.
    """
    in_, out = data.draw(st.integers(1, 3), label="in"), data.draw(st.integers(1, 3), label="out")
    rng = np.random.default_rng(seed)
    head, X = rng.standard_normal((out + 1, out)), rng.standard_normal((4, in_))
    network = FixedHead([head], [in_])
    G = fsd_hessian(network, SquaredEuclidean(), np.zeros(in_ * out), X)
    A, B = X.T @ X / len(X), head.T @ head
    scale = float(np.linalg.norm(A) * np.linalg.norm(B))
    size = len(X) * len(head)
    assert_close(G, np.kron(A, B), ROUNDING, size=size, scale=scale, what="(out, in)")
    # vec(W^T) takes vec(W)'s entries row by row
    transposed = np.arange(in_ * out).reshape(out, in_, order="F").ravel()
    from_the_right = G[np.ix_(transposed, transposed)]
    assert_close(from_the_right, np.kron(B, A), ROUNDING, size=size, scale=scale, what="(in, out)")


def test_eq_9_does_not_take_an_input_size_for_m_i() -> None:
    """in = 2 and out = 3: with the shapes of the other reading eq. 9 and 10 are not defined."""
    A, B, S = np.eye(2), np.eye(3), np.ones((3, 2))
    assert ekfac_matrix(A, B, S).shape == (6, 6)
    with pytest.raises(ValueError, match=r"`A` must have shape \(3, 3\), got \(2, 2\)"):
        ekfac_matrix(A, B, S.T)


@given(seed=seeds)
def test_eq_53_multiplies_by_the_next_weight(seed: int) -> None:
    """Ds_l is the derivative in b_l, taken by complex steps: Ds_1 = (W_2^T Ds_2) * sigma'(s_1)."""
    network = MLP([2, 2, 2, 1])
    rng = np.random.default_rng(seed)
    theta, x = rng.standard_normal(network.size), rng.standard_normal((1, 2))
    D = complex_step_jacobian(lambda u: network.outputs(u, x)[0], theta)[0]
    first, second = network.layers[:2]
    assert first.bias is not None
    assert second.bias is not None
    W_1, W_2 = first.weight_matrix(theta), second.weight_matrix(theta)
    slope = 1.0 - np.tanh(W_1 @ x[0] + theta[first.bias]) ** 2
    Ds_1, Ds_2 = D[first.bias], D[second.bias]
    # the slope 1 - tanh^2 errs by eps absolutely
    scale = float(np.linalg.norm(np.abs(W_2.T) @ np.abs(Ds_2)))
    assert_close((W_2.T @ Ds_2) * slope, Ds_1, COMPLEX_STEP, size=4, scale=scale, what="W_2")
    distance = np.linalg.norm((W_1.T @ Ds_2) * slope - Ds_1)
    expected = np.linalg.norm(((W_1 - W_2).T @ Ds_2) * slope)
    slack = COMPLEX_STEP.allowed(size=4) * (scale + np.linalg.norm(W_1.T @ Ds_2))
    assert abs(distance - expected) <= slack
    assert np.linalg.norm(W_1 - W_2) > 0.0


def test_eq_27_needs_the_hessian_of_the_current_parameters() -> None:
    """J = u^4 / 4 at theta = 1, lambda_WSD = 1: eq. 31 steps to 3/4, where eq. 27 with H = 3 u^2
    still has the slope 15/32; with H = 3 it is stationary there. All numbers are dyadic.
    """
    step = 1.0 - 1.0 / (3.0 + 1.0)

    def slope(u: float, H: float, dH: float) -> float:
        d = u - 1.0
        return 1.0 + H * d + dH / 2.0 * d**2 + d

    assert step == 0.75
    assert slope(step, 3.0, 0.0) == 0.0
    assert slope(step, 3.0 * step**2, 6.0 * step) == 15.0 / 32.0


@given(case=meta_cases(kinds=["linear", "fixed-head"]), weight=moderate)
def test_p18_eq_6_minimizes_eq_5_only_with_a_half(case: MetaCase, weight: float) -> None:
    """With the half its gradient vanishes at eq. 6; as printed g is left, and half the step is
    the minimizer. G is made regular by a ridge, which neither equation sees.
    """
    G = fsd_hessian(case.problem.network, case.discrepancy, case.theta, case.other.inputs)
    G = 0.5 * (G + G.T) + np.eye(len(G))
    g = case.gradient
    step = preconditioned(np.zeros(len(g)), g, np.linalg.inv(G) / weight)  # eq. 6

    def gradient(factor: float, d: Array) -> Array:
        """Of g^T d + factor * lambda d^T G d, (n,)."""
        return complex_step_jacobian(lambda u: np.array([g @ u + factor * weight * (u @ G @ u)]), d)

    condition, scale = float(np.linalg.cond(G)), float(np.linalg.norm(g))
    for name, slope, expected in (
        ("with the half", gradient(0.5, step)[0], np.zeros_like(g)),
        ("as printed", gradient(1.0, step)[0], -g),
        ("half the step", gradient(1.0, 0.5 * step)[0], np.zeros_like(g)),
    ):
        assert_close(
            slope, expected, SOLVE, condition=condition, size=2 * len(g), scale=scale, what=name
        )


def test_p18_eq_6_and_not_eq_5_is_the_minimizer_of_eq_4() -> None:
    """z = theta x, D = ||z~ - z~_k||^2 (eq. 7), lambda = 1: eq. 4 is g d + x~^2 d^2.

    G = 2 x~^2, so eq. 6 gives -g / (2 x~^2), where eq. 4 is least; eq. 5 as printed gives half.
    """
    problem, theta = Problem(Linear(1, 1, bias=False), SquaredError()), np.array([1.0])
    batch, other = Batch(np.array([[1.0]]), np.array([[3.0]])), np.array([[2.0]])
    rho = SquaredEuclidean(half=False)
    g = problem.gradient(theta, *batch)  # -2
    G = fsd_hessian(problem.network, rho, theta, other)  # 8
    point = exact_step(MetaObjective(problem, rho, 1.0, 0.0, loss="linear"), theta, batch, other)
    assert point.certified
    assert_close(point.u - theta, -np.linalg.solve(G, g), SOLVE, scale=2.0, what="eq. 6")
    assert_close(point.u - theta, [0.25], SOLVE, scale=2.0, what="twice eq. 5's 0.125")


@pytest.mark.loose("Three terms, which both sides add in the same order: they agree to the bit.")
@given(seed=seeds)
def test_p18_eq_9_needs_the_logits_of_the_same_input_in_the_numerator(seed: int) -> None:
    """As printed, at no change it is -KL(p(z~) || p(z)) < 0, where a divergence is 0."""
    z, tilde = np.random.default_rng(seed).standard_normal((2, 1, 3))

    def printed(logits: Array, current: Array) -> Array:
        """sum_y p(y | z~) log(p(y | z) / p(y | z~_k)), (N,)."""
        return np.sum(softmax(logits) * (log_softmax(z) - log_softmax(current)), axis=1)

    at_no_change = printed(tilde, tilde)
    meant = CategoricalKL("lookahead_current")
    scale = 1.0 + float(np.abs([z, tilde]).max())
    expected = -meant.value(tilde, z)
    assert_close(at_no_change, expected, FUNCTION, size=3, scale=scale, what="at no change")
    assert at_no_change[0] < 0.0
    assert meant.value(tilde, tilde)[0] == 0.0


@pytest.mark.parametrize("potential", ["squared_error", "cross_entropy"])
@given(seed=seeds)
def test_p18_eq_16_is_twice_the_second_order_of_eq_8(potential: str, seed: int) -> None:
    """The second derivative of eq. 8 along d is d^T H d, so its second order is half of eq. 16."""
    z0, d = np.random.default_rng(seed).standard_normal((2, 1, 3))
    rho = Bregman(potential)
    (H,) = rho.output_hessian(z0)
    slope = complex_step_jacobian(
        lambda t: np.sum(rho.gradient(z0 + t[0] * d, z0) * d, axis=1), np.zeros(1)
    )
    eq_16 = d[0] @ H @ d[0]
    scale = float(np.linalg.norm(d) ** 2)
    assert_close(slope.item(), eq_16, COMPLEX_STEP, size=9, scale=scale, what="second derivative")
    if potential == "squared_error":  # no higher order: eq. 8 is half of eq. 16
        # eq. 8 is a difference of potentials as large as z0 and z
        cancelled = float(np.linalg.norm(z0) + np.linalg.norm(d)) ** 2
        assert_close(
            rho.value(z0 + d, z0), [0.5 * eq_16], ROUNDING, size=9, scale=cancelled, what="eq. 8"
        )


def test_p18_lemma_1_follows_the_geodesic_against_the_gradient() -> None:
    """On the unit circle (C = 1) at (1, 0), with the effective gradient (0, 1) and gamma = 1/4.

    Z = v(gamma) must lie within C/2 gamma^2 of Y = (1, -gamma): it does for v'(0) = -g/||g||; for
    +g/||g||, as printed, it is sixteen times farther away, and the model has risen.
    """
    gamma, g = 0.25, np.array([0.0, 1.0])
    Z_k, Y = np.array([1.0, 0.0]), np.array([1.0, -gamma])
    meant, printed = (np.array([np.cos(t), np.sin(t)]) for t in (-gamma, gamma))
    bound = gamma**2 / 2.0
    assert np.linalg.norm(meant - Y) <= bound
    assert np.linalg.norm(printed - Y) > 15.0 * bound

    def model(Z: Array) -> float:
        return g @ (Z - Z_k) + np.sum((Z - Z_k) ** 2) / (2.0 * gamma)

    assert model(meant) <= -gamma / 4.0 < 0.0 < model(printed)


def test_p18_lemma_1_bounds_the_square_by_four_factors_of_g_in_all() -> None:
    """||Z - Y||^2 / (2 gamma) <= (C gamma^2 ||g||^2 / 2)^2 / (2 gamma) = C^2 gamma^3 ||g||^4 / 8.

    The printed bound has G^2 as well, six factors: on the unit circle with ||g|| = G = 1/2 and
    gamma = 1/2 = 1 / (4 C G) it is a quarter of that, and below what it bounds.
    """
    gamma, norm = 0.5, 0.5
    t = gamma * norm
    Z, Y = np.array([np.cos(t), -np.sin(t)]), np.array([1.0, -t])
    bounded = np.sum((Z - Y) ** 2) / (2.0 * gamma)
    meant = gamma**3 * norm**4 / 8.0
    assert norm**2 * meant < bounded <= meant


def test_p18_section_1_swaps_the_arguments_of_eq_11() -> None:
    """With KL the order matters: at logits (2, 0) against (0, 0) the two differ by a third."""
    z, z0 = np.array([[2.0, 0.0]]), np.zeros((1, 2))
    eq_11 = CategoricalKL("lookahead_current").value(z, z0)[0]
    section_1 = CategoricalKL("lookahead_current").value(z0, z)[0]
    other = CategoricalKL("current_lookahead").value(z, z0)[0]
    assert_close(section_1, other, FUNCTION, size=2, scale=2.0, what="the other order")
    assert section_1 > 1.3 * eq_11
