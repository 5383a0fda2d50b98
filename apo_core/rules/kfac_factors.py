"""Kronecker factors of one layer's Fisher block: observed in a pass, averaged, diagonalized.

symbol    shape            meaning
V         (out, in)        ∇W as a matrix, with the bias's gradient as its last column
a         (N, T, in)       what the layer reads, with a last 1 where V has the bias's column
Ds        (N, T, out)      derivatives of each example's own loss by the layer's outputs
N, T                       examples, positions (pixels of a convolution, tokens of a sequence)
A         (in, in)         1/N Σ a aᵀ: a sum over positions, a mean over examples
B         (out, out)       1/NT Σ Ds Dsᵀ: a mean over both
α, U_A    (in,) (in, in)   eigenvalues and orthonormal eigenvectors of A, in columns
β, U_B    (out,) (out, out)    the same of B

Source: P22 eq. 56 to 58; convolutions: Grosse and Martens 2016, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apo_core.types import Tensors

MatrixLayer: TypeAlias = nn.Linear | nn.Conv2d


def has_factors(layer: nn.Module) -> bool:
    """Whether `layer` multiplies patches of its input by one matrix, in a pass that hooks see."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1
    # MultiheadAttention reads the weight of this Linear without calling it.
    unseen = nn.modules.linear.NonDynamicallyQuantizableLinear
    return isinstance(layer, nn.Linear) and not isinstance(layer, unseen)


