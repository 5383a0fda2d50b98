"""Every structure: action, dense matrix, semidefiniteness, start, size and cost as documented."""

from typing import Any, final

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import apo_core as apo
from apo_core.preconditioners.blocks import equal_blocks
from verification import bridge
from verification.l1_values.structures import CASES, build, disturb, matrix_of
from verification.profiles import share
from verification.tolerances import ROUNDING, assert_close

NAMES = pytest.mark.parametrize("name", CASES)
SHAPES = st.tuples(st.integers(1, 8), st.integers(1, 8))
SEEDS = st.integers(0, 2**16)

# The longest chain of matrix products behind an entry is eq. 10's four and the scale in between.
CHAIN = 5


@NAMES
@share(0.5)
@given(shape=SHAPES, seed=SEEDS)
def test_dense_is_the_oracles(name: str, shape: tuple[int, int], seed: int) -> None:
    """Row-major, for sides that the block size divides and others."""
    P = build(name, shape)
    disturb(P, seed)
    expected, terms = matrix_of(name, P, shape)
    assert_close(
        bridge.array(P.dense()),
        expected,
        ROUNDING,
        iterations=CHAIN,
        scale=float(np.linalg.norm(terms)),
        what=f"dense() of {name}",
    )


@NAMES
@share(0.5)
@given(shape=SHAPES, seed=SEEDS, kernel=st.booleans())
def test_the_action_is_the_oracles_matrix_times_g(
    name: str, shape: tuple[int, int], seed: int, kernel: bool
) -> None:
    """Also on a kernel (out, in, 1, k), which is the matrix (out, in·k)."""
    out, in_ = shape
    full = (out, 1, 1, in_) if kernel else shape
    P = build(name, full)
    disturb(P, seed)
    g = np.random.default_rng(seed).standard_normal(full)
    matrix, terms = matrix_of(name, P, shape)
    assert_close(
        bridge.array(P(bridge.tensor(g))),
        (matrix @ g.reshape(-1)).reshape(full),
        ROUNDING,
        size=g.size,
        iterations=CHAIN,
        scale=float(np.linalg.norm(terms @ np.abs(g).reshape(-1))),
        what=f"{name} times g",
    )


@NAMES
@share(0.5)
@given(shape=SHAPES, seed=SEEDS)
def test_every_structure_is_positive_semidefinite(
    name: str, shape: tuple[int, int], seed: int
) -> None:
    """Symmetric, and no eigenvalue below zero by more than rounding, whatever φ."""
    P = build(name, shape)
    disturb(P, seed)
    dense = bridge.array(P.dense())
    scale = float(np.linalg.norm(matrix_of(name, P, shape)[1]))
    assert_close(dense, dense.T, ROUNDING, iterations=CHAIN, scale=scale, what="symmetry")
    lowest = float(np.linalg.eigvalsh(0.5 * (dense + dense.T))[0])
    assert_close(
        min(lowest, 0.0), 0.0, ROUNDING, size=len(dense), iterations=CHAIN + 1, scale=scale
    )


@NAMES
@share(0.5)
@given(shape=SHAPES, log_scale=st.floats(-3, 1))
def test_every_structure_starts_as_s_squared_I(
    name: str, shape: tuple[int, int], log_scale: float
) -> None:
    s, n = 10.0**log_scale, shape[0] * shape[1]
    dense = bridge.array(build(name, shape, s).dense())
    # Roots of s and of ½ carry half an ulp each; one term a sum is not zero.
    assert_close(dense, s**2 * np.eye(n), ROUNDING, size=2, iterations=2, what=name)


@NAMES
@share(0.5)
@given(shape=SHAPES)
def test_phi_has_the_documented_size(name: str, shape: tuple[int, int]) -> None:
    assert sum(p.numel() for p in build(name, shape).parameters()) == CASES[name].numbers(*shape)


