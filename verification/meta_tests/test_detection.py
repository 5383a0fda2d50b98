"""The errors that the detection limit is measured with, and the committed limits."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verification.claims import ROOT
from verification.detection.errors import (
    Error,
    Quantity,
    changed,
    code_with_hook,
    find,
    put,
    scaled_by,
    through_float32,
)
from verification.detection.quantities import ENGINE, QUANTITIES, REFERENCE
from verification.detection.report import STEM, TARGET, Limit, markdown, read, share_reached
from verification.mutation.__main__ import sources_of
from verification.mutation.mutants import Source


class Pair(NamedTuple):
    a: Any
    b: Any


@dataclass(frozen=True)
class Point:
    u: float
    kind: str


@pytest.mark.parametrize(
    ("value", "path", "expected"),
    [
        (2.0, (), 3.0),
        (2, (), 2),
        ("text", (), "text"),
        ((2.0, 4.0), (), (3.0, 6.0)),
        ((2.0, 4.0), (1,), (2.0, 6.0)),
        ([2.0, {"a": 4.0}], (1, "a"), [2.0, {"a": 6.0}]),
        (Pair(2.0, [4.0]), (), Pair(3.0, [6.0])),
        (Pair(2.0, 4.0), ("b",), Pair(2.0, 6.0)),
        ((Pair(2.0, 4.0), 8.0), (0, "a"), (Pair(3.0, 4.0), 8.0)),
        (Point(2.0, "minimum"), ("u",), Point(3.0, "minimum")),
    ],
)
def test_the_error_is_where_the_path_leads(
    value: object, path: tuple[int | str, ...], expected: object
) -> None:
    found = changed(value, path, scaled_by(0.5))
    assert found == expected
    assert type(found) is type(expected)


def test_arrays_and_tensors_are_scaled_and_integers_stay() -> None:
    assert np.array_equal(changed(np.array([2.0, 4j]), (), scaled_by(0.5)), [3.0, 6j])
    assert changed(torch.tensor([2.0]), (), scaled_by(0.5)).tolist() == [3.0]
    assert changed(np.array([2]), (), scaled_by(0.5)).tolist() == [2]
    assert changed(torch.tensor([2]), (), scaled_by(0.5)).tolist() == [2]


@given(value=st.floats(-1e30, 1e30))
def test_through_float32_is_the_nearest_single(value: float) -> None:
    """The dtype stays double; the value is what C's float holds."""
    nearest = np.float64(np.float32(value))
    for given_value in (value, np.array([value]), torch.tensor([value], dtype=torch.float64)):
        found = through_float32(given_value)
        assert float(np.asarray(found).reshape(())) == nearest
        assert np.asarray(found).dtype == np.float64


@given(epsilon=st.floats(-0.5, 0.5), x=st.floats(-10, 10))
def test_an_error_of_the_derivative_leaves_the_value(epsilon: float, x: float) -> None:
    error = Error(Quantity("q", "m:f", of="derivative"))
    error.change = scaled_by(epsilon)
    theta = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = error.on(theta.square())
    value.backward()
    assert value.item() == x * x
    assert theta.grad is not None
    assert math.isclose(theta.grad.item(), 2 * x * (1 + epsilon), rel_tol=1e-15)  # 4 roundings


def test_the_hook_is_on_the_functions_own_returns(tmp_path: Path) -> None:
    path = tmp_path / "toy.py"
    path.write_text(
        "def f(x):\n    def g():\n        return 1.0\n    h = lambda: 1.0\n"
        "    if x < 0:\n        return\n    return g() + h() + x\n"
    )
    space: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), space)
    f = space["f"]
    assert isinstance(f, FunctionType)
    error = put(Quantity("q", "toy:f"), [Source(path, tmp_path)], [f])
    assert f(1.0) == 3.0
    error.change = scaled_by(1.0)
    assert f(1.0) == 6.0  # once, and not on what is inside
    assert f(-1.0) is None


SOURCES = sources_of(["apo_core", "reference"], ROOT)


@pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda quantity: quantity.name)
def test_the_quantities_are_there(quantity: Quantity) -> None:
    source, name, first = find(quantity, SOURCES)
    assert code_with_hook(source, name, first).co_qualname == name


def test_the_quantities_are_many_and_have_names_of_their_own() -> None:
    assert min(len(ENGINE), len(REFERENCE)) >= 40
    assert len({quantity.name for quantity in QUANTITIES}) == len(QUANTITIES)


def test_a_target_that_is_not_there_is_refused() -> None:
    with pytest.raises(LookupError, match="`target` must name a function of the sources, got 'm:f"):
        find(Quantity("q", "m:f"), SOURCES)


def test_the_committed_limits_are_of_every_quantity_and_reach_the_target() -> None:
    run, limits = read(ROOT / STEM)
    assert [(m.name, m.target, m.of) for m in limits] == [(q.name, q[1], q.of) for q in QUANTITIES]
    assert share_reached(limits) >= 0.95
    assert all(limit.reached or limit.reason for limit in limits)
    assert (ROOT / STEM).with_suffix(".md").read_text(encoding="utf-8") == markdown(limits, run)


def test_a_limit_counts_up_to_the_target() -> None:
    def limit(value: float | None) -> Limit:
        return Limit("q", "m:f", "value", value, None, None, 0)

    assert share_reached([limit(v) for v in (None, 1e-6, TARGET, 1e-12)]) == 0.5


def test_a_loose_test_gives_a_coarse_limit(tmp_path: Path) -> None:
    """3e-7 lets 1e-8 pass and notices 1e-6; who fails without an error too has noticed none."""
    (tmp_path / "test_toy.py").write_text(
        "import torch\nimport apo_core as apo\n\ndef step():\n"
        "    P = apo.EKFAC(torch.zeros(2, 2, dtype=torch.float64))\n"
        "    return P(torch.ones(2, 2, dtype=torch.float64)).sum().item() / 4\n\n"
        "def test_the_code():\n"
        "    step()\n    names = apo.EKFAC.forward.__code__.co_names\n"
        "    assert not any('error' in name for name in names)\n\n"
        "def test_the_value():\n    assert abs(step() - 1) < 3e-7\n"
    )
    options = {
        "--only": "apply of EKFAC",
        "--tests": str(tmp_path),
        "--selection": str(tmp_path / "selection.json"),
        "--report": str(tmp_path / "report"),
    }
    arguments = [word for pair in options.items() for word in pair]
    done = subprocess.run(
        [sys.executable, "-m", "verification.detection", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _, (limit,) = read(tmp_path / "report")
    assert limit.limit == 1e-6
    assert limit.test is not None
    assert limit.test.endswith("::test_the_value")
    assert limit.float32 is None  # ones are exact in float32
