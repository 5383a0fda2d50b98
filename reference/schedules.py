"""Schedules of the learning rate or of lambda on the noisy quadratic, optimized through all steps.

| symbol | meaning | shape |
|---|---|---|
| s_t | the schedule: what the rule below makes the learning rate eta_t of | (T,) |
| psi | the free parameters of a schedule | (k,) |
| m_t | E[x_t^2]; m_{t+1} = (1 - eta_t k)^2 m_t + (eta_t k)^2 v | (n,) |
| k | 2 a h, the Hessian's diagonal | (n,) |
| p_t | the adjoint, d loss / d m_t | (n,) |
| r_t | eta_12 of m_t for lambda = 0: E||g||^2 / E[g^T 2aH g] | scalar |

| rule | s_t | eta_t |
|---|---|---|
| "rate" | the learning rate > 0 | s_t |
| "wsd_weight" | lambda >= 0 | r_t / (1 + s_t r_t): eta_12 of m_t for this lambda |
| "caution" | 0 < s_t <= 1 | s_t r_t: the same for lambda = (1/s_t - 1) / r_t >= 0 |

"caution" covers exactly what "wsd_weight" does, in a coordinate in which L-BFGS converges.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize

from reference.arrays import Array, finite_array, one_of
from reference.noisy_quadratic import Moments, NoisyQuadratic, other_batch_rate, same_batch_rate

RULES = ("rate", "wsd_weight", "caution")
OVERFLOWN = 1e3  # above the logarithm of any float64


class Unrolled(NamedTuple):
    """T steps of SGD in moments, and the derivative of the last loss.

    Attributes:
        losses: E f(x_t) before the first step and after every one, (T + 1,).
        rates: eta_t, (T,).
        greediest: r_t, the rate that lambda = 0 gives, (T,).
        gradient: d losses[T] / d s_t, (T,).
    """

    losses: Array
    rates: Array
    greediest: Array
    gradient: Array

    @property
    def wsd_weights(self) -> Array:
        """lambda_t = 1/eta_t - 1/r_t, (T,): non-negative under the rules of APO."""
        return 1.0 / self.rates - 1.0 / self.greediest


def unrolled(problem: NoisyQuadratic, second: Any, schedule: Any, rule: str = "rate") -> Unrolled:
    """Run the schedule (T,) from E[x_0^2] = `second` (n,), then its adjoint backwards.

    p_T = a h;  d loss / d eta_t = 2 sum_i p_{t+1} k (eta_t k v - (1 - eta_t k) m_t);
    p_t = p_{t+1} (1 - eta_t k)^2 + (d loss / d eta_t) (d eta_t / d r_t) (d r_t / d m_t).

    Raises:
        ValueError: `rule` is none of `RULES`, or a shape is wrong.
    """
    one_of("rule", rule, RULES)
    m = finite_array("second", second, problem.h.shape)
    s = finite_array("schedule", schedule, ("T",))
    k, v = problem.curvature, problem.v
    seconds, losses, rates, greediest = [m], [problem.expected_loss(m)], [], []
    for s_t in s:
        r = problem.power(m) / problem.bend(m)
        eta = {"rate": s_t, "wsd_weight": r / (1.0 + s_t * r), "caution": s_t * r}[rule]
        m = (1.0 - eta * k) ** 2 * m + (eta * k) ** 2 * v
        seconds.append(m)
        losses.append(problem.expected_loss(m))
        rates.append(eta)
        greediest.append(r)
    p, gradient = problem.a * problem.h, np.zeros_like(s)
    for t in reversed(range(len(s))):
        m, eta, r = seconds[t], rates[t], greediest[t]
        d_eta = 2.0 * (p * k) @ (eta * k * v - (1.0 - eta * k) * m)
        p = p * (1.0 - eta * k) ** 2
        if rule == "rate":
            gradient[t] = d_eta
        else:
            d_s, d_r = (-(eta**2), (eta / r) ** 2) if rule == "wsd_weight" else (r, s[t])
            gradient[t] = d_eta * d_s
            p = p + d_eta * d_r / problem.bend(m) * k**2 * (1.0 - r * k)
    return Unrolled(np.array(losses), np.array(rates), np.array(greediest), gradient)


def greedy(
    problem: NoisyQuadratic, second: Any, steps: int, batch: str, wsd_weight: float = 0.0
) -> Unrolled:
    """T steps, each with the learning rate that its own objective prefers, from E[x_0^2] (n,).

    Args:
        problem: the noisy quadratic.
        second: E[x_0^2], (n,).
        steps: T >= 1.
        batch: "same" for P22 eq. 12, "other" for eq. 13.
        wsd_weight: lambda >= 0.
    """
    one_of("batch", batch, ["same", "other"])
    prefer = same_batch_rate if batch == "same" else other_batch_rate
    moments = Moments(np.zeros(len(problem.h)), finite_array("second", second, problem.h.shape))
    rates = []
    for _ in range(steps):
        rates.append(prefer(problem, moments.second, wsd_weight))
        moments = problem.step(moments, rates[-1])
    return unrolled(problem, second, np.array(rates))


Values = tuple[Array, Array]  # s, (T,), and d s / d psi, (T, k)


def fixed(psi: Array, steps: int) -> Values:
    """s_t = exp(psi_0)."""
    s = np.full(steps, np.exp(psi[0]))
    return s, s[:, None]


def exponential(psi: Array, steps: int) -> Values:
    """s_t = exp(psi_0 (1 - u) + psi_1 u) with u = t / (T - 1): both ends are free."""
    u = np.linspace(0.0, 1.0, steps)
    s = np.exp(psi[0] * (1.0 - u) + psi[1] * u)
    return s, np.stack([s * (1.0 - u), s * u], axis=1)


def linear(psi: Array, steps: int) -> Values:
    """s_t = exp(psi_0) (1 - u) + exp(psi_1) u: both ends are free and positive."""
    u = np.linspace(0.0, 1.0, steps)
    ends = np.stack([np.exp(psi[0]) * (1.0 - u), np.exp(psi[1]) * u], axis=1)
    return ends.sum(axis=1), ends


def clipped_linear(psi: Array, steps: int) -> Values:
    """s_t = max(0, psi_0 (1 - u) + psi_1 u): an end may lie below 0."""
    u = np.linspace(0.0, 1.0, steps)
    line = psi[0] * (1.0 - u) + psi[1] * u
    rises = (line > 0.0).astype(float)
    return rises * line, np.stack([rises * (1.0 - u), rises * u], axis=1)


def optimal(psi: Array, steps: int) -> Values:
    """s_t = exp(psi_t): every step is free."""
    s = np.exp(psi[:steps])
    return s, np.diag(s)


class Family(NamedTuple):
    """A schedule with its rule, where the search starts, and psi's upper bound if it has one."""

    rule: str
    schedule: Callable[[Array, int], Values]
    starts: Callable[[int], Sequence[Array]]
    upper: float | None = None


