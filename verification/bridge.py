"""The only conversion between the oracle's NumPy and the engine's torch.

| quantity   | oracle                               | engine                             |
|------------|--------------------------------------|------------------------------------|
| θ, g, q, Δ | (n,): vec(W_l) by columns, then b_l  | a list of tensors; flat: row-major |
| P, G       | (n, n) on that vector                | (n, n) on the row-major vector     |
| A, B, S    | as in eq. 9 with vec by columns      | the same matrices                  |

float64 on both sides, and no arithmetic: a conversion moves numbers and never changes one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import apo_core as apo
from reference.arrays import Array
from reference.discrepancies import (
    BernoulliKL,
    Bregman,
    CategoricalKL,
    Discrepancy,
    GaussianKL,
    SquaredEuclidean,
)
from reference.losses import Loss, SquaredError
from reference.networks import MLP, FixedHead, Linear, Network
from reference.problem import Batch, Problem
from reference.update_rules import EKFACBlocks


def tensor(array: Array) -> Tensor:
    """A tensor of its own with the values of `array`: float64, or int64 for labels."""
    return torch.from_numpy(np.array(array))


def array(value: Tensor) -> Array:
    """The values of a tensor, detached, as an array of its own."""
    return value.detach().numpy().copy()


def row_major(network: Network) -> Array:
    """The index vector i with engine_vector = oracle_vector[i], (n,)."""
    pieces = []
    for layer in network.layers:
        pieces.append(layer.weight_matrix(np.arange(network.size)).reshape(-1))
        if layer.bias is not None:
            pieces.append(np.arange(layer.bias.start, layer.bias.stop))
    return np.concatenate(pieces)


def to_tensors(vector: Array, network: Network) -> list[Tensor]:
    """The oracle's (n,) as one tensor for each parameter of the twin."""
    tensors = []
    for layer in network.layers:
        tensors.append(tensor(np.ascontiguousarray(layer.weight_matrix(vector))))
        if layer.bias is not None:
            tensors.append(tensor(vector[layer.bias]))
    return tensors


def to_vector(tensors: Sequence[Tensor], network: Network) -> Array:
    """One tensor for each parameter of the twin as the oracle's (n,)."""
    flat = np.concatenate([array(t).reshape(-1) for t in tensors])
    vector = np.empty_like(flat)
    vector[row_major(network)] = flat
    return vector


def to_engine_matrix(matrix: Array, network: Network) -> Tensor:
    """The oracle's (n, n) on the engine's row-major vector."""
    index = row_major(network)
    return tensor(matrix[np.ix_(index, index)])


def to_oracle_matrix(matrix: Tensor, network: Network) -> Array:
    """The engine's (n, n) on the oracle's vector."""
    index = row_major(network)
    result = np.empty_like(array(matrix))
    result[np.ix_(index, index)] = array(matrix)
    return result


@final
class FixedHeadModule(nn.Module):
    """The twin of `FixedHead`: z = sum_l C_l W_l x_l + offset; heads and offset are buffers."""

    heads: Tensor
    offset: Tensor

    def __init__(self, network: FixedHead) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(in_, out, bias=False, dtype=torch.float64)
            for out, in_ in (layer.shape for layer in network.layers)
        )
        self.input_sizes = list(network.input_sizes)
        self.out_sizes = [layer.shape[0] for layer in network.layers]
        self.register_buffer("heads", tensor(np.concatenate(network.heads, axis=1)))  # (C, sum out)
        self.register_buffer("offset", tensor(network.offset))

    def forward(self, x: Tensor) -> Tensor:
        """z, (N, C), of x, (N, d)."""
        slices = x.split(self.input_sizes, dim=1)
        hidden = [layer(part) for layer, part in zip(self.layers, slices, strict=True)]
        return torch.cat(hidden, dim=1) @ self.heads.T + self.offset


def _activation(name: str) -> nn.Module:
    activations: dict[str, Callable[[], nn.Module]] = {
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
        "relu": nn.ReLU,
        # torch's softplus is the identity above its threshold; its default, 20, costs 2e-9.
        "softplus": lambda: nn.Softplus(threshold=700.0),
    }
    return activations[name]()


def twin(network: Network, theta: Array) -> nn.Module:
    """A float64 module with the oracle network's function, at θ.

    Raises:
        TypeError: a kind of network that has no twin.
    """
    if isinstance(network, FixedHead):
        module: nn.Module = FixedHeadModule(network)
    elif isinstance(network, MLP | Linear):
        activation = network.activation if isinstance(network, MLP) else "tanh"
        parts: list[nn.Module] = []
        for layer in network.layers:
            out, in_ = layer.shape
            parts += [
                nn.Linear(in_, out, layer.bias is not None, dtype=torch.float64),
                _activation(activation),
            ]
        module = nn.Sequential(*parts[:-1])
    else:
        raise TypeError(f"`network` must be MLP, Linear or FixedHead, got {network!r}.")
    load(module, theta, network)
    return module


