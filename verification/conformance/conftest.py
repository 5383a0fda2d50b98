"""The option that puts a third party's rule under the deep suite."""

from __future__ import annotations

import importlib
from typing import cast

import pytest

from apo_core.testing import Build
from verification.conformance.own_rules import HANDFUL


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--rule PACKAGE.MODULE:NAME`."""
    parser.getgroup("conformance", "the conformance kit").addoption(
        "--rule",
        metavar="PACKAGE.MODULE:NAME",
        help="run the deep suite, and it alone, on this update rule: a class that is called with "
        "the model, or a function model -> rule that gives a class its other arguments",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Test a third party's rule thoroughly, unless another profile was asked for."""
    if config.getoption("--rule") and not config.option.hypothesis_profile:
        config.option.hypothesis_profile = "thorough"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give `build` the rule that was named, or a handful of the engine's."""
    if "build" not in metafunc.fixturenames:
        return
    name = metafunc.config.getoption("--rule")
    builds = {name: load(name)} if name else HANDFUL
    metafunc.parametrize("build", list(builds.values()), ids=list(builds))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--rule` leave out what is not about it."""
    if not config.getoption("--rule"):
        return
    kept = [item for item in items if "build" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def load(name: str) -> Build:
    """What `PACKAGE.MODULE:NAME` names.

    Raises:
        pytest.UsageError: there is no such module or name, or it cannot be called.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise pytest.UsageError(
            f"`--rule` must be PACKAGE.MODULE:NAME of a class or function that can be imported, "
            f"got {name!r} ({error}); is its folder in PYTHONPATH?"
        ) from error
    if not callable(found):
        raise pytest.UsageError(
            f"`--rule` must name a class or a function model -> rule, got {name!r}, a "
            f"{type(found).__name__}."
        )
    return cast(Build, found)
