"""Which parameter gets which structure: the default for every layer, and a policy of the user's."""

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apo_core as apo
import apo_core.testing
from apo_core.preconditioners import Structure
from verification.engine.scenes import values
from verification.l1_values.structures import CASES, disturb

MATRIX_STRUCTURES: dict[str, Structure] = {
    "EKFAC": apo.EKFAC,
    "Kronecker": apo.Kronecker,
    "BlockEKFAC": partial(apo.BlockEKFAC, block=2),
    "OneSided": partial(apo.OneSided, side="output"),
}
WHOLE_STRUCTURES: dict[str, Structure] = {
    "Scalar": apo.Scalar,
    "Diagonal": apo.Diagonal,
    "LowRank": partial(apo.LowRank, rank=2),
    "BlockDiagonal": partial(apo.BlockDiagonal, block=5),
}


class Bare(nn.Module):
    """A parameter that belongs to no layer of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(2, 3))


def zoo() -> nn.ModuleDict:
    """One of every layer that a policy must tell apart."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "linear": nn.Linear(3, 4),
            "conv1": nn.Conv1d(2, 3, 2, padding="same", dilation=2),
            "conv2": nn.Conv2d(4, 6, 3, groups=2, dilation=2),
            "conv3": nn.Conv3d(1, 2, 2, padding="same"),
            "depthwise": nn.Conv1d(4, 4, 3, groups=4),
            "norm": nn.LayerNorm(4),
            "batch_norm": nn.BatchNorm1d(4),
            "embedding": nn.Embedding(7, 4),
            "bag": nn.EmbeddingBag(5, 4),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "cross": nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            "bare": Bare(),
        }
    ).double()


WEIGHTS = ("linear", "conv1", "conv2", "conv3", "depthwise")
PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")


def expected(name: str) -> str:
    """What the documentation says of that parameter under a matrix structure."""
    if name == "attention.in_proj_weight":
        return "q, k and v"
    if name in ("embedding.weight", "bag.weight"):
        return "table"
    weights = [f"{layer}.weight" for layer in WEIGHTS] + ["attention.out_proj.weight"]
    return "matrix" if name in weights + [f"cross.{p}" for p in PROJECTIONS] else "diagonal"


def kinds(rule: apo.rules.Preconditioned) -> dict[str, type[nn.Module]]:
    """The class of each parameter's P."""
    return {n: type(P) for n, P in zip(rule.names, rule.preconditioners, strict=True)}


@pytest.mark.parametrize("name", MATRIX_STRUCTURES)
def test_a_matrix_structure_goes_to_the_weights_and_the_rest_to_its_own(name: str) -> None:
    structure, model = MATRIX_STRUCTURES[name], zoo()
    matrix = structure.func if isinstance(structure, partial) else structure
    classes: dict[str, Any] = {
        "matrix": matrix,
        "q, k and v": apo.Stacked,
        "table": apo.EmbeddingEKFAC,
        "diagonal": apo.Diagonal,
    }
    rule = apo.rules.Preconditioned(model, structure)
    assert kinds(rule) == {n: classes[expected(n)] for n, _ in model.named_parameters()}
    stacked = rule.preconditioners[rule.names.index("attention.in_proj_weight")]
    assert isinstance(stacked, apo.Stacked)
    assert [type(part) for part in stacked.parts] == [matrix] * 3


@pytest.mark.parametrize("name", WHOLE_STRUCTURES)
def test_a_structure_that_accepts_every_parameter_gets_every_parameter(name: str) -> None:
    structure = WHOLE_STRUCTURES[name]
    found = set(kinds(apo.rules.Preconditioned(zoo(), structure)).values())
    assert found == {structure.func if isinstance(structure, partial) else structure}


@pytest.mark.parametrize("name", MATRIX_STRUCTURES | WHOLE_STRUCTURES)
@pytest.mark.parametrize("layer", list(zoo()))
def test_every_structure_conforms_on_every_layer(name: str, layer: str) -> None:
    """The conformance kit, dQ/dφ by central differences included, away from the start."""
    model = zoo()[layer]
    rule = apo.rules.Preconditioned(model, (MATRIX_STRUCTURES | WHOLE_STRUCTURES)[name], 0.5)
    disturb(rule, seed=1)
    apo_core.testing.check_update_rule(rule, model)


@pytest.mark.parametrize("name", [name for name in CASES if name != "stacked rows"])
def test_every_structure_conforms_in_float32(name: str) -> None:
    """Chosen by a policy, also where it would not be by default."""
    model = nn.Linear(5, 4, bias=False)
    rule = apo.rules.Preconditioned(
        model, initial_scale=0.5, policy=lambda *_: CASES[name].structure
    )
    apo_core.testing.check_update_rule(rule, model)


def test_queries_keys_and_values_do_not_mix() -> None:
    """Each has the step of its own EKFAC, and a gradient in one moves only that one."""
    model = nn.MultiheadAttention(4, 2, bias=False).double()
    rule = apo.rules.Preconditioned(model)
    disturb(rule, seed=0)
    fused = rule.preconditioners[0]
    assert isinstance(fused, apo.Stacked)
    g = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = fused(g)
    for part, piece, ours in zip(fused.parts, g.chunk(3), step.chunk(3), strict=True):
        assert torch.equal(part(piece), ours)
    only_keys = torch.zeros_like(g)
    only_keys[4:8] = g[4:8]
    queries, keys, others = fused(only_keys).chunk(3)
    assert not queries.any()
    assert not others.any()
    assert torch.equal(keys, step[4:8])


