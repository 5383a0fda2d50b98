"""First-order running error bounds of the oracle's passes, in units of the unit roundoff.

| symbol | meaning |
|---|---|
| e_x | bound on the absolute error of x by rounding, divided by u, elementwise |
| |x| | elementwise modulus |

Every activation has slope at most 1 and curvature at most 1, so an error e_s of a pre-activation
moves a by e_s and the slope by e_s. A sum of k products adds k + 2 roundings of its absolute terms,
and a vectorized function keeps 4 ulp (8 units); a slope is made of two of them.

The norms of these bounds are the `scale` of PROPAGATED: what the errors of all intermediate terms
amount to in the result.
"""

from typing import NamedTuple

import numpy as np

from reference import MLP, FixedHead, Linear, MetaObjective, Network
from reference.arrays import Array
from reference.convolution import ConvNet
from reference.networks import Trace
from reference.problem import Batch
from verification.strategies.outputs import exponentiated


class PassErrors(NamedTuple):
    """Outputs and Jacobian with their error bounds in units of u."""

    z: Array  # (N, C)
    J: Array  # (N, C, n)
    e_z: Array
    e_J: Array


def pass_errors(network: Network, theta: Array, X: Array) -> PassErrors:
    """z and J of a network, with what rounding may do to them."""
    trace = network.trace(theta, X)
    if isinstance(network, ConvNet):
        e_z, e_a, e_D = _convolutional(network, theta, trace)
    elif isinstance(network, FixedHead):
        e_z, e_a, e_D = _fixed_head(network, theta, trace.layer_inputs)
    else:
        assert isinstance(network, MLP | Linear)
        e_z, e_a, e_D = _layered(network, theta, trace.layer_inputs, trace.output_backprop)
    blocks = []
    errors = Trace(e_z, e_a, e_D).positions
    for layer, (a, D), (ea, eD) in zip(network.layers, trace.positions, errors, strict=True):
        T = a.shape[1]
        outer = np.einsum("nti,ncto->ncio", np.abs(a), eD + T * np.abs(D))
        outer += np.einsum("nti,ncto->ncio", ea, np.abs(D))
        blocks.append(outer.reshape(*D.shape[:2], -1))
        if layer.bias is not None:
            blocks.append(np.sum(eD + (T - 1) * np.abs(D), axis=2))
    return PassErrors(
        trace.outputs, network.jacobian(theta, X), e_z, np.concatenate(blocks, axis=2)
    )


def from_here(passes: PassErrors) -> PassErrors:
    """The same passes without errors: where both sides start from these very z and J."""
    return passes._replace(e_z=0.0 * passes.e_z, e_J=0.0 * passes.e_J)


def gradient_error(passes: PassErrors, dz: Array, e_dz: Array) -> float:
    """Norm of the bound for E[J^T dz], in units of u; with `dz` (N, C) and its own bound."""
    terms = np.einsum("nci,nc->i", passes.e_J, np.abs(dz)) + np.einsum(
        "nci,nc->i", np.abs(passes.J), e_dz + (dz.size + 2) * np.abs(dz)
    )
    return float(np.linalg.norm(terms)) / len(dz)


def loss_gradient_error(passes: PassErrors, dz: Array) -> Array:
    """Bound for dL/dz: L has curvature at most 1, z - t or p - e_t is one sum more."""
    return passes.e_z + 8.0 * (1.0 + np.abs(passes.z)) + np.abs(dz)


def loss_value_error(passes: PassErrors, dz: Array, values: Array) -> float:
    """Bound for J_B = E[L]: z known to e_z, L's own terms and functions, and the mean of N."""
    dz, size = np.abs(dz), 1.0 + np.abs(passes.z)
    known = np.sum(dz * (passes.e_z + 2.0 * size + dz), axis=1)
    own = (dz.shape[1] + 16) * (np.abs(values) + np.max(size, axis=1))
    return float(np.mean(known + own + len(dz) * np.abs(values)))


