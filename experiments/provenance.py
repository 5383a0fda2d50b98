"""Where a record comes from: commit, versions and hardware, in words that name no machine."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import apo_core
from experiments.parallel import cores

CHECKOUT = Path(__file__).resolve().parent.parent
# The libraries whose code a trial may run through; absent ones are left out.
LIBRARIES = (
    "numpy",
    "scipy",
    "scikit-learn",
    "curvlinops-for-pytorch",
    "pytorch-optimizer",
    "mechanic-pytorch",
    "momo-opt",
    "ray",
)


@dataclass(frozen=True)
class Provenance:
    """What a result depends on beside options and seed.

    Attributes:
        commit: Hash of the checkout's commit, "unknown" outside a checkout.
        dirty: Whether the checkout differed from that commit; None where the commit is unknown.
        versions: Version by distribution, with "python" among them.
        hardware: General words, such as "2 CPU cores, 1 thread" or a CUDA device's model.
    """

    commit: str
    dirty: bool | None
    versions: dict[str, str]
    hardware: str


def provenance(
    device: str = "cpu", checkout: Path = CHECKOUT, *, threads: int | None = None
) -> Provenance:
    """The provenance of what runs on that torch device, with so many threads, or this process's."""
    commit, dirty = _commit(checkout)
    hardware = _hardware(torch.device(device), threads or torch.get_num_threads())
    return Provenance(commit, dirty, _versions(), hardware)


def _commit(checkout: Path) -> tuple[str, bool | None]:
    top = _git(checkout, "rev-parse", "--show-toplevel")
    # A copy that lies inside someone else's repository must not take that repository's commit.
    if top is None or Path(top).resolve() != checkout.resolve():
        return "unknown", None
    commit = _git(checkout, "rev-parse", "--verify", "HEAD")
    changes = _git(checkout, "status", "--porcelain")
    return (commit, bool(changes)) if commit and changes is not None else ("unknown", None)


def _git(checkout: Path, *arguments: str) -> str | None:
    """What git prints, or None where there is no git or it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "apo-core": apo_core.__version__,
    }
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _hardware(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_counted(cores(), 'CPU core')}, {_counted(threads, 'thread')}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
