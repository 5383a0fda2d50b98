"""The benchmark of a step's cost: what it counts, how it weighs the pieces, and what it shows."""

from __future__ import annotations

import gc
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments import overhead
from experiments.contenders import ENTRIES, Task, installed, shares
from experiments.metering import LEAST_ROUNDS, PeakBytes, interleaved, products
from experiments.overhead import Overhead
from experiments.records import Record, read_records
from experiments.registry import experiments
from experiments.runner import record_folder, run_experiment
from experiments.watch import LineWatch

WIDTHS = (7, 5, 4, 3)
BATCH = 6
SHOWN = ("sgd", "adamw", "apo-sgd", "apo-any", "apo-ekfac", "shampoo")


def task() -> Task:
    """A small network in float32."""
    torch.manual_seed(0)
    x, other = torch.randn(2, BATCH, WIDTHS[0])
    return Task(overhead._mlp(*WIDTHS), x, torch.randint(WIDTHS[-1], (BATCH,)), other)


def layers() -> list[tuple[int, int]]:
    """(in, out) of every layer."""
    return list(pairwise(WIDTHS))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """The records of some contenders at smoke scale."""
    out: Path = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overhead, "ENTRIES", {name: ENTRIES[name] for name in SHOWN})
        run_experiment(Overhead(), "smoke", out, LineWatch(lambda text: None))
    return list(read_records(record_folder(out, "smoke", "overhead")).values())


def test_it_is_registered() -> None:
    assert isinstance(experiments()["overhead"], Overhead)


def test_the_products_are_those_counted_by_hand() -> None:
    """2 a multiplication: F = Σ in·out an example, backward twice that less the first layer's."""
    forward = 2 * BATCH * sum(i * o for i, o in layers())
    step = 3 * forward - 2 * BATCH * WIDTHS[0] * WIDTHS[1]
    assert ENTRIES["sgd"].build(task()).products == {"step": step}
    for name in ("apo-sgd", "apo-adamw", "apo-any"):
        assert ENTRIES[name].build(task()).products == {"step": step, "meta": 2 * step + forward}
    # Bᵀ V, (Bᵀ V) A, B X, (B X) Aᵀ: two derivatives each, but none by V
    four = sum(4 * o * i * (o + i) for i, o in layers())
    back = sum(2 * (4 * o * i * i + 3 * o * o * i) for i, o in layers())
    assert ENTRIES["apo-ekfac"].build(task()).products == {
        "step": step + four,
        "meta": 2 * step + forward + four + back,
    }


def test_observing_K_FACs_factors_costs_their_products() -> None:
    """A of (in + 1)² and B of out², each a sum over the mini-batch."""
    counted = ENTRIES["apo-kfac"].build(task()).products
    factors = 2 * BATCH * sum((i + 1) ** 2 + o**2 for i, o in layers())
    assert counted["observed"] - counted["step"] == factors
    assert counted["renewed"] == counted["observed"]


@pytest.mark.parametrize("name", [name for name in ENTRIES if installed(name)])
def test_every_piece_runs_and_a_meta_step_leaves_the_parameters(name: str) -> None:
    work = task()
    contender = ENTRIES[name].build(work)
    for piece in ("step", "ten steps", "observed", "renewed"):
        if piece in contender.pieces:
            contender.pieces[piece]()
    if "meta" in contender.pieces:
        before = [p.detach().clone() for p in work.model.parameters()]
        contender.pieces["meta"]()
        assert all(map(torch.equal, before, work.model.parameters()))
    assert set(contender.products) in (set(), set(contender.pieces))


@pytest.mark.parametrize("name", [name for name in ENTRIES if installed(name)])
@pytest.mark.parametrize("interval", [10, 100])
def test_the_pieces_make_one_step(name: str, interval: int) -> None:
    """Ten steps count as ten; a meta-step comes on top."""
    parts = shares(ENTRIES[name].build(task()).pieces, interval)
    assert parts.pop("meta", 1 / interval) == 1 / interval
    steps = sum(share * (10 if piece == "ten steps" else 1) for piece, share in parts.items())
    assert steps == pytest.approx(1.0, rel=1e-15)


