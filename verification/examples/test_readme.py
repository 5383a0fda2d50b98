"""The README's code runs as it stands there."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn

import apo_core as apo
from apo_core.testing import CHECKS

ROOT = Path(__file__).resolve().parents[2]


def blocks(heading: str) -> list[str]:
    """The Python under the heading, up to the next one."""
    text = (ROOT / "README.md").read_text("utf-8")
    (section,) = re.findall(
        rf"^#+ {heading}\n(.*?)(?=^## |^### |\Z)", text, re.DOTALL | re.MULTILINE
    )
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


RULE = blocks("Add an update rule")


def test_the_training_loop_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(2, 100, 32, 8)
    y = (x @ torch.randn(8, 3)).argmax(-1)

    def loader(which: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(x[which], y[which], strict=True))

    names = {"model": model, "loader": loader(0), "fsd_loader": loader(1)}
    before = float(nn.functional.cross_entropy(model(x[0, 0]), y[0, 0]).detach())
    exec(blocks("Train with it")[0], names)
    after = float(nn.functional.cross_entropy(model(x[0, 0]), y[0, 0]).detach())
    rate = float(names["rule"].lr)
    assert rate > 1e-2, f"the learning rate should have grown from 1e-3 by tenfold, got {rate}"
    assert after < 0.7 * before, f"the loss should have fallen by 30%, got {before} -> {after}"


def test_the_example_rule_is_the_one_that_is_tested() -> None:
    assert RULE[0] == (ROOT / "verification/examples/softsign.py").read_text("utf-8")


def test_the_example_check_passes() -> None:
    names: dict[str, object] = {}
    exec("import torch\nimport apo_core.testing\n" + RULE[0] + RULE[1], names)
    test = names["test_softsign"]
    assert callable(test)
    test()


def test_the_example_of_one_test_a_check_is_parametrized() -> None:
    names: dict[str, Any] = {}
    exec("import torch\nimport apo_core.testing\n" + RULE[0] + RULE[2], names)
    (mark,) = names["test_softsign_conforms"].pytestmark
    assert len(mark.args[1]) == 2 * len(CHECKS)
    mark.args[1][0].values[0]()


def test_the_readme_counts_the_checks() -> None:
    assert f"The kit has {len(CHECKS)} checks" in (ROOT / "README.md").read_text("utf-8")


def scene() -> dict[str, Any]:
    """The names that the guides take for granted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x, x_other, y = torch.randn(32, 8), torch.randn(32, 8), torch.randint(3, (32,))
    return {
        "torch": torch,
        "F": nn.functional,
        "functools": functools,
        "apo": apo,
        "model": model,
        "x": x,
        "y": y,
        "loss": lambda: nn.functional.cross_entropy(model(x), y),
        "outputs": lambda: model(x_other),
    }


def train(names: dict[str, Any], steps: int) -> None:
    """By what the guide has built."""
    optimizer = names["optimizer"]
    for _ in range(steps):
        optimizer.zero_grad()
        names["loss"]().backward()
        if optimizer.meta_due:
            optimizer.meta_step(loss=names["loss"], outputs=names["outputs"])
        optimizer.step()


@pytest.mark.parametrize("guide", ["A learning rate for any optimizer", "A preconditioner"])
def test_what_a_guide_builds_trains(guide: str) -> None:
    names = scene()
    before = float(names["loss"]().detach())
    for number, block in enumerate(blocks(guide)):
        exec(block, names)
        if number == 0:
            train(names, 200)
    assert float(names["loss"]().detach()) < 0.9 * before
    if guide == "A preconditioner":
        assert names["gap"] >= 0.0
        assert names["q"] - names["best"] == names["gap"]
    else:
        names["rule"].rules["rest"]


def test_the_guide_to_mixed_precision_takes_a_step() -> None:
    names = scene()
    exec(blocks("A learning rate for any optimizer")[0], names)
    exec(blocks("Mixed precision")[0], names)
    assert names["optimizer"].steps == names["optimizer"].meta_steps == 1


def test_the_guide_to_several_machines_runs_on_one(tmp_path: Path) -> None:
    names = scene()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        exec(blocks("Several machines")[0], names)
        train(names, 2)
    finally:
        torch.distributed.destroy_process_group()
    assert names["optimizer"].steps == 2