def divergence_value_error(passes: PassErrors, current: PassErrors) -> float:
    """Bound for E[rho]: z and z0 known to e_z, where rho rises by at most its gradient's bound.

    Its own terms are products of two outputs at most, or of an output and a probability.
    """
    N, C = passes.z.shape
    spread = np.max(np.abs(passes.z - current.z), axis=1)
    size = 1.0 + np.linalg.norm(passes.z, axis=1) + np.linalg.norm(current.z, axis=1)
    known = np.max(passes.e_z + current.e_z, axis=1)
    return float(np.mean(spread * (2.0 + 4.0 * spread) * C * known + (C + N + 16) * size**2))


def divergence_gradient_error(passes: PassErrors, current: PassErrors) -> Array:
    """Bound for d rho / dz.

    The curvature of rho is at most 2, or 1 + 2 max|r| for KL(p || p0), where the log ratio r has
    a spread of at most 2 max|z - z0|; its terms are as large as z and z0.
    """
    spread = np.max(np.abs(passes.z - current.z), axis=1, keepdims=True)
    size = np.max(np.abs(passes.z) + np.abs(current.z), axis=1, keepdims=True) + 1.0
    own = np.max(passes.e_z + current.e_z, axis=1, keepdims=True)
    bound = (2.0 + 4.0 * spread) * (own + 16.0 * size)
    return np.broadcast_to(bound, passes.z.shape)


def meta_gradient_error(
    objective: MetaObjective, theta: Array, lookahead: Array, batch: Batch, fsd_inputs: Array
) -> float:
    """Norm of the bound for q = dQ/dtheta' of the exact objective, in units of u."""
    network, loss = objective.problem.network, objective.problem.loss
    on_batch = pass_errors(network, lookahead, batch.inputs)
    dL = loss.gradient(on_batch.z, batch.targets)
    total = gradient_error(on_batch, dL, loss_gradient_error(on_batch, dL))
    here = pass_errors(network, lookahead, fsd_inputs)
    there = pass_errors(network, theta, fsd_inputs)
    drho = objective.discrepancy.gradient(here.z, there.z)
    fsd = gradient_error(here, drho, divergence_gradient_error(here, there))
    d = np.linalg.norm(np.abs(lookahead) + np.abs(theta))
    return float(total + objective.fsd_weight * fsd + 3.0 * objective.wsd_weight * d)


def meta_value_error(
    objective: MetaObjective, theta: Array, lookahead: Array, batch: Batch, fsd_inputs: Array
) -> float:
    """Bound for the addends of the exact objective, in units of u, at theta and at theta'."""
    network, loss = objective.problem.network, objective.problem.loss
    total = 0.0
    for u in (theta, lookahead):
        passes = pass_errors(network, u, batch.inputs)
        dL, values = (f(passes.z, batch.targets) for f in (loss.gradient, loss.value))
        total += loss_value_error(passes, dL, values)
    here = pass_errors(network, lookahead, fsd_inputs)
    there = pass_errors(network, theta, fsd_inputs)
    d = lookahead - theta
    wsd = (len(d) + 4) * float(d @ d)
    fsd = divergence_value_error(here, there)
    return total + objective.fsd_weight * fsd + objective.wsd_weight * wsd


def _fixed_head(
    network: FixedHead, theta: Array, inputs: list[Array]
) -> tuple[Array, list[Array], list[Array]]:
    """Two sums of products one after the other; D = C_l is given, not computed."""
    e_z = np.abs(np.broadcast_to(network.offset, (len(inputs[0]), network.output_size)))
    for layer, a, head in zip(network.layers, inputs, network.heads, strict=True):
        terms = np.abs(a) @ np.abs(layer.weight_matrix(theta)).T @ np.abs(head).T
        e_z = e_z + (sum(layer.shape) + 4) * terms
    e_D = [np.zeros((len(inputs[0]), *head.shape)) for head in network.heads]
    return e_z, [np.zeros_like(a) for a in inputs], e_D


