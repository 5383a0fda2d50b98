"""Work in parallel processes, one thread each: items as workers are free, results as they come.

A worker that is killed takes no other item with it than its own. Where the system has it, workers
are forked from a server that has imported the slow libraries once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[int, int, str], None]

REPORT_EVERY = 0.1  # seconds between two messages of a process on its progress


class LostError(RuntimeError):
    """A process that ended without a result."""


def cores() -> int:
    """The CPU cores that this process may use, which a batch system may have narrowed."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return found or 1


def in_processes(
    work: Callable[[Item, Report], Result],
    items: Sequence[Item],
    jobs: int,
    *,
    preload: Sequence[str],
    started: Callable[[Item], None],
    progress: Callable[[Item, int, int, str], None],
) -> Generator[tuple[Item, Result | LostError], None, None]:
    """Each item with `work(item, report)`, in the order in which they end.

    Close the generator to kill what still runs; so does an exception, Ctrl-C among them. Where this
    process itself is killed, its processes end at once.

    Args:
        work: A function that can be pickled, as must be the items and the results.
        items: What it is called with, in this order.
        jobs: How many run at a time, at least 1.
        preload: The slow modules, which the server imports once.
        started: Called with each item as it starts.
        progress: Called with an item, and what its `report` was called with, now and then.
    """
    context = _context(preload)
    waiting = deque(items)
    workers: dict[Connection, BaseProcess] = {}
    running: dict[Connection, Item] = {}
    try:
        while waiting or running:
            idle = [worker for worker in workers if worker not in running]
            while waiting and len(running) < jobs:
                worker = idle.pop() if idle else _start(context, work, workers)
                running[worker] = item = waiting.popleft()
                worker.send(item)
                started(item)
            for worker in wait(list(running)):
                assert isinstance(worker, Connection)
                result = _received(worker, workers)
                if isinstance(result, tuple):
                    progress(running[worker], *result)
                else:
                    yield running.pop(worker), result  # pyright: ignore[reportReturnType]
    finally:
        for process in workers.values():
            process.kill()
        for worker, process in workers.items():
            process.join()
            worker.close()


def _context(preload: Sequence[str]) -> BaseContext:
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(list(preload))  # idle once the server runs
    return context


def _start(
    context: BaseContext, work: Callable, workers: dict[Connection, BaseProcess]
) -> Connection:
    """A worker more, by our end of its pipe."""
    ours, its = context.Pipe()
    process = context.Process(target=_worker, args=(work, its))  # pyright: ignore
    process.start()
    its.close()  # the process holds the only one, so that its death is seen
    workers[ours] = process
    return ours


def _received(worker: Connection, workers: dict[Connection, BaseProcess]) -> object:
    """The next message: a tuple on progress, or the result; an error where the worker ended."""
    try:
        return worker.recv()
    except (EOFError, ConnectionResetError):
        worker.close()
        process = workers.pop(worker)
        process.join()
        code = process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return LostError(f"the process of the trial {how}")


def _worker(work: Callable, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    told = -REPORT_EVERY

    def report(done: int, total: int, text: str) -> None:
        nonlocal told
        if time.monotonic() - told >= REPORT_EVERY:
            told = time.monotonic()
            pipe.send((done, total, text))

    while True:  # until the parent kills it
        pipe.send(work(pipe.recv(), report))


def _end_with_parent() -> None:
    """End this process where its parent is killed, which leaves it nobody to report to."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
