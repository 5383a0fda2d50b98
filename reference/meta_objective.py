"""The meta-objective Q at a lookahead theta', its three addends, and its approximation Q-hat.

| symbol | here | shape |
|---|---|---|
| theta | `theta`, the current parameters | (n,) |
| theta' | `lookahead`, u(theta, phi, B) | (n,) |
| B, B' | `batch` (inputs and targets), `fsd_inputs` | (N, d), (N', d) |
| lambda_FSD, lambda_WSD | `fsd_weight`, `wsd_weight` | >= 0 |
| q | dQ/dtheta' | (n,) |
| d | theta' - theta | (n,) |
| g, H | gradient and Hessian of J_B at theta | (n,), (n, n) |
| G_J | E_B[J^T (d^2 L/dz^2) J], the generalized Gauss-Newton matrix of J_B at theta | (n, n) |
| G | Hessian of D_F at theta | (n, n) |
| P | preconditioner, theta' = theta - P g | (n, n) |
| M | lambda_FSD G + lambda_WSD I | (n, n) |
"""

from typing import Any, NamedTuple, final

import numpy as np

from reference.arrays import Array, finite_array, non_negative, one_of
from reference.curvature import fsd_hessian, ggn
from reference.discrepancies import Discrepancy
from reference.problem import Batch, Problem


class MetaTerms(NamedTuple):
    """The three addends of Q, weights included."""

    loss: Any
    fsd: Any
    wsd: Any

    @property
    def total(self) -> Any:
        """Q."""
        return self.loss + self.fsd + self.wsd


@final
class MetaObjective:
    """Q = J_B(theta') + lambda_FSD E_{B'}[rho(z', z)] + lambda_WSD / 2 ||theta' - theta||^2.

    Args:
        problem: network and loss.
        discrepancy: rho.
        fsd_weight: lambda_FSD >= 0.
        wsd_weight: lambda_WSD >= 0.
        loss: "exact", "linear" for J_B(theta) + g^T d, "quadratic" for 1/2 d^T H d more, or
            "gauss_newton" for 1/2 d^T G_J d more.
        fsd: "exact", or "quadratic" for 1/2 d^T G d.

    Source: P22 eq. 8 and Algorithm 1; "linear" with "quadratic" is the Q-hat of Theorem 1;
    "quadratic" without FSD is eq. 27; "gauss_newton" is the model of Martens 2010.
    """

    def __init__(
        self,
        problem: Problem,
        discrepancy: Discrepancy,
        fsd_weight: float,
        wsd_weight: float,
        loss: str = "exact",
        fsd: str = "exact",
    ) -> None:
        self.problem = problem
        self.discrepancy = discrepancy
        self.fsd_weight = non_negative("fsd_weight", fsd_weight)
        self.wsd_weight = non_negative("wsd_weight", wsd_weight)
        self.loss = one_of("loss", loss, ["exact", "linear", "quadratic", "gauss_newton"])
        self.fsd = one_of("fsd", fsd, ["exact", "quadratic"])

    def approximation(self) -> "MetaObjective":
        """Q-hat: the loss linear, the FSD quadratic (P22 eq. 17 and 43)."""
        return MetaObjective(
            self.problem, self.discrepancy, self.fsd_weight, self.wsd_weight, "linear", "quadratic"
        )

    def terms(self, theta: Any, lookahead: Any, batch: Batch, fsd_inputs: Any) -> MetaTerms:
        """The addends of Q at `lookahead`; complex for a complex lookahead."""
        theta, lookahead = self._check(theta, lookahead)
        d = lookahead - theta
        if self.loss == "exact":
            loss = self.problem.value(lookahead, *batch)
        else:
            loss = self.problem.value(theta, *batch) + self.problem.gradient(theta, *batch) @ d
            if self.loss != "linear":
                loss = loss + 0.5 * d @ self.loss_curvature(theta, batch) @ d
        if self.fsd == "exact":
            z0 = self.problem.network.outputs(theta, fsd_inputs)
            z = self.problem.network.outputs(lookahead, fsd_inputs)
            fsd = np.mean(self.discrepancy.value(z, z0))
        else:
            fsd = 0.5 * d @ self._curvature(theta, fsd_inputs) @ d
        return MetaTerms(loss, self.fsd_weight * fsd, 0.5 * self.wsd_weight * (d @ d))

    def lookahead_gradient(
        self, theta: Any, lookahead: Any, batch: Batch, fsd_inputs: Any
    ) -> Array:
        """q = dQ/dtheta', (n,): E_B[J^T dL/dz] + lambda_FSD E_B'[J^T d rho/dz] + lambda_WSD d."""
        theta, lookahead = self._check(theta, lookahead)
        d = lookahead - theta
        loss = self.problem.gradient(lookahead if self.loss == "exact" else theta, *batch)
        if self.loss in ("quadratic", "gauss_newton"):
            loss = loss + self.loss_curvature(theta, batch) @ d
        if self.fsd == "exact":
            z0 = self.problem.network.outputs(theta, fsd_inputs)
            z = self.problem.network.outputs(lookahead, fsd_inputs)
            J = self.problem.network.jacobian(lookahead, fsd_inputs)
            fsd = np.einsum("nci,nc->i", J, self.discrepancy.gradient(z, z0)) / len(J)
        else:
            fsd = self._curvature(theta, fsd_inputs) @ d
        return loss + self.fsd_weight * fsd + self.wsd_weight * d

    def loss_curvature(self, theta: Any, batch: Batch) -> Array:
        """H, or G_J where `loss` is "gauss_newton", (n, n)."""
        if self.loss != "gauss_newton":
            return self.problem.hessian(theta, *batch)
        z = self.problem.network.outputs(theta, batch.inputs)
        H_L = self.problem.loss.hessian(z, batch.targets)
        return ggn(self.problem.network.jacobian(theta, batch.inputs), H_L)

    def _curvature(self, theta: Array, fsd_inputs: Any) -> Array:
        return fsd_hessian(self.problem.network, self.discrepancy, theta, fsd_inputs)

    def _check(self, theta: Any, lookahead: Any) -> tuple[Array, Array]:
        shape = (self.problem.network.size,)
        return finite_array("theta", theta, shape), finite_array("lookahead", lookahead, shape)