@NAMES
@share(0.5)
@given(shape=SHAPES)
def test_a_step_costs_the_documented_products(name: str, shape: tuple[int, int]) -> None:
    """Two operations, a multiplication and an addition, a term; elementwise work is not counted."""
    P, g = build(name, shape), torch.ones(shape, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        P(g)
    assert counter.get_total_flops() == 2 * CASES[name].products(*shape)


@NAMES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_phi_is_in_float32_and_the_step_in_the_gradients_dtype(
    name: str, dtype: torch.dtype
) -> None:
    """The products run in float32, and only their result is rounded."""
    P = CASES[name].structure(torch.zeros(4, 5, dtype=dtype), 0.5)
    disturb(P, seed=0)
    g = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    step = P(g)
    assert {phi.dtype for phi in P.parameters()} == {torch.float32}
    assert step.dtype == dtype
    assert torch.equal(step, P(g.float()).to(dtype))


@final
class BatchedProducts(TorchDispatchMode):
    """Counts the calls of bmm."""

    number = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.number += function is torch.ops.aten.bmm.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["block EKFAC", "block-diagonal"])
def test_the_number_of_blocks_does_not_change_the_number_of_operations(name: str) -> None:
    """Batched products: as many kernels for 2 × 2 blocks as for 8 × 8."""

    def products(side: int) -> int:
        P = build(name, (side, side))
        with BatchedProducts() as counted:
            P(torch.ones(side, side, dtype=torch.float64))
        return counted.number

    assert products(24) == products(6) > 0


@given(shape=SHAPES, seed=SEEDS)
def test_one_block_a_side_is_EKFAC(shape: tuple[int, int], seed: int) -> None:
    weight = torch.zeros(shape, dtype=torch.float64)
    P, expected = apo.BlockEKFAC(weight, block=8), apo.EKFAC(weight)
    disturb(P, seed)
    with torch.no_grad():
        for ours, theirs in zip(P.parameters(), expected.parameters(), strict=True):
            theirs.copy_(ours.reshape(theirs.shape))
    g = np.random.default_rng(seed).standard_normal(shape)
    assert_close(
        bridge.array(P(bridge.tensor(g))),
        bridge.array(expected(bridge.tensor(g))),
        ROUNDING,
        iterations=CHAIN,
        scale=float(np.linalg.norm(matrix_of("block EKFAC", P, shape)[1] @ np.abs(g).reshape(-1))),
    )


@share(0.5)
@given(shape=SHAPES, seed=SEEDS)
def test_a_diagonal_vocabulary_side_is_absorbed_by_the_scales(
    shape: tuple[int, int], seed: int
) -> None:
    """EKFAC with B = diag b and scales S is `EmbeddingEKFAC` with scales b ⊙ S."""
    weight = torch.zeros(shape, dtype=torch.float64)
    P, expected = apo.EmbeddingEKFAC(weight), apo.EKFAC(weight)
    disturb(expected, seed)
    with torch.no_grad():
        b = expected.B.diagonal().clone()
        expected.B.copy_(torch.diag(b))
        P.A.copy_(expected.A)
        P.S.copy_(b[:, None] * expected.S)
    assert_close(
        bridge.array(P.dense()),
        bridge.array(expected.dense()),
        ROUNDING,
        iterations=CHAIN,
        scale=float(np.linalg.norm(matrix_of("embedding EKFAC", P, shape)[1])),
    )


@given(seed=SEEDS)
def test_a_token_without_a_gradient_takes_no_step(seed: int) -> None:
    P = build("embedding EKFAC", (6, 3))
    disturb(P, seed)
    g = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    g[::2] = 0.0
    step = P(g)
    assert not step[::2].any()
    assert step[1::2].any(dim=1).all()


@given(seed=SEEDS, n=st.integers(2, 12))
def test_the_low_rank_part_starts_off_its_saddle(seed: int, n: int) -> None:
    """dQ/dU = 0 at U = 0, whatever Q; as it starts, every column has a gradient."""
    P = apo.LowRank(torch.zeros(n, dtype=torch.float64), rank=2)
    rng = np.random.default_rng(seed)
    g, q = (bridge.tensor(rng.standard_normal(n)) for _ in range(2))
    (gradient,) = torch.autograd.grad(q @ P(g), P.U)
    assert bool((gradient.norm(dim=0) > 0).all())
    with torch.no_grad():
        P.U.zero_()
    (gradient,) = torch.autograd.grad(q @ P(g), P.U)
    assert not gradient.any()


