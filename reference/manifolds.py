"""Manifolds M of network outputs, on which the idealized APO of P18 section 3 moves.

| symbol | meaning | shape |
|---|---|---|
| Z | the outputs on all training examples, one vector | (d,) |
| M | what the network can output (P18 eq. 12) | subset of R^d |
| T_Z M | tangent space, spanned by orthonormal columns | (d, m) |
| C | bound on ||v''|| over the unit-speed geodesics v of M | >= 0 |
| w | parameters of a point, Z = f(w) | (m,) |
| J | df/dw | (d, m) |
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import numpy as np
from scipy.integrate import solve_ivp
from scipy.optimize import brentq

from reference.arrays import Array, finite_array, non_negative
from reference.problem import COMPLEX_STEP, complex_step_jacobian, symmetric_part
from reference.proximal_point import polish

# How many basins of the grid are searched for the global minimum over a parametrized manifold.
BASINS = 4


class OutputSet(ABC):
    """A closed set of outputs, smooth or not, over which quadratics can be minimized."""

    @abstractmethod
    def minimize(self, Q: Array, b: Array) -> Array:
        """arg min over M of 1/2 Z^T Q Z + b^T Z, the global one, (d,), for a symmetric Q."""

    def project(self, Y: Array) -> Array:
        """The point of M nearest to Y, (d,)."""
        return self.minimize(np.eye(len(Y)), -Y)


class Manifold(OutputSet):
    """A set M of outputs that is smooth and has no boundary.

    Attributes:
        curvature: C, an upper bound on the curvature of its geodesics.
    """

    curvature: float

    @abstractmethod
    def tangent(self, Z: Array) -> Array:
        """An orthonormal basis of T_Z M in columns, (d, m)."""

    @abstractmethod
    def geodesic(self, Z: Array, direction: Array, length: float) -> Array:
        """v(length) of the unit-speed geodesic with v(0) = Z and v'(0) = direction, (d,)."""


