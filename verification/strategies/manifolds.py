"""Manifolds of outputs, flat and curved, and losses on them whose constants are known."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from reference.arrays import Array
from reference.manifolds import Affine, Manifold, Parametrized, Sphere
from reference.networks import MLP
from reference.output_space import OutputLoss
from verification.strategies.readable import SEEDS_UP_TO

_seeds = st.integers(0, SEEDS_UP_TO)


def sine_curve(amplitude: float = 0.5) -> Parametrized:
    """{(t, a sin t)}: curvature a |sin t| / (1 + a^2 cos^2 t)^(3/2), at most a."""
    return Parametrized(
        lambda w: np.array([w[0], amplitude * np.sin(w[0])]),
        lambda w: np.array([[1.0], [amplitude * np.cos(w[0])]]),
        np.linspace(-30.0, 30.0, 1201)[:, None],
        amplitude,
    )


def torus(major: float = 2.0, minor: float = 1.0) -> Parametrized:
    """A torus in R^3, of curvature max(1 / r, 1 / (R - r)): around the tube, or the hole."""

    def point(w: Array) -> Array:
        ring = major + minor * np.cos(w[1])
        return np.array([ring * np.cos(w[0]), ring * np.sin(w[0]), minor * np.sin(w[1])])

    def jacobian(w: Array) -> Array:
        ring = major + minor * np.cos(w[1])
        around = np.array([-ring * np.sin(w[0]), ring * np.cos(w[0]), 0.0 * w[0]])
        inward = -minor * np.sin(w[1])
        across = np.array([inward * np.cos(w[0]), inward * np.sin(w[0]), minor * np.cos(w[1])])
        return np.stack([around, across], axis=1)

    angles = np.linspace(-np.pi, np.pi, 32, endpoint=False)
    grid = np.stack(np.meshgrid(angles, angles), axis=-1).reshape(-1, 2)
    return Parametrized(point, jacobian, grid, max(1.0 / minor, 1.0 / (major - minor)))


def network_surface() -> Parametrized:
    """The outputs of w_2 tanh(w_1 x) on three inputs, near w = (1, 1); C as measured there."""
    network = MLP([1, 1, 1], "tanh", bias=False)
    X = np.array([[0.4], [1.0], [1.8]])
    side = np.linspace(0.3, 1.7, 15)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    return Parametrized(
        lambda w: network.outputs(w, X)[:, 0], lambda w: network.jacobian(w, X)[:, 0], grid
    )


# Those on which every projection is the global one and geodesics never end.
COMPLETE: dict[str, Manifold] = {
    "line": Affine([0.5, -1.0], [[1.0], [0.5]]),
    "plane": Affine([0.0, 1.0, 0.5], [[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]),
    "circle": Sphere([0.0, 0.0], 1.5),
    "sphere": Sphere([0.3, -0.2, 0.1], 0.8),
    "sine curve": sine_curve(),
    "torus": torus(),
}


# The ambient dimension of each, and a bound of ||Z|| on it.
DIMENSIONS = {"line": 2, "plane": 3, "circle": 2, "sphere": 3, "sine curve": 2, "torus": 3}
REACH = {"circle": 1.5, "sphere": 0.8 + float(np.linalg.norm([0.3, -0.2, 0.1])), "torus": 3.0}


class Descent(NamedTuple):
    """A manifold, a quadratic or linear loss on it with its constants, and a start."""

    name: str
    manifold: Manifold
    H: Array  # of the loss 1/2 Z^T H Z + b^T Z
    b: Array
    start: Array
    L: float
    G: float  # bounds ||grad L|| on M; 0 where M is flat and no bound is needed

    @property
    def loss(self) -> OutputLoss:
        """1/2 Z^T H Z + b^T Z."""
        return OutputLoss(
            lambda Z: float(0.5 * Z @ self.H @ Z + self.b @ Z),
            lambda Z: self.H @ Z + self.b,
            lambda Z: self.H,
        )

    @property
    def bend(self) -> float:
        """C G."""
        return self.manifold.curvature * self.G

    @property
    def lowest(self) -> float:
        """The least loss on M."""
        return self.loss.value(self.manifold.minimize(self.H, self.b))


@st.composite
def descents(draw: st.DrawFn, names: tuple[str, ...] = tuple(COMPLETE)) -> Descent:
    """A loss of each kind on one of the complete manifolds.

    On flat manifolds the loss is strictly convex, so that it has a minimum; on the sine curve,
    which is unbounded, it is linear, so that its gradient is bounded; elsewhere of any signature.
    """
    name = draw(st.sampled_from(names), label="manifold")
    rng = np.random.default_rng(draw(_seeds, label="seed"))
    d = DIMENSIONS[name]
    flat = COMPLETE[name].curvature == 0.0
    V = np.linalg.qr(rng.standard_normal((d, d)))[0]
    q = rng.uniform(0.1 if flat else -1.0, 1.0, d)
    if name == "sine curve" or not (flat or draw(st.booleans(), label="quadratic")):
        q = np.zeros(d)
    b = 10.0 ** draw(st.integers(-2, 1), label="decade of b") * rng.standard_normal(d)
    H = V @ np.diag(q) @ V.T
    L = float(np.abs(q).max())
    G = 0.0 if flat else float(np.linalg.norm(b) + L * REACH.get(name, 0.0))
    start = COMPLETE[name].project(2.0 * rng.standard_normal(d))
    return Descent(name, COMPLETE[name], H, b, start, L, G)