def test_K_FAC_observes_every_Kth_step_and_renews_its_bases_at_every_tenth_of_them() -> None:
    parts = shares(("step", "meta", "observed", "renewed"), 20)
    expected = {"step": 0.95, "meta": 0.05, "observed": 0.045, "renewed": 0.005}
    assert parts == pytest.approx(expected, rel=1e-15)


def test_pieces_run_in_turn_and_the_first_round_is_not_timed() -> None:
    seen: list[str] = []
    pieces = {name: lambda name=name: seen.append(name) for name in "ab"}
    times = interleaved(pieces, rounds=4, seconds=60.0)
    assert "".join(seen) == "ab" * 5
    assert [len(one) for one in times.values()] == [4, 4]
    assert all(second >= 0.0 for one in times.values() for second in one)
    assert len(interleaved(pieces, rounds=100, seconds=0.0)["a"]) == LEAST_ROUNDS


def test_the_peak_is_that_of_what_lives_at_once() -> None:
    given = torch.zeros(1000)
    gc.collect()
    with PeakBytes() as memory:
        first = given + 1  # 4,000 bytes
        first.add_(1)
        second = given.view(10, 100) + 1
        del second
        third = torch.zeros(500, dtype=torch.float64)
        del first, third
    assert memory.peak == 8000


def test_products_are_counted_in_forward_and_backward_passes() -> None:
    layer, x = nn.Linear(5, 3), torch.randn(4, 5)
    assert products(lambda: layer(x)) == 2 * 4 * 5 * 3
    assert products(lambda: layer(x).sum().backward()) == 2 * (2 * 4 * 5 * 3)


def test_no_trial_fails_and_all_is_finite(smoke: list[Record]) -> None:
    assert [record.error for record in smoke if record.error] == []
    assert all(record.status == "finished" for record in smoke)
    assert len(smoke) == 2 * len(SHOWN)


def test_the_cost_at_K_is_a_step_and_a_Kth_of_a_meta_step(smoke: list[Record]) -> None:
    (run,) = [one for one in smoke if one.trial.name == "mlp-apo-sgd-seed0"]
    bars = {bar.interval: bar for bar in overhead._bars("mlp", [run])}
    assert list(bars) == [10, 20, 50, 100]
    step, meta, reference = (Tensor(run.curve(name)) for name in ("step", "meta", "reference"))
    for interval, bar in bars.items():
        expected = float(((step + meta / interval) / reference).quantile(0.5))
        assert bar.median == pytest.approx(expected, rel=1e-5)
        assert bar.low <= bar.median <= bar.high
        assert bar.by_products == pytest.approx(1.0 + run.metric("products of meta") / interval)
    assert bars[10].rounds == len(step)


def test_the_table_tells_every_bar_and_the_figure_shows_it(smoke: list[Record]) -> None:
    experiment = Overhead()
    rows = experiment.table(smoke)
    assert rows == experiment.table(smoke[::-1])
    assert len(rows) == 2 * (len(SHOWN) + 3)  # APO-SGD at four K
    assert any("LearningRate" in row.label and "torch AdamW" in row.ours for row in rows)
    figure = Figure()
    experiment.draw(smoke, figure)
    for axes in figure.axes:
        assert len(axes.patches) == len(rows) // 2
        assert len(axes.get_yticklabels()) == len(rows) // 2
        assert axes.get_lines()
        assert axes.get_xscale() == "log"
    assert "by products 1.24" in experiment.verdict(smoke)


def test_a_contender_that_failed_is_left_out(smoke: list[Record]) -> None:
    some = [record for record in smoke if record.options["contender"] != "sgd"]
    labels = [row.label for row in Overhead().table(some)]
    assert "MLP: torch SGD" not in labels
    assert "MLP: APO-Precond, EKFAC, K = 10" in labels
