"""Processes that share the work of preparation; as many as this machine gives."""

import gc
import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from tundish.errors import StageError
from tundish.processes import die_with

Result = TypeVar("Result")


class Workers:
    """Runs a function over many tasks, in order; several at once when there is more than one task.

    Workers are forked, so that what this process has loaded (tokenizer, Streaming) is there at once. They end with it,
    however it ends.
    """

    def __init__(self, count: int | None = None) -> None:
        import joblib

        # Honours the limits of containers.
        self.count = count or joblib.cpu_count()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[..., Result], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
        """Results in the order of the tasks; few tasks are under way at a time, so memory stays bounded.

        Raises:
            StageError: a worker was killed.
        """
        waiting = iter(tasks)
        first = list(islice(waiting, 2))
        if self.count == 1 or len(first) < 2:
            yield from (function(*task) for tasks in (first, waiting) for task in tasks)
            return
        running: deque[Any] = deque()
        try:
            for tasks_left in (first, waiting):
                for task in tasks_left:
                    if len(running) >= 3 * self.count:
                        yield running.popleft().result()
                    running.append(self._started().submit(function, *task))
            while running:
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise StageError(
                "a process that prepares data was killed, most likely for want of memory. Give the machine more "
                "memory, or fewer processors to this process (taskset)."
            ) from error

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(self.count, context, _start_worker, (os.getpid(),))
            with warnings.catch_warnings(), one_thread_each():
                # Python 3.12 warns of any thread of the parent, those of numpy's BLAS too. The workers use no lock of
                # such a thread: they run tiktoken, tokenizers and numpy's copying.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._pool.submit(int).result()
        return self._pool


@contextmanager
def one_thread_each() -> Iterator[None]:
    """`tokenizers` would start as many threads in each process that is forked here as there are processors."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _start_worker(parent: int) -> None:
    die_with(parent)
    # The parent is interrupted, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's collector would look at hundreds of thousands of new objects again and again, none of them garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
