"""K-FAC's factors: what hooks read in a pass, averaged over mini-batches, and left alone else."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import apo_core as apo
from reference.curvature import kfac_factors
from reference.discrepancies import CategoricalKL, Discrepancy, SquaredEuclidean
from verification import bridge
from verification.engine.scenes import MODES, Scene, classifier, values
from verification.l1_values.kfac_cases import (
    LAYERS,
    NETWORKS,
    both,
    factors_of,
    halved_square,
    observed,
    reach,
)
from verification.profiles import share
from verification.tolerances import FUNCTION, ROUNDING, assert_close

seeds = st.integers(0, 2**16)


def buffers(rule: apo.rules.KFAC) -> list[Tensor]:
    """Copies of all factors, eigenbases and counts."""
    return [b.clone() for b in rule.buffers()]


def unchanged(rule: apo.rules.KFAC, before: list[Tensor]) -> bool:
    """Whether each factor is the copy of it, bit for bit."""
    return all(map(torch.equal, before, rule.buffers()))


# torch itself warns that "same" with an even kernel pads one side more.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
@share(0.1)
@given(seed=seeds)
def test_factors_of_one_layer_are_sums_over_its_jacobian(name: str, bias: bool, seed: int) -> None:
    """A patch is ∂z/∂W of one output channel at one position: no unfolding here."""
    torch.manual_seed(seed)
    build, shape = LAYERS[name]
    layer, x = build(bias).double(), torch.randn(shape, dtype=torch.float64)
    (factors,) = factors_of(observed(layer, lambda: halved_square(layer(x))))

    def positions(z: Tensor) -> Tensor:
        return (z.movedim(1, -1) if isinstance(layer, nn.Conv2d) else z).flatten(0, -2)

    names = [name for name, _ in layer.named_parameters()]

    def first_channel(*theta: Tensor) -> Tensor:
        own = dict(zip(names, theta, strict=True))
        return positions(torch.func.functional_call(layer, own, x))[:, 0]

    theta = tuple(layer.parameters())
    jacobians = torch.autograd.functional.jacobian(first_channel, theta)
    first = [J[:, 0].reshape(len(J), -1) for J in jacobians]  # by row 0 of W, and by b_0
    a = bridge.array(torch.cat(first, 1))  # (N T, in)
    z = bridge.array(positions(layer(x)))  # (N T, out)
    N, NT = len(x), len(z)
    assert_close(bridge.array(factors.A), a.T @ a / N, ROUNDING, size=NT, what="A")
    assert_close(
        bridge.array(factors.B),
        z.T @ z / NT,
        ROUNDING,
        size=NT + 2 * a.shape[1],  # z itself is a sum on both sides
        scale=float(np.linalg.norm(np.abs(a))) ** 2 / NT * float(layer.weight.detach().norm()) ** 2
        + float(np.linalg.norm(z.T @ z / NT)),
        what="B",
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rho", [SquaredEuclidean(), CategoricalKL()], ids=["square", "kl"])
@share(0.1)
@given(seed=seeds)
def test_with_the_models_own_labels_they_are_the_oracles(
    rho: Discrepancy, name: str, bias: bool, seed: int
) -> None:
    """The expectation over labels is a sum over the C columns of L with H_rho = L Lᵀ."""
    network, theta, model = both(name, bias, seed)
    x = np.random.default_rng(seed).standard_normal((3, network.input_size))
    N, C = len(x), network.output_size
    rule = apo.rules.KFAC(model)
    with rule.observe(model):
        for c in range(C):
            z = model(bridge.tensor(x))
            L = torch.eye(C, dtype=torch.float64).expand(N, C, C)
            if isinstance(rho, CategoricalKL):
                p = z.detach().softmax(1)
                L = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
            # C passes, each with N examples, whose mean has the factor 1 / (N C).
            ((z * L[:, :, c]).sum() / (N * np.sqrt(C))).backward()
    expected = kfac_factors(network, rho, theta, x)
    positions = network.trace(theta, x).positions
    for factors, layer, (a, _), (A, B) in zip(
        factors_of(rule), network.layers, positions, expected, strict=True
    ):
        if layer.bias is not None:  # the homogeneous coordinate, by hand
            ones = np.concatenate([a, np.ones((*a.shape[:2], 1))], axis=2)
            A = np.einsum("nti,ntj->ij", ones, ones) / N
        layers, terms = len(network.layers), N * C * a.shape[1]
        close = {"condition": reach(model), "iterations": 2 * layers, "size": terms + 9}
        assert_close(bridge.array(factors.A), A, FUNCTION, what="A", **close)
        scale = float(np.linalg.norm(B))
        assert_close(bridge.array(factors.B), B, FUNCTION, what="B", scale=scale, **close)


# linear_operator, which curvlinops imports, calls torch.jit.script at import: not ours to change.
@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_with_the_datas_labels_they_are_curvlinops(name: str) -> None:
    """A peer's empirical Fisher; it divides A and B otherwise, so their products are compared."""
    from curvlinops import FisherType, KFACLinearOperator

    network, _, model = both(name, bias=True, seed=0)
    x = torch.randn(5, network.input_size, dtype=torch.float64)
    y = torch.randint(network.output_size, (5,))
    rule = observed(model, lambda: cross_entropy(model(x), y))
    peer = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(x, y)],
        fisher_type=FisherType.EMPIRICAL,
        separate_weight_and_bias=False,
        check_deterministic=False,
        num_per_example_loss_terms=1,
    )
    n = sum(p.numel() for p in model.parameters())
    theirs = bridge.array(cast(Tensor, peer @ torch.eye(n, dtype=torch.float64)))
    blocks, index = [], []
    start = 0
    for factors, layer in zip(factors_of(rule), network.layers, strict=True):
        out, in_ = layer.shape
        blocks.append(torch.kron(factors.B, factors.A))
        rows = start + np.arange(out * in_).reshape(out, in_)
        last = start + out * in_ + np.arange(out)[:, None]
        index.append(np.concatenate([rows, last], axis=1).reshape(-1))
        start += out * (in_ + 1)
    order = np.concatenate(index)
    assert_close(
        theirs[np.ix_(order, order)],
        bridge.array(torch.block_diag(*blocks)),
        FUNCTION,
        condition=reach(model),
        size=64,
        what="A ⊗ B",
    )