def load(module: nn.Module, theta: Array, network: Network) -> None:
    """Set the twin's parameters to θ."""
    with torch.no_grad():
        for p, value in zip(module.parameters(), to_tensors(theta, network), strict=True):
            p.copy_(value)


def parameters_of(module: nn.Module, network: Network) -> Array:
    """θ of the twin, (n,)."""
    return to_vector(list(module.parameters()), network)


def gradients_of(module: nn.Module, network: Network) -> Array:
    """`.grad` of the twin's parameters, (n,).

    Raises:
        ValueError: a parameter has no gradient.
    """
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    if len(grads) != len(list(module.parameters())):
        raise ValueError("every parameter must have a gradient, got one without; call backward().")
    return to_vector(grads, network)


def set_gradients(module: nn.Module, g: Array, network: Network) -> None:
    """Set `.grad` of the twin's parameters to the oracle's g, (n,)."""
    for p, value in zip(module.parameters(), to_tensors(g, network), strict=True):
        p.grad = value


def loss_of(loss: Loss, z: Tensor, targets: Tensor) -> Tensor:
    """The mean of the oracle's loss over a batch: ½‖z − t‖² or −log softmax(z)[t]."""
    if isinstance(loss, SquaredError):
        return 0.5 * (z - targets).square().sum(1).mean()
    return F.cross_entropy(z, targets)


def loss_closure(problem: Problem, module: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    """What `meta_step` takes as `loss`: J_B at the module's present parameters."""
    x, t = tensor(batch.inputs), tensor(np.asarray(batch.targets))
    return lambda: loss_of(problem.loss, module(x), t)


def outputs_closure(module: nn.Module, inputs: Array) -> Callable[[], Tensor]:
    """What `meta_step` takes as `outputs`: the outputs on B' at the module's present parameters."""
    x = tensor(inputs)
    return lambda: module(x)


def discrepancy(rho: Discrepancy) -> apo.Discrepancy:
    """The engine's discrepancy of the same name.

    Raises:
        TypeError: the engine has none.
    """
    if isinstance(rho, SquaredEuclidean):
        return apo.SquaredEuclidean(half=rho.half)
    for oracle, engine in (
        (CategoricalKL, apo.CategoricalKL),
        (BernoulliKL, apo.BernoulliKL),
        (GaussianKL, apo.GaussianKL),
    ):
        if isinstance(rho, oracle):
            current_first = rho.order == "current_lookahead"
            return engine("current_lookahead" if current_first else "lookahead_current")
    for potential in ("squared_error", "cross_entropy", "binary_cross_entropy", "poisson"):
        if isinstance(rho, Bregman) and rho.potential == potential:
            return apo.Bregman(potential)
    raise TypeError(f"`rho` must have a twin in apo_core, got {type(rho).__name__}.")


def preconditioners_of(rule: apo.rules.Preconditioned) -> list[apo.Preconditioner]:
    """The rule's preconditioners, in the order of the model's parameters."""
    return [P for P in rule.preconditioners if isinstance(P, apo.Preconditioner)]


def set_ekfac(
    rule: apo.rules.Preconditioned,
    blocks: Sequence[EKFACBlocks],
    bias_scales: Sequence[Array | None],
) -> None:
    """Set A, B, S of every weight, and s of every bias (None where a layer has none)."""
    factors = iter(preconditioners_of(rule))
    with torch.no_grad():
        for block, scales in zip(blocks, bias_scales, strict=True):
            weight = next(factors)
            assert isinstance(weight, apo.EKFAC)
            for parameter, value in zip((weight.A, weight.B, weight.S), block, strict=True):
                parameter.copy_(tensor(value))
            if scales is not None:
                bias = next(factors)
                assert isinstance(bias, apo.Diagonal)
                bias.S.copy_(tensor(scales))


def set_diagonal(rule: apo.rules.Preconditioned, s: Array, network: Network) -> None:
    """Set s of `Diagonal` preconditioners, P = diag(s²), from the oracle's (n,)."""
    with torch.no_grad():
        for P, value in zip(preconditioners_of(rule), to_tensors(s, network), strict=True):
            assert isinstance(P, apo.Diagonal)
            P.S.copy_(value)


def set_dense(rule: apo.rules.Preconditioned, matrix: Array, network: Network) -> None:
    """Set P of the `Dense` preconditioner from the oracle's (n, n)."""
    (P,) = preconditioners_of(rule)
    assert isinstance(P, apo.Dense)
    with torch.no_grad():
        P.P.copy_(to_engine_matrix(matrix, network))


def phi_gradient(parameter: Tensor) -> Array:
    """dQ/dφ of one of φ's parameters, in its own shape.

    Raises:
        ValueError: it has no gradient.
    """
    if parameter.grad is None:
        raise ValueError("`parameter` must have a gradient, got None; call meta_backward() first.")
    return array(parameter.grad)
