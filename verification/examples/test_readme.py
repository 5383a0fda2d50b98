"""The README's code runs as it stands there."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apo_core.testing import CHECKS

ROOT = Path(__file__).resolve().parents[2]


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


def test_the_training_loop_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(2, 100, 32, 8)
    y = (x @ torch.randn(8, 3)).argmax(-1)

    def loader(which: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(x[which], y[which], strict=True))

    names = {"model": model, "loader": loader(0), "fsd_loader": loader(1)}
    before = float(nn.functional.cross_entropy(model(x[0, 0]), y[0, 0]).detach())
    exec(blocks()[0], names)
    after = float(nn.functional.cross_entropy(model(x[0, 0]), y[0, 0]).detach())
    rate = float(names["rule"].lr)
    assert rate > 1e-2, f"the learning rate should have grown from 1e-3 by tenfold, got {rate}"
    assert after < 0.7 * before, f"the loss should have fallen by 30%, got {before} -> {after}"


def test_the_example_rule_is_the_one_that_is_tested() -> None:
    assert blocks()[1] == (ROOT / "verification/examples/softsign.py").read_text("utf-8")


def test_the_example_check_passes() -> None:
    names: dict[str, object] = {}
    exec("import torch\nimport apo_core.testing\n" + blocks()[1] + blocks()[2], names)
    test = names["test_softsign"]
    assert callable(test)
    test()


def test_the_example_of_one_test_a_check_is_parametrized() -> None:
    names: dict[str, Any] = {}
    exec("import torch\nimport apo_core.testing\n" + blocks()[1] + blocks()[3], names)
    (mark,) = names["test_softsign_conforms"].pytestmark
    assert len(mark.args[1]) == 2 * len(CHECKS)
    mark.args[1][0].values[0]()


def test_the_readme_counts_the_checks() -> None:
    assert f"The kit has {len(CHECKS)} checks" in (ROOT / "README.md").read_text("utf-8")
