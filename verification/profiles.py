"""Hypothesis profiles: `quick` while working, `ci` repeatable, `random` and `thorough` not.

`random` draws as many examples as `ci`, by `--hypothesis-seed N`; `thorough` ten times as many.

Chosen by `--hypothesis-profile NAME`, else by the environment variable `APO_PROFILE`, else `ci`.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

DEFAULT = "ci"

# A shared machine's speed is no property of the code: neither deadlines nor slowness fail a test.
_SLOWNESS = (HealthCheck.too_slow,)


def register() -> None:
    """Register the profiles and load the one that the environment names.

    Raises:
        ValueError: `APO_PROFILE` names no profile.
    """
    settings.register_profile(
        "quick",
        max_examples=8,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=_SLOWNESS,
    )
    settings.register_profile(
        "ci",
        max_examples=40,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=_SLOWNESS,
    )
    settings.register_profile(
        "random",
        max_examples=40,
        deadline=None,
        database=None,
        derandomize=False,
        print_blob=True,
        suppress_health_check=_SLOWNESS,
    )
    settings.register_profile(
        "thorough",
        max_examples=400,
        deadline=None,
        derandomize=False,
        print_blob=True,
        suppress_health_check=_SLOWNESS,
    )
    name = os.environ.get("APO_PROFILE", DEFAULT)
    if name not in ("quick", "ci", "random", "thorough"):
        raise ValueError(
            f"`APO_PROFILE` must be quick, ci, random or thorough, got {name!r}; unset it."
        )
    settings.load_profile(name)


def share(fraction: float) -> settings:
    """Settings of a test whose examples are dear: `fraction` of the profile's, at least two."""
    examples = settings.get_profile(settings.get_current_profile_name()).max_examples
    return settings(max_examples=max(2, round(fraction * examples)))