def proximity_matrix(G: Any, fsd_weight: float, wsd_weight: float) -> Array:
    """M = lambda_FSD G + lambda_WSD I, (n, n): the Hessian of both proximity terms of Q-hat.

    Source: P22 eq. 4.

    Raises:
        ValueError: G is not square or not finite, or a weight is negative.
    """
    G = finite_array("G", G, ("n", "n"))
    fsd_weight = non_negative("fsd_weight", fsd_weight)
    return fsd_weight * G + non_negative("wsd_weight", wsd_weight) * np.eye(len(G))


def approximate_meta_objective(P: Any, gradients: Any, M: Any) -> Any:
    """Q-hat(P) = E[-g^T P g + 1/2 g^T P^T M P g], without the constant E[J_B(theta)].

    With M = lambda_FSD G + lambda_WSD I the second addend is lambda_FSD/2 g^T P^T G P g +
    lambda_WSD/2 g^T P^T P g.

    Args:
        P: (n, n).
        gradients: the mini-batch gradients g that the mean runs over, (m, n).
        M: the `proximity_matrix`, (n, n).

    Source: P22 eq. 43.
    """
    g, M, P = _check_quadratic(gradients, M, P)
    Pg = g @ P.T  # (m, n)
    return np.mean(-np.sum(g * Pg, axis=1) + 0.5 * np.sum(Pg * (Pg @ M), axis=1))


def approximate_meta_gradient(P: Any, gradients: Any, M: Any) -> Array:
    """dQ-hat/dP = (M P - I) E[g g^T], (n, n), for a symmetric M.

    Source: P22 eq. 46, where G is meant by the F of eq. 47.
    """
    g, M, P = _check_quadratic(gradients, M, P)
    return (M @ P - np.eye(len(M))) @ (g.T @ g / len(g))


def _check_quadratic(gradients: Any, M: Any, P: Any) -> tuple[Array, Array, Array]:
    g = finite_array("gradients", gradients, ("m", "n"))
    shape = (g.shape[1], g.shape[1])
    return g, finite_array("M", M, shape), finite_array("P", P, shape)