def test_a_policy_is_asked_of_every_parameter_with_its_owner_and_full_name() -> None:
    model, asked = zoo(), []

    def policy(module: nn.Module, name: str, parameter: Tensor) -> None:
        asked.append((module, name, parameter))

    rule = apo.rules.Preconditioned(model, policy=policy)
    assert kinds(rule) == kinds(apo.rules.Preconditioned(zoo()))
    named = dict(model.named_parameters())
    assert [name for _, name, _ in asked] == list(named)
    for module, name, parameter in asked:
        assert parameter is named[name]
        assert module is model.get_submodule(name.rpartition(".")[0])


def test_a_policy_decides_and_None_leaves_the_default() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    def policy(module: nn.Module, name: str, parameter: Tensor) -> Structure | None:
        if name == "0.weight":
            return partial(apo.BlockEKFAC, block=2)
        return apo.Scalar if name.endswith("bias") else None

    rule = apo.rules.Preconditioned(model, apo.Kronecker, 0.3, policy)
    found = [type(P) for P in rule.preconditioners]
    assert found == [apo.BlockEKFAC, apo.Scalar, apo.Kronecker, apo.Scalar]
    first = rule.preconditioners[0]
    assert isinstance(first, apo.BlockEKFAC)
    assert (tuple(first.A.shape), tuple(first.B.shape)) == ((2, 2, 2), (2, 2, 2))
    n = sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(rule.dense(), 0.09 * torch.eye(n))


def test_a_fused_projection_of_a_users_own_is_split_by_a_policy() -> None:
    """As GPT-2's one Linear for queries, keys and values."""
    model = nn.Sequential(nn.Linear(4, 12, bias=False))
    split = partial(apo.Stacked, structure=partial(apo.BlockEKFAC, block=2), parts=3)
    rule = apo.rules.Preconditioned(model, policy=lambda *_: split)
    stacked = rule.preconditioners[0]
    assert isinstance(stacked, apo.Stacked)
    assert [type(part) for part in stacked.parts] == [apo.BlockEKFAC] * 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"structure": len}, TypeError, "`structure` must be a class .* got <built-in"),
        ({"structure": partial(len)}, TypeError, "`structure` must be a class .* functools.part"),
        ({"structure": apo.EKFAC(torch.ones(2, 2))}, TypeError, r"`structure` must .*EKFAC\(\)"),
        ({"policy": lambda *_: "EKFAC"}, TypeError, "`policy` must return .* 'EKFAC' for `weight`"),
        ({"policy": lambda *_: apo.Dense}, TypeError, "`policy` must return .* one parameter"),
        (
            {"structure": apo.Dense, "policy": lambda *_: None},
            ValueError,
            "`policy` must be None with a structure over all .* got one with .*Dense.*; choose",
        ),
        (
            {"structure": partial(apo.BlockEKFAC, block=0)},
            ValueError,
            "`block` must be an integer of at least 1, got 0; it is the largest size of a block",
        ),
    ],
)
def test_bad_policies(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        apo.rules.Preconditioned(nn.Linear(2, 3), **arguments)


class Reader(nn.Module):
    """A small language model: a tied embedding, attention, a normalization, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.position = nn.Parameter(torch.zeros(3, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch · length, vocabulary) of tokens (batch, length)."""
        x = self.table(tokens) + self.position
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x)).flatten(0, 1)


@pytest.mark.parametrize("name", MATRIX_STRUCTURES | WHOLE_STRUCTURES)
def test_a_small_transformer_trains_with_every_structure(name: str) -> None:
    """Every φ moves, a copy by state_dict and by pickle steps alike, and the loss falls."""
    torch.manual_seed(0)
    model = Reader().double()
    rule = apo.rules.Preconditioned(model, (MATRIX_STRUCTURES | WHOLE_STRUCTURES)[name], 0.3)
    optimizer = apo.APO(
        model,
        rule,
        apo.ProximalObjective("kl", 0.1, 0.1),
        torch.optim.Adam(rule.parameters(), lr=1e-3),
        interval=2,
    )
    tokens = torch.randint(6, (5, 3))
    before, losses = values(rule), []

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(tokens), tokens.roll(1, 1).flatten())

    for _ in range(20):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(float(value.detach()))
        if optimizer.meta_due:
            optimizer.meta_step(loss=loss, outputs=lambda: model(tokens))
        optimizer.step()
    assert optimizer.skipped_meta_steps == 0
    assert losses[-1] < losses[0]
    assert not any(map(torch.equal, before, values(rule)))

    params = [p.detach() for p in model.parameters()]
    grads = [torch.ones_like(p) for p in params]
    saved, file = copy.deepcopy(rule), io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    structure = (MATRIX_STRUCTURES | WHOLE_STRUCTURES)[name]
    loaded = apo.rules.Preconditioned(model, structure)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (saved, loaded):
        assert all(map(torch.equal, other(params, grads, {})[0], rule(params, grads, {})[0]))