@final
class Factors(nn.Module):
    """F_l ≈ A ⊗ B of one layer, as moving averages, with the eigenbases that a step uses.

    Memory 2 (in² + out²) numbers beside the eigenvalues. All are buffers: `state_dict` has them.

    Args:
        layer: only shapes, device and kind are read.
        bias: whether the bias is a column of the layer's matrix.
        dtype: of the factors and of the step.

    Attributes:
        count: mini-batches averaged, 0-d, on the CPU so that reading it never waits.
    """

    A: Tensor
    B: Tensor
    U_A: Tensor
    U_B: Tensor
    alpha: Tensor
    beta: Tensor
    count: Tensor

    def __init__(self, layer: MatrixLayer, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        weight = layer.weight
        outputs, inputs = weight.shape[0], weight[0].numel() + bias
        for name, eigenvalues, size in (("A", "alpha", inputs), ("B", "beta", outputs)):
            zeros = torch.zeros(size, size, dtype=dtype, device=weight.device)
            self.register_buffer(name, zeros)
            self.register_buffer(f"U_{name}", zeros.clone())
            self.register_buffer(eigenvalues, zeros[0].clone())
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.bias = bias

    @torch.no_grad()
    def average(self, A: Tensor, B: Tensor, smoothing: float, interval: int) -> None:
        """A ← ρA + (1 − ρ)A_batch with ρ = min(1 − 1/k, `smoothing`) at the k-th mini-batch, B too.

        So the first mini-batch replaces the zeros, and no bias is left to correct. Every
        `interval`-th mini-batch, the first included, brings new eigenbases.

        Source: Martens and Grosse 2015, section 5.
        """
        k = int(self.count) + 1
        weight = max(1 / k, 1 - smoothing)
        self.A.lerp_(A, weight)
        self.B.lerp_(B, weight)
        self.count.fill_(k)
        if (k - 1) % interval == 0:
            pairs = ((self.A, self.alpha, self.U_A), (self.B, self.beta, self.U_B))
            for factor, eigenvalues, basis in pairs:
                values, vectors = torch.linalg.eigh(factor)
                eigenvalues.copy_(values.clamp_min(0))  # rounding alone makes one negative
                basis.copy_(vectors)

    def step(self, grads: Tensors, lr: Tensor, damping: Tensor) -> Tensors:
        """−η U_B ((U_Bᵀ V U_A) / (β αᵀ + γ)) U_Aᵀ = −η (A ⊗ B + γI)⁻¹ vec V, for W and b.

        Only the middle factor depends on η and γ, so that a derivative costs two products.

        Args:
            grads: of the weight, and of the bias if it is a column, of the parameters' shapes.
            lr: η, (1,).
            damping: γ > 0, (1,).

        Returns:
            Tensors of the shapes and dtypes of `grads`.
        """
        columns = [g.reshape(len(g), -1).to(self.A.dtype) for g in grads]
        V = torch.cat(columns, 1)  # (out, in)
        rotated = self.U_B.T @ V @ self.U_A
        damped = torch.outer(self.beta, self.alpha) + damping
        product = self.U_B @ (-lr * (rotated / damped)) @ self.U_A.T
        pieces = product.split([c.shape[1] for c in columns], dim=1)
        return [u.reshape(g.shape).to(g.dtype) for u, g in zip(pieces, grads, strict=True)]


@final
@dataclass
class Sums:
    """Σ a aᵀ and Σ Ds Dsᵀ / N² over what one layer saw, and how many examples and positions."""

    aa: Tensor
    gg: Tensor
    examples: int = 0
    positions: int = 0

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, (in, in), and B, (out, out), of the mini-batch.

        The mean loss passes Ds / N backward, also in parts whose gradients add up.
        """
        return self.aa / self.examples, self.gg * (self.examples**2 / self.positions)


@final
class Observation:
    """Hooks that sum each layer's a aᵀ and Ds Dsᵀ until `close`, at the layer's backward pass.

    A forward pass that no backward pass follows leaves no trace. The hooks hold what the layer
    read until then, which its weight's gradient needs anyway.

    Args:
        layers: by name.
        factors: of the same layers, for their dtype, shapes and bias.

    Attributes:
        sums: of each layer that a backward pass reached, by name.
    """

    def __init__(self, layers: Mapping[str, MatrixLayer], factors: Mapping[str, Factors]) -> None:
        self.sums: dict[str, Sums] = {}
        self._factors = factors
        self._open = True
        self._handles = [
            layer.register_forward_hook(self._watch(name), with_kwargs=True)
            for name, layer in layers.items()
        ]

    def close(self) -> None:
        """Take the hooks off; what is backpropagated later through an old graph does not count."""
        self._open = False
        for handle in self._handles:
            handle.remove()

    def _watch(self, name: str) -> Callable[..., None]:
        def watch(
            layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            if output.requires_grad:
                read = (args[0] if args else kwargs["input"]).detach()
                output.register_hook(lambda grad: self._add(name, layer, read, grad.detach()))

        return watch

    @torch.no_grad()
    def _add(self, name: str, layer: nn.Module, read: Tensor, grad: Tensor) -> None:
        if not self._open:
            return  # nobody reads these sums any more
        factors = self._factors[name]
        a, examples = _rows(layer, read.to(factors.A.dtype))
        g = _derivatives(layer, grad.to(factors.B.dtype))
        if factors.bias:
            a = F.pad(a, (0, 1), value=1.0)
        if name not in self.sums:
            self.sums[name] = Sums(torch.zeros_like(factors.A), torch.zeros_like(factors.B))
        sums = self.sums[name]
        sums.aa.addmm_(a.T, a)  # in place, which autocast leaves in the factors' dtype
        sums.gg.addmm_(g.T, g)
        sums.examples += examples
        sums.positions += len(a)


def _rows(layer: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """What the layer's matrix multiplies, (N·T, in), without a 1 for the bias, and N."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1]), len(x) if x.dim() > 1 else 1
    x = x if x.dim() == 4 else x[None]  # (N, channels, height, width)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, _margins(layer), mode)
    patches = F.unfold(padded, layer.kernel_size, layer.dilation, stride=layer.stride)
    return patches.transpose(1, 2).flatten(0, 1), len(x)  # (N·T, channels·kernel)


def _margins(layer: nn.Conv2d) -> list[int]:
    """The padding (left, right, top, bottom), as torch puts it for "same" and "valid" too."""
    margins: list[int] = []
    for axis in (1, 0):
        if isinstance(layer.padding, str):
            span = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            total = span if layer.padding == "same" else 0
            margins += [total // 2, total - total // 2]
        else:
            margins += [layer.padding[axis]] * 2
    return margins


def _derivatives(layer: nn.Module, grad: Tensor) -> Tensor:
    """∂loss/∂outputs, (N·T, out), its rows in the order of `_rows`."""
    if isinstance(layer, nn.Conv2d):
        grad = grad.movedim(-3, -1)  # channels last
    return grad.reshape(-1, grad.shape[-1])
