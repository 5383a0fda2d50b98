"""KFAC and Shampoo are what they are called: their steps against dense NumPy."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments import baselines
from experiments.models import mlp
from experiments.problems import LossName, mean_loss
from experiments.seeds import generator
from verification.tolerances import FUNCTION, SOLVE, assert_close

EXAMPLES = 40
WIDTHS = (4, 5, 3)
DAMPING = 0.01


def _batch(loss_name: LossName, seed: int) -> tuple[Tensor, Tensor]:
    source = generator(seed, "task")
    inputs = torch.randn(EXAMPLES, WIDTHS[0], generator=source, dtype=torch.float64)
    if loss_name == "cross_entropy":
        return inputs, torch.randint(0, WIDTHS[-1], (EXAMPLES,), generator=source)
    return inputs, torch.randn(EXAMPLES, WIDTHS[-1], generator=source, dtype=torch.float64)


def _gradients(model: torch.nn.Module, loss_name: LossName, batch: tuple[Tensor, Tensor]):
    model.zero_grad()
    mean_loss(loss_name, model(batch[0]), batch[1]).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _dense_factors(model, loss_name: LossName, inputs: Tensor):
    """(A, B) of both layers: E[ā āᵀ] with ā = (a, 1), and E[Ds H Dsᵀ], in NumPy."""
    W1, b1, W2, b2 = (p.detach().numpy() for p in model.parameters())
    x, one = inputs.numpy(), np.ones((EXAMPLES, 1))
    s = x @ W1.T + b1
    hidden = np.maximum(s, 0.0)
    z = hidden @ W2.T + b2  # (N, C)
    if loss_name == "cross_entropy":
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        H = np.einsum("nc,cd->ncd", p, np.eye(WIDTHS[-1])) - np.einsum("nc,nd->ncd", p, p)
    else:
        H = np.broadcast_to(np.eye(WIDTHS[-1]), (EXAMPLES, WIDTHS[-1], WIDTHS[-1]))
    J = np.einsum("co,no->nco", W2, (s > 0).astype(float))  # dz/ds of the first layer
    inner = np.einsum("nco,ncd,ndp->op", J, H, J) / EXAMPLES
    a1, a2 = np.hstack([x, one]), np.hstack([hidden, one])
    return [(a1.T @ a1 / EXAMPLES, inner), (a2.T @ a2 / EXAMPLES, H.mean(axis=0))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss_name", ["squared_error", "cross_entropy"])
def test_kfac_preconditions_with_the_dense_damped_inverse(loss_name: LossName, seed: int) -> None:
    model, batch = mlp(WIDTHS, seed=seed, dtype=torch.float64), _batch(loss_name, seed)
    kfac = baselines.KFAC(model, lambda: batch, loss_name, lr=1.0, damping=DAMPING)
    grads = _gradients(model, loss_name, batch)
    steps = kfac.precondition(grads)
    for layer, (A, B) in enumerate(_dense_factors(model, loss_name, batch[0])):
        weight, bias = (g.numpy() for g in grads[2 * layer : 2 * layer + 2])
        V = np.hstack([weight, bias[:, None]])  # (out, in + 1)
        damped = np.kron(B, A) + DAMPING * np.eye(V.size)  # on the row-major vec
        expected = np.linalg.solve(damped, V.reshape(-1)).reshape(V.shape)
        actual = np.hstack([steps[2 * layer].numpy(), steps[2 * layer + 1].numpy()[:, None]])
        assert_close(
            actual,
            expected,
            SOLVE,
            condition=float(np.linalg.cond(damped)),
            size=V.size + EXAMPLES,  # the solve, and the sums over examples behind the factors
            what=f"layer {layer}",
        )


def _kfac(model: torch.nn.Module, batch: tuple[Tensor, Tensor], **options) -> baselines.KFAC:
    defaults: dict = {"lr": 0.5, "damping": DAMPING, "momentum": 0.0, "norm_constraint": math.inf}
    return baselines.KFAC(model, lambda: batch, "squared_error", **(defaults | options))


def test_kfac_steps_along_the_preconditioned_gradient() -> None:
    model, batch = mlp(WIDTHS, seed=0, dtype=torch.float64), _batch("squared_error", 0)
    before = [p.detach().clone() for p in model.parameters()]
    directions = _kfac(model, batch).precondition(_gradients(model, "squared_error", batch))
    _kfac(model, batch).step()
    for p, old, direction in zip(model.parameters(), before, directions, strict=True):
        assert torch.equal(p, old - 0.5 * direction)


def test_kfac_momentum_accumulates_directions() -> None:
    model, batch = mlp(WIDTHS, seed=0, dtype=torch.float64), _batch("squared_error", 0)
    kfac = _kfac(model, batch, momentum=0.9, interval=100)
    grads = _gradients(model, "squared_error", batch)
    kfac.step()
    before = [p.detach().clone() for p in model.parameters()]
    kfac.step()  # the same .grad again, the same factors: v = 0.9 d + d
    directions = kfac.precondition(grads)
    for p, old, d in zip(model.parameters(), before, directions, strict=True):
        assert_close(
            (p - old).detach().numpy(),
            (-0.5 * 1.9 * d).numpy(),
            FUNCTION,
            condition=1.0 + (old.abs().max() / d.abs().max()).item(),  # a difference of parameters
        )


def test_kfac_norm_constraint_bounds_the_step() -> None:
    model, batch = mlp(WIDTHS, seed=0, dtype=torch.float64), _batch("squared_error", 0)
    kappa, lr = 1e-4, 0.5
    grads = _gradients(model, "squared_error", batch)
    before = [p.detach().clone() for p in model.parameters()]
    _kfac(model, batch, norm_constraint=kappa).step()
    moved = [(old - p).detach() for p, old in zip(model.parameters(), before, strict=True)]
    with torch.no_grad():
        for p, old in zip(model.parameters(), before, strict=True):
            p.copy_(old)
    d = _kfac(model, batch).precondition(grads)
    # ην = √(κ / dᵀg), so that Δᵀg = ην dᵀg = √(κ dᵀg)
    along = sum((m * g).sum().item() for m, g in zip(moved, grads, strict=True))
    full = sum((v * g).sum().item() for v, g in zip(d, grads, strict=True))
    assert lr**2 * full > kappa, "the constraint must bind for this test to see it"
    size = sum(g.numel() for g in grads)
    scale = max(p.abs().max().item() for p in before) / max(m.abs().max().item() for m in moved)
    assert_close(along**2, kappa * full, FUNCTION, size=size, condition=1.0 + scale)


def test_kfac_rebuilds_its_factors_at_the_interval() -> None:
    model, batch = mlp(WIDTHS, seed=0, dtype=torch.float64), _batch("squared_error", 0)
    draws = []
    kfac = baselines.KFAC(
        model,
        lambda: draws.append(1) or batch,
        "squared_error",
        lr=1e-3,
        damping=DAMPING,
        interval=3,
    )
    for _ in range(7):
        _gradients(model, "squared_error", batch)
        kfac.step()
    assert len(draws) == 3


def test_kfac_resumes_from_its_state() -> None:
    model, batch = mlp(WIDTHS, seed=0, dtype=torch.float64), _batch("squared_error", 0)
    kfac = _kfac(model, batch, momentum=0.9, interval=1)
    _gradients(model, "squared_error", batch)
    kfac.step()
    twin = copy.deepcopy(model)
    resumed = _kfac(twin, batch, momentum=0.9, interval=1, lr=0.25)
    # as torch.optim does, loading shares the tensors of the state that is given
    resumed.load_state_dict(copy.deepcopy(kfac.state_dict()))
    for network, optimizer in ((model, kfac), (twin, resumed)):
        _gradients(network, "squared_error", batch)
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize(("lr", "damping"), [(0.0, 0.1), (-1.0, 0.1), (0.1, 0.0)])
def test_kfac_refuses_a_rate_or_damping_that_is_not_positive(lr: float, damping: float) -> None:
    model, batch = mlp(WIDTHS, seed=0), _batch("squared_error", 0)
    with pytest.raises(ValueError, match=r"`lr` and `damping` must be positive"):
        baselines.KFAC(model, lambda: batch, "squared_error", lr=lr, damping=damping)


def _inverse_root(matrix: np.ndarray, power: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors * values**-power @ vectors.T


def test_shampoo_is_algorithm_1_and_not_sgd() -> None:
    lr, epsilon = 0.1, 1e-4
    model, batch = mlp(WIDTHS, seed=0, dtype=torch.float64), _batch("cross_entropy", 0)
    optimizer = baselines.shampoo(model, lr=lr)
    expected = [p.detach().numpy().copy() for p in model.parameters()]
    factors = [[epsilon * np.eye(size) for size in p.shape] for p in expected]
    for _ in range(3):
        grads = [g.numpy() for g in _gradients(model, "cross_entropy", batch)]
        for p, g, sides in zip(expected, grads, factors, strict=True):
            plain = p - lr * g
            if g.ndim == 1:
                sides[0] += np.outer(g, g)
                p -= lr * _inverse_root(sides[0], 1 / 2) @ g
            else:
                sides[0] += g @ g.T
                sides[1] += g.T @ g
                p -= lr * _inverse_root(sides[0], 1 / 4) @ g @ _inverse_root(sides[1], 1 / 4)
            # SGD would be at `plain`: far from here, by more than half of its own step
            assert np.linalg.norm(p - plain) > 0.5 * lr * np.linalg.norm(g)
        optimizer.step()
        condition = max(float(np.linalg.cond(side)) for sides in factors for side in sides)
        for actual, p in zip(model.parameters(), expected, strict=True):
            assert_close(
                actual.detach().numpy(),
                p,
                SOLVE,
                condition=condition,
                size=sum(WIDTHS),
                iterations=3,
            )


def test_shampoo_stays_until_its_first_root() -> None:
    model, batch = mlp(WIDTHS, seed=0), _batch("cross_entropy", 0)
    batch = (batch[0].float(), batch[1])
    optimizer = baselines.shampoo(model, lr=0.1, interval=2)
    start = [p.detach().clone() for p in model.parameters()]
    moved = []
    for _ in range(2):
        _gradients(model, "cross_entropy", batch)
        optimizer.step()
        moved.append(not all(map(torch.equal, model.parameters(), start)))
    assert moved == [False, True]