def scene_with_kfac(seed: int = 0, mode: tuple[str, str] = ("exact", "exact")) -> Scene:
    """A `classifier` (Conv2d, BatchNorm, dropout, Linear) trained by K-FAC and APO."""
    torch.manual_seed(seed)
    model = classifier()
    x, x_other = torch.randn(2, 6, 1, 3, 3, dtype=torch.float64)
    rule = apo.rules.KFAC(model, lr=0.02, damping=0.1, smoothing=0.6, interval=2)
    objective = apo.ProximalObjective("kl", 0.3, 0.1, *mode)  # pyright: ignore[reportArgumentType]
    meta_optimizer = torch.optim.RMSprop(rule.parameters(), lr=0.05)
    optimizer = apo.APO(model, rule, objective, meta_optimizer, interval=2)
    return Scene(model, optimizer, x, torch.randint(3, (6,)), x_other)


def kfac(s: Scene) -> apo.rules.KFAC:
    """The scene's rule."""
    return cast(apo.rules.KFAC, s.optimizer.rule)


def run(s: Scene, steps: int) -> None:
    """Algorithm 1, with a fresh B and B' at every step."""
    for _ in range(steps):
        s.x, s.x_other = torch.randn_like(s.x), torch.randn_like(s.x_other)
        with kfac(s).observe(s.model):
            s.backward()
        if s.optimizer.meta_due:
            s.meta_step()
        s.optimizer.step()


@pytest.mark.parametrize("mode", MODES)
def test_meta_steps_steps_and_passes_outside_leave_them_alone(mode: tuple[str, str]) -> None:
    s = scene_with_kfac(mode=mode)
    with kfac(s).observe(s.model):
        s.backward()
    before = buffers(kfac(s))
    phi = values(kfac(s))
    s.meta_step()
    s.optimizer.step()
    s.backward()
    assert unchanged(kfac(s), before)
    assert not all(map(torch.equal, phi, kfac(s).parameters())), "φ must have moved"


@pytest.mark.parametrize("what", ["meta-step", "step"])
def test_a_step_inside_the_block_is_refused(what: str) -> None:
    s = scene_with_kfac()
    run(s, 1)
    before = buffers(kfac(s))

    def misplaced() -> None:
        with kfac(s).observe(s.model):
            s.backward()
            s.meta_step() if what == "meta-step" else s.optimizer.step()

    with pytest.raises(RuntimeError, match="`observe` must be left before a step or a meta-step"):
        misplaced()
    assert unchanged(kfac(s), before)
    run(s, 1)  # the block was left


def test_no_hook_stays_and_an_exception_leaves_no_trace() -> None:
    s = scene_with_kfac()
    run(s, 1)
    before = buffers(kfac(s))

    def failing() -> None:
        with kfac(s).observe(s.model):
            s.backward()
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        failing()
    assert unchanged(kfac(s), before)
    assert not any(m._forward_hooks for m in s.model.modules())