def _layered(
    network: MLP | Linear, theta: Array, inputs: list[Array], backprop: list[Array]
) -> tuple[Array, list[Array], list[Array]]:
    e_a, e_s = [np.zeros_like(inputs[0])], []
    for index, (layer, a) in enumerate(zip(network.layers, inputs, strict=True)):
        W = np.abs(layer.weight_matrix(theta))
        b = 0.0 if layer.bias is None else np.abs(theta[layer.bias])
        e_s.append(e_a[-1] @ W.T + (layer.shape[1] + 2) * (np.abs(a) @ W.T + b))
        if index + 1 < len(inputs):
            e_a.append(e_s[-1] + 8.0 * np.abs(inputs[index + 1]) + 8.0)
    e_D = [np.zeros_like(backprop[-1])]
    for index in range(len(inputs) - 1, 0, -1):
        W = np.abs(network.layers[index].weight_matrix(theta))
        D = np.abs(backprop[index])
        Da = D @ W
        e_Da = e_D[0] @ W + (D.shape[2] + 2) * Da
        e_D.insert(0, e_Da + Da * (e_s[index - 1][:, None, :] + 17.0))
    return e_s[-1], e_a, e_D


def _convolutional(
    network: ConvNet, theta: Array, trace: Trace
) -> tuple[Array, list[Array], list[Array]]:
    """As `_layered`; the selection of patches copies, its transpose adds up to T terms."""
    a_abs = [np.abs(a) for a in trace.layer_inputs]
    W = [np.abs(layer.weight_matrix(theta)) for layer in network.layers]
    b = [0.0 if layer.bias is None else np.abs(theta[layer.bias]) for layer in network.layers]
    e_x, e_a, e_s = np.zeros((len(a_abs[0]), network.input_size)), [], []
    for index, R in enumerate(network.selections):
        e_a.append(np.einsum("tid,nd->nti", R, e_x))
        terms = a_abs[index] @ W[index].T + b[index]
        e_s.append(e_a[-1] @ W[index].T + (W[index].shape[1] + 2) * terms)
        # An activation is at most 1 + |s| and |s| at most its terms.
        e_x = (e_s[-1] + 8.0 * terms + 8.0).swapaxes(1, 2).reshape(len(e_x), -1)
    e_a.append(e_x)
    e_z = e_x @ W[-1].T + (W[-1].shape[1] + 2) * (a_abs[-1] @ W[-1].T + b[-1])
    D = np.abs(trace.output_backprop[-1])
    e_D = [np.zeros_like(D)]
    Dx, e_Dx = D @ W[-1], (D.shape[2] + 2) * (D @ W[-1])
    for index in range(len(network.selections) - 1, -1, -1):
        (T, out), R = e_s[index].shape[1:], network.selections[index]
        Da, e_Da = (v.reshape(*v.shape[:2], out, T).swapaxes(2, 3) for v in (Dx, e_Dx))
        e_D.insert(0, e_Da + Da * (e_s[index][:, None] + 17.0))
        Dx = np.einsum("tid,ncti->ncd", R, Da @ W[index])
        e_Dx = np.einsum("tid,ncti->ncd", R, e_D[0] @ W[index]) + (T + out + 2) * Dx
    return e_z, e_a, e_D


def divergence_size(name: str, z: Array, z0: Array) -> float:
    """What the terms of rho and of its derivatives amount to; by name, as in `ALL_DISCREPANCIES`.

    They are products of two outputs, or exponentials, whose rounding is that of the exponent.
    """
    size = 1.0 + float(np.linalg.norm(z) + np.linalg.norm(z0))
    if not exponentiated(name):
        return size**2
    if name == "bregman-poisson":
        return size * float(np.linalg.norm(np.exp(z)) + np.linalg.norm(np.exp(z0)))
    (mu, s), (mu0, s0) = np.split(z, 2, axis=1), np.split(z0, 2, axis=1)
    steepest = np.exp(-np.minimum(s, s0))
    e = np.abs(mu - mu0) * steepest
    return size * float(np.linalg.norm(1.0 + np.exp(2.0 * np.abs(s - s0)) + (e + steepest) ** 2))