@final
class Polyline(OutputSet):
    """The segments between neighbouring `vertices`, (k, d): kinks and ends as ReLU networks have.

    Source: P18 theorem 2, footnote 2.
    """

    def __init__(self, vertices: Any) -> None:
        self.vertices = finite_array("vertices", vertices, ("k", "d"))
        if len(self.vertices) < 2:
            raise ValueError("`vertices` must be two or more points, got 1; add the segment's end.")

    def minimize(self, Q: Array, b: Array) -> Array:
        """The best of each segment's minimum: the parabola's vertex if inside, else an end."""
        a, side = self.vertices[:-1], np.diff(self.vertices, axis=0)
        slope = np.sum(side * (a @ Q + b), axis=1)
        bend = np.sum(side @ Q * side, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside = np.where(bend > 0.0, np.clip(-slope / bend, 0.0, 1.0), 0.0)
        points = np.concatenate([a + inside[:, None] * side, self.vertices])
        values = 0.5 * np.sum(points @ Q * points, axis=1) + points @ b
        return points[np.argmin(values)]


@final
class Affine(Manifold):
    """{offset + basis w}: flat, C = 0.

    Args:
        offset: (d,).
        basis: linearly independent columns, (d, m); orthonormalized.
    """

    def __init__(self, offset: Any, basis: Any) -> None:
        self.offset = finite_array("offset", offset, ("d",))
        basis = finite_array("basis", basis, (len(self.offset), "m"))
        self.basis, triangle = np.linalg.qr(basis)
        diagonal = np.abs(np.diag(triangle))
        if basis.shape[1] > len(basis) or diagonal.min() <= 1e-12 * diagonal.max():
            raise ValueError(
                f"`basis` must have linearly independent columns, got {basis.shape[1]} of which "
                "some depend on the others; drop them."
            )
        self.curvature = 0.0

    def tangent(self, Z: Array) -> Array:
        """The basis itself."""
        return self.basis

    def geodesic(self, Z: Array, direction: Array, length: float) -> Array:
        """Z + length * direction."""
        return Z + length * direction

    def minimize(self, Q: Array, b: Array) -> Array:
        """offset + U w with U^T Q U w = -U^T (b + Q offset); Q must curve upwards along M."""
        U = self.basis
        return self.offset - U @ np.linalg.solve(U.T @ Q @ U, U.T @ (b + Q @ self.offset))


@final
class Sphere(Manifold):
    """{Z : ||Z - center|| = radius} in R^d, d >= 2; a circle for d = 2; C = 1 / radius."""

    def __init__(self, center: Any, radius: float) -> None:
        self.center = finite_array("center", center, ("d",))
        if len(self.center) < 2 or not non_negative("radius", radius) > 0.0:
            raise ValueError(
                "`radius` must be positive and `center` have two or more coordinates, got radius "
                f"{radius} and {len(self.center)} coordinates; a sphere in R^1 is two points."
            )
        self.radius = float(radius)
        self.curvature = 1.0 / self.radius

    def tangent(self, Z: Array) -> Array:
        """The orthogonal complement of Z - center."""
        return np.linalg.svd((Z - self.center)[None])[2][1:].T

    def geodesic(self, Z: Array, direction: Array, length: float) -> Array:
        """A great circle."""
        angle = length / self.radius
        outward = Z - self.center
        return self.center + np.cos(angle) * outward + self.radius * np.sin(angle) * direction

    def minimize(self, Q: Array, b: Array) -> Array:
        """(Q + mu I) y = -beta with ||y|| = 1, mu >= -min eigenvalue of Q, Z = center + radius y.

        The norm of y(mu) falls from infinity, so that the root is unique and the point global.
        """
        q, V = np.linalg.eigh(Q)
        beta = V.T @ (b + Q @ self.center) / self.radius
        lowest = q <= q[0] + 1e-12 * np.abs(q).max()
        low, high = float(np.linalg.norm(beta[lowest])), float(np.linalg.norm(beta))
        if low == 0.0:
            raise ValueError(
                "`b` must not be orthogonal to the eigenvectors of `Q`'s smallest eigenvalue, got "
                "a minimum that is not unique; move the point a little."
            )
        gap = q - q[0]

        def excess(mu: float) -> float:
            return float(np.linalg.norm(beta / (gap + mu)) - 1.0)

        # At mu = low the lowest coordinates alone have norm 1; at mu = high all have at most 1.
        mu: Any = high
        if excess(low) > 0.0 > excess(high):
            mu = brentq(excess, low, high, xtol=1e-300)
        y = -beta / (gap + mu)
        return self.center + self.radius * V @ (y / np.linalg.norm(y))


@final
class Parametrized(Manifold):
    """{f(w)}: a curve, a surface, or the outputs of a network by its parameters.

    A point Z is found again by its nearest f(w); the search over M starts at the best points of a
    grid, so the grid must be fine enough to have a point in the basin of the minimum.

    Args:
        point: f, (m,) -> (d,), analytic.
        jacobian: J, (m,) -> (d, m), analytic: its complex step is the second derivative.
        grid: parameters where searches start, (K, m).
        curvature: C; the largest one measured on the grid if None.
    """

    def __init__(
        self,
        point: Callable[[Array], Array],
        jacobian: Callable[[Array], Array],
        grid: Any,
        curvature: float | None = None,
    ) -> None:
        self.point, self.jacobian = point, jacobian
        self.grid = finite_array("grid", grid, ("K", "m"))
        self._points = np.array([point(w) for w in self.grid])
        if curvature is None:
            curvature = max(self.normal_curvature(w) for w in self.grid)
        self.curvature = non_negative("curvature", curvature)

    def acceleration(self, w: Array, v: Array) -> Array:
        """f''(w)[v, v], (d,)."""
        return np.imag(self.jacobian(w + 1j * COMPLEX_STEP * v)) @ v / COMPLEX_STEP

    def normal_curvature(self, w: Array, directions: int = 720) -> float:
        """max over v of ||P_N f''[v, v]|| / ||J v||^2 at w: a geodesic's v'' is normal to M.

        Exact for curves; for surfaces over `directions` angles of v.
        """
        J = self.jacobian(w)
        if J.shape[1] > 2:
            raise ValueError(
                f"`jacobian` must have one or two columns, got {J.shape[1]}; give `curvature`."
            )
        U = np.linalg.qr(J)[0]
        if J.shape[1] == 1:
            v = np.ones((1, 1))
            bends = self.acceleration(w, v[0])[None]
        else:
            angles = np.linspace(0.0, np.pi, directions, endpoint=False)
            v = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # (directions, 2)
            first, second = self.acceleration(w, np.eye(2)[0]), self.acceleration(w, np.eye(2)[1])
            mixed = self.acceleration(w, np.ones(2)) - first - second  # 2 f''[e_1, e_2]
            bends = v[:, :1] ** 2 * first + v[:, 1:] ** 2 * second + v[:, :1] * v[:, 1:] * mixed
        normal = bends - bends @ U @ U.T
        return float(np.max(np.linalg.norm(normal, axis=1) / np.sum((v @ J.T) ** 2, axis=1)))

    def locate(self, Z: Array) -> Array:
        """w with f(w) nearest to Z, (m,)."""
        return self._search(np.eye(len(Z)), -Z)

    def tangent(self, Z: Array) -> Array:
        """The orthonormalized columns of J."""
        return np.linalg.qr(self.jacobian(self.locate(Z)))[0]

    def geodesic(self, Z: Array, direction: Array, length: float) -> Array:
        """w'' = -J^+ f''[w', w'] from J w' = direction: what keeps v'' normal to M."""
        start = self.locate(Z)
        m = len(start)

        def field(_: float, state: Array) -> Array:
            w, v = state[:m], state[m:]
            turn = np.linalg.lstsq(self.jacobian(w), self.acceleration(w, v), rcond=None)[0]
            return np.concatenate([v, -turn])

        velocity = np.linalg.lstsq(self.jacobian(start), direction, rcond=None)[0]
        path = solve_ivp(
            field,
            (0.0, length),
            np.concatenate([start, velocity]),
            method="DOP853",
            rtol=1e-12,
            atol=1e-14,
        )
        return self.point(path.y[:m, -1])

    def minimize(self, Q: Array, b: Array) -> Array:
        """The lowest of the minima that Newton's method finds from the best basins of the grid."""
        return self.point(self._search(Q, b))

    def _search(self, Q: Array, b: Array) -> Array:
        values = 0.5 * np.sum(self._points @ Q * self._points, axis=1) + self._points @ b
        spread = np.linalg.norm(np.ptp(self.grid, axis=0))
        near = 4.0 * spread / len(self.grid) ** (1.0 / self.grid.shape[1])
        ends = []
        for _ in range(BASINS):
            best = int(np.argmin(values))
            if not np.isfinite(values[best]):
                break
            ends.append(self._newton(Q, b, self.grid[best], near))
            values[np.linalg.norm(self.grid - self.grid[best], axis=1) <= near] = np.inf
        return min(ends, key=lambda w: _quadratic(Q, b, self.point(w)))

    def _newton(self, Q: Array, b: Array, w: Array, near: float) -> Array:
        """A minimum of the quadratic along M near w: Newton steps, halved until they help.

        None is longer than `near`: where the curvature is 0 a step would leave the grid by far, and
        f(w) of a large angle w is that of a rounded one.
        """

        def gradient(w: Array) -> Array:
            return self.jacobian(w).T @ (Q @ self.point(w) + b)

        def curvature(w: Array) -> Array:
            return symmetric_part(complex_step_jacobian(gradient, w))

        for _ in range(100):
            g = gradient(w)
            eigenvalues, vectors = np.linalg.eigh(curvature(w))
            floor = 1e-12 * np.abs(eigenvalues).max()
            step = vectors @ ((vectors.T @ g) / np.maximum(np.abs(eigenvalues), floor))
            step *= near / max(near, float(np.linalg.norm(step)))
            value, share = _quadratic(Q, b, self.point(w)), 1.0
            while share > 1e-8 and not _quadratic(Q, b, self.point(w - share * step)) < value:
                share *= 0.5
            if share <= 1e-8:
                break
            w = w - share * step
        # Where the value is flat to rounding, whole steps go on as long as they shrink the slope.
        return polish(gradient, curvature, w)


def _quadratic(Q: Array, b: Array, Z: Array) -> float:
    return float(0.5 * Z @ Q @ Z + b @ Z)