@pytest.mark.parametrize("name", ["block EKFAC", "block-diagonal"])
@given(shape=st.sampled_from([(4, 5), (5, 4), (7, 7), (1, 5)]), seed=SEEDS)
def test_what_the_blocks_leave_over_does_nothing(
    name: str, shape: tuple[int, int], seed: int
) -> None:
    """The step, bit for bit, whatever the padding's rows of the last block hold."""
    P = build(name, shape)
    disturb(P, seed)
    g = bridge.tensor(np.random.default_rng(seed).standard_normal(shape))
    before = P(g).detach()
    sides = {"F": g.numel()} if name == "block-diagonal" else {"A": shape[1], "B": shape[0]}
    with torch.no_grad():
        for key, side in sides.items():
            blocks = P.get_parameter(key)
            live = side - (len(blocks) - 1) * blocks.shape[1]
            blocks[-1, live:] = 7.0
    assert torch.equal(P(g).detach(), before)


@given(total=st.integers(1, 500), block=st.integers(1, 100))
def test_blocks_are_the_fewest_and_cover_the_side(total: int, block: int) -> None:
    count, size = equal_blocks(total, block)
    assert size <= block
    assert (count - 1) * block < total <= count * size
    assert (count - 1) * size < total, "no block may be padding alone"
    assert count * (size - 1) < total, "the size must be the smallest that covers the side"


WEIGHT, VECTOR = torch.zeros(4, 3), torch.zeros(4)


@pytest.mark.parametrize(
    ("structure", "arguments", "error", "message"),
    [
        (
            apo.Kronecker,
            (VECTOR,),
            ValueError,
            r"`parameter` must be a weight .*, got shape \(4,\)",
        ),
        (apo.BlockEKFAC, (VECTOR,), ValueError, "`parameter` must be a weight .* use Diagonal"),
        (apo.OneSided, (VECTOR,), ValueError, "`parameter` must be a weight .* use Diagonal"),
        (apo.EmbeddingEKFAC, (VECTOR,), ValueError, "`parameter` must be a weight .* use Diagonal"),
        (apo.BlockEKFAC, (WEIGHT, 1.0, 0), ValueError, "`block` must be an integer .*, got 0; it"),
        (apo.BlockDiagonal, (WEIGHT, 1.0, 2.5), ValueError, "`block` must be an integer .* 2.5"),
        (apo.LowRank, (WEIGHT, 1.0, -1), ValueError, "`rank` must be an integer .*, got -1; it is"),
        (apo.LowRank, (WEIGHT, 1.0, True), ValueError, "`rank` must be an integer .*, got True"),
        (
            apo.OneSided,
            (WEIGHT, 1.0, "left"),
            ValueError,
            "`side` must be 'input' or 'output', got",
        ),
        (apo.Stacked, (WEIGHT, 1.0, apo.EKFAC, 3), ValueError, r"`parts` must divide .*\(4, 3\)"),
        (apo.Stacked, (WEIGHT, 1.0, apo.EKFAC, 0), ValueError, "`parts` must be an integer of at"),
        (apo.Stacked, (torch.zeros(()),), ValueError, r"`parts` must divide the first dim.* \(\)"),
        (apo.Stacked, (WEIGHT, 1.0, apo.Dense), ValueError, "`structure` must act on one param"),
        (apo.Stacked, (WEIGHT, 1.0, len), TypeError, "`structure` must be a class of precond"),
    ],
)
def test_bad_options(
    structure: type[apo.Preconditioner],
    arguments: tuple[object, ...],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        structure(*arguments)


@pytest.mark.parametrize("structure", [case.structure for case in CASES.values()], ids=list(CASES))
@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf")])
def test_the_scale_is_checked(structure: type[apo.Preconditioner], scale: float) -> None:
    with pytest.raises(ValueError, match=r"`initial_scale` must be positive and finite .*, got"):
        structure(WEIGHT, scale)