def test_only_what_goes_backward_counts() -> None:
    """Neither an evaluation, nor a forward pass without backward, nor one after the block."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, other = torch.randn(2, 4, 3, dtype=torch.float64)
    expected = observed(model, lambda: halved_square(model(x)))
    rule = apo.rules.KFAC(model)
    with rule.observe(model):
        with torch.no_grad():
            model(other)
        unused = halved_square(model(other))
        halved_square(model(x)).backward()
    unused.backward()
    assert unchanged(rule, buffers(expected))


def test_labels_drawn_from_the_model_serve_the_factors_and_the_datas_the_gradient() -> None:
    """The documented recipe: one forward pass, two backward passes, one inside the block."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    x, y, drawn = torch.randn(6, 3, dtype=torch.float64), *torch.randint(4, (2, 6))
    expected = observed(model, lambda: cross_entropy(model(x), drawn))
    rule = apo.rules.KFAC(model)
    with rule.observe(model):
        z = model(x)
        cross_entropy(z, drawn).backward(retain_graph=True)
    model.zero_grad()
    cross_entropy(z, y).backward()
    assert unchanged(rule, buffers(expected))
    (gradient,) = torch.autograd.grad(cross_entropy(model(x), y), [model.weight])
    assert torch.equal(cast(Tensor, model.weight.grad), gradient)


