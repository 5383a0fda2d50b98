"""LeNet, images, and the losses of the experiments: against NumPy, loops and counts by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from experiments import problems
from experiments.baselines import NORM_CONSTRAINT
from experiments.data import Split
from experiments.data.dataset import first
from experiments.images import Augmented, cropped_and_flipped, standardized_images
from experiments.models import lenet, mlp
from experiments.problems import LossName, Regularized, Supervised, mean_loss
from experiments.sampled_kfac import SampledKFAC
from experiments.seeds import generator
from verification.tolerances import BITWISE, FUNCTION, ROUNDING, SOLVE, assert_close

EXAMPLES = 40


def _numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed, "task"), dtype=torch.float64)


@pytest.mark.parametrize(
    ("channels", "classes", "batch_norm", "parameters"),
    [
        # (25c + 1)·6 + (25·6 + 1)·16 + 401·120 + 121·84 + 85·classes, and 2·(6 + 16) of the norms
        (3, 10, False, 456 + 2_416 + 48_120 + 10_164 + 850),
        (1, 10, False, 156 + 2_416 + 48_120 + 10_164 + 850),
        (3, 100, True, 456 + 2_416 + 48_120 + 10_164 + 8_500 + 44),
    ],
)
def test_lenet_has_its_layers(
    channels: int, classes: int, batch_norm: bool, parameters: int
) -> None:
    model = lenet(seed=0, channels=channels, classes=classes, batch_norm=batch_norm)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.zeros(2, channels, 32, 32)).shape == (2, classes)


def test_lenet_is_the_function_written_out() -> None:
    model, x = lenet(seed=1), _numbers(0, 2, 3, 32, 32).float()
    W1, b1, W2, b2, W3, b3, W4, b4, W5, b5 = model.parameters()
    h = F.max_pool2d(F.conv2d(x, W1, b1).relu(), 2)
    h = F.max_pool2d(F.conv2d(h, W2, b2).relu(), 2).reshape(2, 400)
    expected = ((h @ W3.T + b3).relu() @ W4.T + b4).relu() @ W5.T + b5
    assert_close(
        model(x).detach().numpy(),
        expected.detach().numpy(),
        ROUNDING.at(np.float32),
        size=400,
        iterations=5,
    )


def test_lenet_is_drawn_from_its_seed_within_its_bounds() -> None:
    torch.manual_seed(0)
    one, twin, other = lenet(seed=5), lenet(seed=5), lenet(seed=6)
    assert all(map(torch.equal, one.parameters(), twin.parameters()))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert not torch.equal(p, q)
    for layer in one:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            # of 150 weights and more, some lie in the outer tenth but for a chance of 0.9^150
            assert 0.9 * bound < layer.weight.abs().max() <= bound
            assert layer.bias is not None
            assert layer.bias.abs().max() <= bound


def test_drawing_lenet_leaves_the_global_random_state() -> None:
    before = torch.random.get_rng_state()
    lenet(seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_bernoulli_loss_is_the_binary_cross_entropy_summed_over_pixels() -> None:
    z, t = _numbers(0, 7, 5), _numbers(1, 7, 5).sigmoid()
    p = 1 / (1 + np.exp(-z.numpy()))
    expected = -(t.numpy() * np.log(p) + (1 - t.numpy()) * np.log(1 - p)).sum(axis=1).mean()
    # 1 − p cancels where p is near 1: the error of its logarithm is eps / (1 − p)
    condition = float(1 / (1 - p).min())
    assert_close(
        mean_loss("bernoulli", z, t).item(), expected, FUNCTION, size=35, condition=condition
    )


@pytest.mark.parametrize("loss_name", ["cross_entropy", "squared_error", "bernoulli"])
def test_an_evaluation_in_parts_is_that_of_the_whole(
    loss_name: LossName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problems, "EVALUATED_AT_ONCE", 7)
    x, labels = _numbers(0, EXAMPLES, 4), torch.arange(EXAMPLES) % 3
    targets = labels if loss_name == "cross_entropy" else _numbers(1, EXAMPLES, 3).sigmoid()
    model = mlp((4, 3), seed=0, dtype=torch.float64)
    found = Supervised((x, targets), (x, targets), loss_name, seed=0).evaluate(model)
    W, b = (p.detach().numpy() for p in model.parameters())
    z, t = x.numpy() @ W.T + b, targets.numpy()
    losses = {
        "cross_entropy": lambda: np.log(np.exp(z).sum(axis=1)) - z[np.arange(EXAMPLES), t],
        "squared_error": lambda: 0.5 * ((z - t) ** 2).sum(axis=1),
        "bernoulli": lambda: (np.log1p(np.exp(z)) - t * z).sum(axis=1),
    }
    loss = float(losses[loss_name]().mean())
    wrong = float((z.argmax(axis=1) != t).mean()) if loss_name == "cross_entropy" else loss
    expected = {"loss": loss, "test": wrong}
    size = EXAMPLES * 3
    for name, value in expected.items():
        scale = float(np.abs(z).sum() / EXAMPLES)  # terms t·z and log Σ exp z cancel in part
        assert_close(found[name], value, FUNCTION, size=size, scale=scale, what=name)


def test_weight_decay_is_a_part_of_loss_gradient_and_evaluation() -> None:
    data = (_numbers(0, EXAMPLES, 4), torch.arange(EXAMPLES) % 3)
    plain = Supervised(data, data, "cross_entropy", seed=0)
    decayed = Regularized(Supervised(data, data, "cross_entropy", seed=0), 0.3)
    model = mlp((4, 5, 3), seed=0, dtype=torch.float64)
    params = list(model.parameters())
    batch, same = plain.batch("loss"), decayed.batch("loss")
    assert all(map(torch.equal, batch, same))
    penalty = 0.15 * sum((p.detach().numpy() ** 2).sum() for p in params)
    rise = decayed.evaluate(model)["loss"] - plain.evaluate(model)["loss"]
    assert_close(rise, penalty, ROUNDING, size=50, scale=plain.evaluate(model)["loss"])
    assert decayed.evaluate(model)["test"] == plain.evaluate(model)["test"]
    grads = torch.autograd.grad(plain.loss(model, batch), params)
    ours = torch.autograd.grad(decayed.loss(model, batch), params)
    for g, ours_g, p in zip(grads, ours, params, strict=True):
        assert_close(ours_g.numpy(), (g + 0.3 * p).detach().numpy(), ROUNDING, size=EXAMPLES)


def test_a_negative_weight_decay_is_refused() -> None:
    data = (_numbers(0, 4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`weight_decay` must be non-negative, got -1"):
        Regularized(Supervised(data, data, "cross_entropy", seed=0), -1.0)


def _split(seed: int, count: int) -> Split:
    source = np.random.default_rng(seed)
    images = source.uniform(0.2, 0.9, (count, 3, 6, 6)).astype(np.float32)
    return Split(images, np.arange(count) % 10)


def test_images_are_standardized_on_the_first_part_alone() -> None:
    parts = (_split(0, 50), _split(1, 20))
    found = standardized_images(*parts)
    mean = parts[0].inputs.astype(float).mean(axis=(0, 2, 3))[None, :, None, None]
    deviation = parts[0].inputs.astype(float).std(axis=(0, 2, 3))[None, :, None, None]
    for (images, labels), part in zip(found, parts, strict=True):
        expected = (part.inputs - mean) / deviation
        # mean and deviation are rounded to float32, then subtracted and divided
        tolerance = ROUNDING.at(np.float32)
        assert_close(
            images.numpy(), expected, tolerance, scale=float(np.abs(mean / deviation).max())
        )
        assert_close(labels.numpy(), part.targets, BITWISE)


def test_the_first_images_are_in_the_files_order() -> None:
    part = first(_split(0, 9), 3, start=4)
    assert_close(part.inputs, _split(0, 9).inputs[4:7], BITWISE.at(np.float32))
    assert part.targets.tolist() == [4, 5, 6]


def test_every_crop_is_a_window_of_the_padded_image_flipped_or_not() -> None:
    images = _numbers(0, 64, 2, 6, 5)
    found = cropped_and_flipped(images, generator(0, "loss"))
    padded = np.zeros((64, 2, 14, 13))
    padded[:, :, 4:10, 4:9] = images.numpy()
    seen = set()
    for image, crop in zip(padded, found.numpy(), strict=True):
        windows = {
            (row, column, flip): image[:, row : row + 6, column : column + 5][:, :, ::flip]
            for row in range(9)
            for column in range(9)
            for flip in (1, -1)
        }
        seen.add(next((key for key, w in windows.items() if np.array_equal(w, crop)), None))
    assert None not in seen
    # of 64 images fewer than 10 would be flipped (or not) with probability 1e-9, and some rows and
    # columns out of 9 are certainly more than one
    assert {flip for _, _, flip in seen if flip} == {1, -1}
    assert len({row for row, _, _ in seen}) > 4
    assert len({column for _, column, _ in seen}) > 4


def test_crops_leave_the_order_of_examples_and_the_evaluation() -> None:
    data = (_numbers(0, EXAMPLES, 1, 6, 6), torch.arange(EXAMPLES) % 3)
    plain, ours = (Supervised(data, data, "cross_entropy", batch_size=8, seed=2) for _ in "ab")
    cropped = Augmented(ours, seed=2)
    model = nn.Sequential(nn.Flatten(), mlp((36, 3), seed=0, dtype=torch.float64))
    assert cropped.evaluate(model) == plain.evaluate(model)
    of_the_order = generator(2, "loss")  # the crops must not be drawn as the order is
    for _ in range(3):
        (images, labels), (crops, same) = plain.batch("loss"), cropped.batch("loss")
        assert torch.equal(labels, same)
        assert not torch.equal(images, crops)
        assert not torch.equal(crops, cropped_and_flipped(images, of_the_order))


WIDTHS = (4, 5, 3)
DAMPING = 0.01


def _curvature_batch() -> tuple[torch.Tensor, ...]:
    return (_numbers(0, EXAMPLES, WIDTHS[0]),)


@pytest.mark.parametrize("loss_name", ["bernoulli", "cross_entropy"])
def test_sampled_kfac_preconditions_with_the_dense_damped_inverse(loss_name: LossName) -> None:
    model = mlp(WIDTHS, seed=0, dtype=torch.float64)
    kfac = SampledKFAC(model, _curvature_batch, loss_name, lr=1.0, damping=DAMPING)
    grads = [_numbers(9, *p.shape) for p in model.parameters()]
    found = kfac.precondition(grads)

    W1, b1, W2, b2 = (p.detach().numpy() for p in model.parameters())
    (x,) = _curvature_batch()
    s = x.numpy() @ W1.T + b1
    hidden = np.maximum(s, 0.0)
    z = torch.tensor(hidden @ W2.T + b2)
    # the library draws one target for each example from a generator with the seed of the rebuilding
    source = torch.Generator().manual_seed(0)
    if loss_name == "bernoulli":
        p = z.sigmoid()
        Ds = (p - p.bernoulli(generator=source)).numpy()
    else:
        p = z.softmax(dim=1)
        drawn = p.multinomial(num_samples=1, generator=source).squeeze(-1)
        Ds = (p - F.one_hot(drawn, WIDTHS[-1])).numpy()
    inner = (Ds @ W2) * (s > 0)
    one = np.ones((EXAMPLES, 1))
    layers = [(np.hstack([x.numpy(), one]), inner), (np.hstack([hidden, one]), Ds)]
    for layer, (a, d) in enumerate(layers):
        damped = np.kron(d.T @ d, a.T @ a) / EXAMPLES**2
        damped += DAMPING * np.eye(len(damped))
        weight, bias = (g.numpy() for g in grads[2 * layer : 2 * layer + 2])
        V = np.hstack([weight, bias[:, None]])
        expected = np.linalg.solve(damped, V.reshape(-1)).reshape(V.shape)
        actual = np.hstack([found[2 * layer].numpy(), found[2 * layer + 1].numpy()[:, None]])
        condition = float(np.linalg.cond(damped))
        assert_close(actual, expected, SOLVE, condition=condition, size=V.size + EXAMPLES)


@pytest.mark.parametrize("lr", [1e-4, 10.0])
def test_sampled_kfac_steps_along_bounded_directions_with_momentum(lr: float) -> None:
    model = mlp(WIDTHS, seed=0, dtype=torch.float64)
    kfac = SampledKFAC(model, _curvature_batch, "bernoulli", lr=lr, damping=DAMPING, interval=3)
    expected = [p.detach().clone() for p in model.parameters()]
    velocity = [torch.zeros_like(p) for p in expected]
    for step in range(3):
        grads = [_numbers(step, *p.shape) for p in expected]
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g
        kfac.step()
        directions = kfac.precondition(grads)  # the factors are those of step 0 until step 3
        product = sum((d * g).sum().item() for d, g in zip(directions, grads, strict=True))
        bound = min(1.0, math.sqrt(NORM_CONSTRAINT / (lr**2 * product)))
        assert (bound < 1) == (lr == 10.0), "one rate must be bounded, the other not"
        velocity = [0.9 * v + bound * d for v, d in zip(velocity, directions, strict=True)]
        expected = [p - lr * v for p, v in zip(expected, velocity, strict=True)]
    for p, q in zip(model.parameters(), expected, strict=True):
        assert_close(p.detach().numpy(), q.numpy(), FUNCTION, size=EXAMPLES, iterations=3)


def test_sampled_kfac_rebuilds_at_its_interval() -> None:
    model, draws = mlp(WIDTHS, seed=0, dtype=torch.float64), []
    kfac = SampledKFAC(
        model,
        lambda: draws.append(1) or _curvature_batch(),
        "bernoulli",
        lr=1e-3,
        damping=DAMPING,
        interval=3,
    )
    for step in range(7):
        for p in model.parameters():
            p.grad = _numbers(step, *p.shape)
        kfac.step()
    assert len(draws) == 3


def test_sampled_kfac_refuses_the_squared_error() -> None:
    with pytest.raises(ValueError, match=r"`loss_name` must be 'cross_entropy' or 'bernoulli'"):
        SampledKFAC(mlp(WIDTHS, seed=0), _curvature_batch, "squared_error", 0.1, 0.1)


@pytest.mark.parametrize(("lr", "damping"), [(0.0, 0.1), (0.1, -1.0)])
def test_sampled_kfac_refuses_a_rate_or_damping_that_is_not_positive(
    lr: float, damping: float
) -> None:
    with pytest.raises(ValueError, match=r"`lr` and `damping` must be positive"):
        SampledKFAC(mlp(WIDTHS, seed=0), _curvature_batch, "bernoulli", lr, damping)
