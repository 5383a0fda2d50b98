"""Judge a mutant in a fresh process, its module changed before anything imports it.

A fork shares what the tests' modules computed when they were imported (cases, closures, caches),
and a mutant that only shows there would survive in it. So survivors get this second trial.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import final

import pytest

from verification.mutation.mutants import Mutant, Source
from verification.mutation.suite import Suite

AT_IMPORT = "at import"


@final
class MutatedModule(MetaPathFinder, Loader):
    """Imports one module with one mutant in it.

    Args:
        source: the module.
        mutant: of the module.
    """

    def __init__(self, source: Source, mutant: Mutant) -> None:
        self.name = source.file.removesuffix(".py").replace("/", ".")
        self._path = source.path
        self._code = source.module(mutant)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Of this module alone."""
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self._path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        """Run the changed code."""
        exec(self._code, vars(module))


def cold_failure(mutant: Mutant, tests: Sequence[tuple[pytest.Item, float]]) -> str | None:
    """The first test that fails in a fresh process, `AT_IMPORT`, or None.

    A test that hangs there ends this process as well, by SIGALRM.
    """
    order = [(item.nodeid, seconds) for item, seconds in tests]
    files = sorted({str(item.path) for item, _ in tests})
    done = subprocess.run(
        [sys.executable, "-m", "verification.mutation.cold", mutant.file, mutant.key],
        input=json.dumps({"order": order, "files": files}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == -signal.SIGALRM:
        os.kill(os.getpid(), signal.SIGALRM)
    last = done.stdout.strip().splitlines()[-1:]
    return json.loads(last[0]) if done.returncode == 0 and last else AT_IMPORT


def main(file: str, key: str) -> None:
    """Print the first failure as JSON, the last line of the output."""
    root = Path.cwd()
    source = Source(root / file, root)
    mutant = next(mutant for mutant in source.mutants if mutant.key == key)
    given = json.load(sys.stdin)
    sys.meta_path.insert(0, MutatedModule(source, mutant))
    found: list[str | None] = []

    def work(suite: Suite, items: list[pytest.Item]) -> None:
        by_id = {item.nodeid: item for item in items}
        order = [(by_id[name], seconds) for name, seconds in given["order"] if name in by_id]
        missing = len(order) < len(given["order"])  # a mutant that changes the cases is seen
        found.append(AT_IMPORT if missing else suite.first_failure(order))

    Suite.collect(given["files"], work)
    print(json.dumps(found[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
