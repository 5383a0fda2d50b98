"""Configuration of the suite: profiles, the ledger. Nothing here needs torch."""

from __future__ import annotations

import secrets

import pytest
from hypothesis import settings

from verification import profiles

pytest_plugins = ["verification.ledger"]

profiles.register()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give a random run a seed that can be given back; workers inherit the option."""
    name = config.option.hypothesis_profile or settings.get_current_profile_name()
    random = not settings.get_profile(name).derandomize
    if random and config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(secrets.randbelow(2**32))


def pytest_report_header(config: pytest.Config) -> str:
    """Say the profile, and the seed of a random run."""
    seed = config.option.hypothesis_seed
    name = settings.get_current_profile_name()
    return f"properties: profile {name}" + (f", --hypothesis-seed={seed}" if seed else "")
