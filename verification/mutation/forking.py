"""One forked process a task: what it changes dies with it, and what it imported is shared."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

Task = TypeVar("Task")

# A mutant may ask for a matrix of any size: it gets an error, and the machine stays alive.
MEMORY = 16 * 2**30  # bytes of address space


class Outcome(NamedTuple):
    """What one task gave.

    Attributes:
        value: what `work` returned, or None.
        signal: that ended the process, 0 where it left without a value, or None.
        trouble: the exception that `work` raised, as a text, or what ended the process, or None.
        seconds: wall time.
    """

    value: Any
    signal: int | None
    trouble: str | None
    seconds: float


def forked(
    tasks: Iterable[Task],
    work: Callable[[Task], Any],
    jobs: int = 1,
    until: float = math.inf,
) -> Iterator[tuple[Task, Outcome]]:
    """Run `work(task)` of every task in a process of its own, `jobs` at a time.

    Args:
        tasks: in this order.
        work: gives something that can be pickled.
        jobs: processes at a time, at least 1.
        until: on `time.monotonic`'s clock; later, no task is begun.

    Yields:
        Each task with its outcome, as they come.
    """
    gc.collect()
    gc.freeze()  # else each child's first collection copies all that the parent has
    context = multiprocessing.get_context("fork")
    waiting = iter(tasks)
    running: dict[Connection, tuple[Task, Any, float]] = {}

    def begin() -> bool:
        if len(running) >= jobs or time.monotonic() >= until:
            return False
        for task in waiting:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(work, task, sender), daemon=True)
            process.start()
            sender.close()  # so that the child's death is the pipe's end
            running[receiver] = task, process, time.monotonic()
            return True
        return False

    while True:
        while begin():
            pass
        if not running:
            return
        for receiver in wait(list(running)):
            assert isinstance(receiver, Connection)
            task, process, start = running.pop(receiver)
            try:
                value, trouble = receiver.recv()
                ended_by = None
            except EOFError:
                process.join()
                ended_by = max(0, -(process.exitcode or 0))
                value, trouble = None, f"its process ended by signal {ended_by}"
            receiver.close()
            process.join()
            yield task, Outcome(value, ended_by, trouble, time.monotonic() - start)


def _child(work: Callable[[Task], Any], task: Task, sender: Connection) -> None:
    """Runs silently; leaves without the parent's exit handlers."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    try:
        answer = work(task), None
    except Exception:
        answer = None, traceback.format_exc()
    sender.send(answer)
    sender.close()
    os._exit(0)