@given(seed=seeds, first=st.integers(1, 5))
def test_parts_of_a_mini_batch_are_the_whole(seed: int, first: int) -> None:
    """Gradient accumulation: the parts' gradients add up to the mean's."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).double()
    x = torch.randn(6, 1, 3, 3, dtype=torch.float64)
    whole = observed(model, lambda: halved_square(model(x)))
    rule = apo.rules.KFAC(model)
    with rule.observe(model):
        for part in (x[:first], x[first:]):
            (halved_square(model(part)) * (len(part) / 6)).backward()
    for factors, expected in zip(factors_of(rule), factors_of(whole), strict=True):
        for name in ("A", "B"):
            assert_close(
                bridge.array(getattr(factors, name)),
                bridge.array(getattr(expected, name)),
                ROUNDING,
                condition=reach(model),
                size=6 * 4 + 9,
                what=name,
            )


@pytest.mark.parametrize("smoothing", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("interval", [1, 3])
@given(seed=seeds)
@share(0.2)
def test_averages_over_mini_batches(smoothing: float, interval: int, seed: int) -> None:
    """The weight of the past is min(1 − 1/k, ρ): first a plain mean, then an exponential one."""
    torch.manual_seed(seed)
    model = nn.Linear(3, 2).double()
    rule = apo.rules.KFAC(model, smoothing=smoothing, interval=interval)
    (factors,) = factors_of(rule)
    A, B, basis = np.zeros((4, 4)), np.zeros((2, 2)), (factors.U_A.clone(), factors.U_B.clone())
    for k in range(1, 8):
        x = torch.randn(4, 3, dtype=torch.float64)
        model.zero_grad()
        with rule.observe(model):
            halved_square(model(x)).backward()
        a = np.concatenate([x.numpy(), np.ones((4, 1))], axis=1)
        z = bridge.array(model(x))
        rho = min(1 - 1 / k, smoothing)
        A, B = rho * A + (1 - rho) * a.T @ a / 4, rho * B + (1 - rho) * z.T @ z / 4
        scale = float(np.abs(a).sum()) ** 2  # of B: |z| ≤ |W| |a|, with entries of W below 1
        assert_close(bridge.array(factors.A), A, ROUNDING, iterations=k, size=8, what="A")
        assert_close(
            bridge.array(factors.B), B, ROUNDING, iterations=k, size=12, scale=scale, what="B"
        )
        fresh = not torch.equal(basis[0], factors.U_A)
        assert fresh == ((k - 1) % interval == 0), f"eigenbasis at mini-batch {k}"
        basis = (factors.U_A.clone(), factors.U_B.clone())
        if fresh:
            U, alpha = bridge.array(factors.U_A), bridge.array(factors.alpha)
            assert_close(U * alpha @ U.T, A, ROUNDING, iterations=k + 4, size=8, what="U α Uᵀ")


def test_a_layer_that_a_mini_batch_does_not_reach_keeps_its_average() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    rule = apo.rules.KFAC(model)
    x = torch.randn(3, 2)
    with rule.observe(model):
        halved_square(model[1](model[0](x))).backward()
    first, second = factors_of(rule)
    before = [b.clone() for b in second.buffers()]
    with rule.observe(model):
        halved_square(model[0](x)).backward()
    assert (int(first.count), int(second.count)) == (2, 1)
    assert all(map(torch.equal, before, second.buffers()))


@given(at=st.integers(1, 5))
@share(0.25)
def test_a_loaded_run_goes_on_bit_for_bit(at: int) -> None:
    first = scene_with_kfac()
    run(first, at)
    file = io.BytesIO()
    optimizer, model = first.optimizer.state_dict(), first.model.state_dict()
    torch.save({"model": model, "optimizer": optimizer, "random": torch.get_rng_state()}, file)
    run(first, 5)
    second = scene_with_kfac(seed=1)
    second.y = first.y
    run(second, 2)  # so that there is something to overwrite
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    second.model.load_state_dict(loaded["model"])
    second.optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["random"])
    run(second, 5)
    assert all(map(torch.equal, values(first.model), second.model.parameters()))
    assert all(map(torch.equal, values(kfac(first)), kfac(second).parameters()))
    assert unchanged(kfac(second), buffers(kfac(first)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_a_copy_of_the_rule_is_its_own(copied: Callable[[apo.UpdateRule], apo.UpdateRule]) -> None:
    s = scene_with_kfac()
    run(s, 2)
    before = buffers(kfac(s))
    twin = cast(apo.rules.KFAC, copied(kfac(s)))
    assert unchanged(twin, before)
    with twin.observe(s.model):
        s.backward()
    assert unchanged(kfac(s), before)
    assert not unchanged(twin, before)


def test_an_activation_in_place_changes_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3)
    layers = nn.Linear(3, 4), nn.Linear(4, 2)
    seen = []
    for inplace in (False, True):
        model = nn.Sequential(layers[0], nn.ReLU(inplace), layers[1])
        seen.append(buffers(observed(model, lambda model=model: halved_square(model(x)))))
    assert all(map(torch.equal, *seen))


def test_float32_factors_are_the_float64_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(6, 1, 3, 3)
    wide = copy.deepcopy(model).double()
    single = observed(model, lambda: halved_square(model(x)))
    double = observed(wide, lambda: halved_square(wide(x.double())))
    close = {"condition": reach(model), "iterations": 4, "size": 24 + 9}
    for got, expected in zip(factors_of(single), factors_of(double), strict=True):
        for name in ("A", "B"):
            value, wanted = (bridge.array(getattr(f, name)) for f in (got, expected))
            assert_close(value, wanted, FUNCTION.at(np.float32), what=name, **close)


@pytest.mark.parametrize("stored", [True, False], ids=["bfloat16", "autocast"])
def test_sixteen_bits_are_summed_in_float32(stored: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 3).bfloat16()
    model = nn.Linear(3, 2).to(torch.bfloat16 if stored else torch.float32)
    rule = apo.rules.KFAC(model)
    with torch.autocast("cpu", enabled=not stored), rule.observe(model):
        halved_square(model(x if stored else x.float()).float()).backward()
    (factors,) = factors_of(rule)
    a = np.concatenate([x.double().numpy(), np.ones((300, 1))], axis=1)
    assert_close(
        bridge.array(factors.A),
        (a.T @ a / 300).astype(np.float32),
        ROUNDING.at(np.float32),
        size=300,
    )
    grads = [torch.ones_like(p) for p in model.parameters()]
    updates, _ = rule(list(model.parameters()), grads, {})
    assert [u.dtype for u in updates] == [p.dtype for p in model.parameters()]


@pytest.mark.parametrize(
    ("go", "message"),
    [
        (lambda z: None, "`observe` must enclose a forward and a backward pass, got no gradient"),
        (lambda z: (z.sum() * torch.inf).backward(), "the factors of layer `0` must be finite"),
    ],
    ids=["no backward", "not finite"],
)
def test_a_useless_block_is_refused(go: Callable[[Tensor], None], message: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    rule = observed(model, lambda: model(torch.ones(3, 2)).square().mean())
    before = buffers(rule)
    with pytest.raises(RuntimeError, match=message), rule.observe(model):
        go(model(torch.ones(3, 2)))
    assert unchanged(rule, before)


def test_a_block_in_a_block_and_another_model_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    rule = apo.rules.KFAC(model)
    with (
        pytest.raises(RuntimeError, match="`observe` must not be entered twice"),
        rule.observe(model),
        rule.observe(model),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"`model` must be the module .*, got one without .* `0`"),
        rule.observe(nn.Linear(2, 2)),
    ):
        pass


def work(rank: int, folder: str) -> None:
    """One of two ranks: observe every second example, and leave the factors in the folder."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=2)
    torch.save(buffers(observed_in_part(DistributedDataParallel, rank)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def observed_in_part(
    wrap: Callable[[nn.Module], nn.Module], start: int, stride: int = 2
) -> apo.rules.KFAC:
    """A rule that saw the examples start, start + stride, ... of twelve."""
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    x = torch.randn(12, 3, dtype=torch.float64)[start::stride]
    return observed(model, lambda: halved_square(model(x)))


def test_ranks_have_the_same_factors_and_they_are_the_whole_batchs(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(map(torch.equal, one, other))
    whole = observed_in_part(lambda model: model, 0, stride=1)
    names = [name.rpartition(".")[2] for name, _ in whole.named_buffers()]
    for name, got, expected in zip(names, one, buffers(whole), strict=True):
        if name in ("A", "B"):
            assert_close(bridge.array(got), bridge.array(expected), ROUNDING, size=12, what=name)