def _ends(*pairs: tuple[float, ...]) -> Callable[[int], Sequence[Array]]:
    return lambda steps: [np.array(pair) for pair in pairs]


def _falling(*lines: tuple[float, float]) -> Callable[[int], Sequence[Array]]:
    return lambda steps: [np.linspace(*line, steps) for line in lines]


# Rates and weights in units of P18's problem with a = 1/2, whose largest curvature is 1.
STABLE = float(np.log(2.0))
FAMILIES: dict[str, dict[str, Family]] = {
    "SGD": {
        "optimal": Family("rate", optimal, _falling((-1.0, -4.0), (-1.5, -3.5))),
        "exponential": Family("rate", exponential, _ends((0.5, -0.5), (0.0, -3.0))),
        "linear": Family("rate", linear, _ends((0.0, -5.0), (0.5, -2.0))),
        "fixed": Family("rate", fixed, _ends((-1.0,), (0.0,))),
        # No rate above 2 / (2 a h_max), at which SGD is stable step by step.
        "stable optimal": Family("rate", optimal, _falling((-1.0, -1.0), (0.0, -4.0)), STABLE),
        "stable exponential": Family("rate", exponential, _ends((0.0, -3.0), (0.5, -2.0)), STABLE),
    },
    "SGD + APO": {
        "optimal": Family("caution", optimal, _falling((0.0, -3.0), (-0.5, -0.5)), 0.0),
        "exponential": Family("wsd_weight", exponential, _ends((-2.0, 1.0), (-5.0, 3.0))),
        "linear": Family("wsd_weight", linear, _ends((-5.0, 2.0), (-3.0, 0.0))),
        "clipped linear": Family("wsd_weight", clipped_linear, _ends((-20.0, 20.0), (-50.0, 50.0))),
        "fixed": Family("wsd_weight", fixed, _ends((-1.0,), (1.0,))),
    },
}


class Optimum(NamedTuple):
    """The best local minimum that the starts led to.

    Attributes:
        psi: (k,).
        run: the steps at psi.
        slope: the largest |d log loss / d psi| that no bound holds back; 0 at a minimum.
        found: the loss that each start led to.
    """

    psi: Array
    run: Unrolled
    slope: float
    found: tuple[float, ...]

    @property
    def loss(self) -> float:
        """E f(x_T)."""
        return float(self.run.losses[-1])


def optimize(problem: NoisyQuadratic, second: Any, steps: int, family: Family) -> Optimum:
    """Minimize log E f(x_T) over psi by L-BFGS with the exact gradient, from every start.

    The minimum is a local one for more than one free parameter: compare `found`.
    """

    def objective(psi: Array) -> tuple[float, Array]:
        # A far too large trial step may overflow; the line search then shortens it.
        with np.errstate(over="ignore", invalid="ignore"):
            s, jacobian = family.schedule(psi, steps)
            if np.isfinite(s).all():
                run = unrolled(problem, second, s, family.rule)
                slopes = run.gradient @ jacobian / run.losses[-1]
                if np.isfinite(run.losses[-1]) and np.isfinite(slopes).all():
                    return float(np.log(run.losses[-1])), slopes
        return OVERFLOWN, np.zeros_like(psi)

    ends = [
        minimize(
            objective,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=[(None, family.upper)] * len(start),
            options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 3000, "maxfun": 3000},
        ).x
        for start in family.starts(steps)
    ]
    # Evaluated again: after a failed line search SciPy's `fun` may not be the value at its `x`.
    values = [objective(psi) for psi in ends]
    psi, (_, slopes) = min(zip(ends, values, strict=True), key=lambda end: end[1][0])
    if family.upper is not None:
        slopes = psi - np.minimum(psi - slopes, family.upper)  # of the projected gradient
    run = unrolled(problem, second, family.schedule(psi, steps)[0], family.rule)
    found = tuple(float(np.exp(value)) for value, _ in values)
    return Optimum(psi, run, float(np.abs(slopes).max()), found)
