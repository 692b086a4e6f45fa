"""Worker processes: for work on several CPUs, and for foreign input, which is handled in them with limits.

Chat templates, tokenizers and damaged data can use unlimited time and memory, or crash the process that handles them.
In a worker, that becomes an error with one sentence: `guarded` runs one function in a process, `Workers` run many tasks
in several. In them, `limited` sets how much a piece of work may use.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

from tundish.base.processes import die_with
from tundish.base.progress import Bars, Progress
from tundish.errors import FailureCause, InputError, StageError, WorkerError

Result = TypeVar("Result")
MEMORY_BYTES = 4 << 30
"""Default limit for a piece of work. A text file of the largest size takes three quarters of it."""
AHEAD = 2
"""Tasks that a worker is given at a time: while it does one, the next is already there."""
QUIT_SECONDS = 3.0
"""Time for a process that is asked to end, to remove half-written files."""


class Doing(NamedTuple):
    """What a process is working on, and its limits."""

    what: object
    """Its name in an error; for a sample, its number in its chunk."""
    seconds: float | None
    memory: int


_NOTHING = Doing("the data", None, MEMORY_BYTES)
_starter: Connection | None = None
"""The pipe to the parent; None in a process that was not started here."""
_allowed = MEMORY_BYTES
"""Bytes of memory that the current work of this process may use."""


@contextmanager
def limited(what: object, seconds: float | None = None, memory: int | None = None) -> Iterator[None]:
    """Limit what the block may use; a process that uses more ends, and its parent raises the error.

    A process that was not started here is not limited: it is Spark's, or a test's.

    Args:
        what: what the block works on, for the error.
        seconds: of CPU time, so that a busy machine does not end it.
        memory: bytes in addition to what the process already uses; None: MEMORY_BYTES.
    """
    if _starter is None:
        yield
        return
    global _allowed
    _allowed = memory = MEMORY_BYTES if memory is None else memory
    _starter.send(("doing", Doing(what, seconds, memory)))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    # Not RLIMIT_AS: it also counts what libraries map and never touch.
    most = min([_data_bytes() + memory, *(limit for limit in before if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_DATA, (most, before[1]))
    # SIGPROF has no handler here, so it also ends a process that is inside of C or Rust code.
    signal.setitimer(signal.ITIMER_PROF, seconds or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def took_memory(memory: int | None = None) -> str:
    """The end of an error's sentence on work that took more than `memory` bytes; None: the latest limit."""
    return f"took more than {(memory or _allowed) / (1 << 30):.2g} GiB of memory"


def _data_bytes() -> int:
    """Memory of this process that counts toward RLIMIT_DATA."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmData:")[2].split()[0]) << 10


def guarded(
    function: Callable[..., Result], *arguments: Any, progress: Bars | None = None, tables: bool = False
) -> Result:
    """Call a function in a separate process, and return its result.

    The process is forked, unless the function reads Delta tables or object stores and this process has loaded their
    clients, whose threads do not exist in a forked process. Then a new interpreter is started.

    Args:
        function: its result or error must be picklable; with `tables`, function and arguments too.
        arguments: of the function.
        progress: if given, the function is called with `progress=…`, whose bars are drawn by this process.
        tables: whether it may read Delta tables or object stores.

    Raises:
        WorkerError: the process exited without a result, or exceeded a limit.
    """
    # What libraries print before they crash belongs in the error, not on the terminal.
    with tempfile.TemporaryFile() as words:
        named = {} if progress is None else {"progress": _remote_bar}
        loaded = "deltalake" in sys.modules or "obstore" in sys.modules
        worker = _Worker((function, arguments, named), words.fileno(), forked=not (tables and loaded))
        try:
            with ExitStack() as bars:
                report: Callable[..., None] | None = None
                while True:
                    kind, *content = worker.receive()
                    if kind == "bar" and progress is not None:
                        report = bars.enter_context(progress(*content))
                    elif kind == "report" and report is not None:
                        report(*content)
                    elif kind == "end of bar":
                        bars.close()
                    elif kind in _ANSWERS:
                        result = worker.result(kind, content, words.fileno())
                        break
        finally:
            worker.stop(QUIT_SECONDS)
        words.seek(0)
        sys.stderr.write(words.read().decode(errors="replace"))
        return result


@contextmanager
def _remote_bar(title: str) -> Iterator[Progress]:
    starter = cast(Connection, _starter)
    starter.send(("bar", title))
    yield lambda done, total: starter.send(("report", done, total))
    starter.send(("end of bar",))


class Workers:
    """Runs a function over many tasks, several at once; results come in the order of the tasks.

    Workers are forked, so that what this process has loaded (tokenizer, Streaming) need not be loaded again. They end
    with this process, even if it is killed.
    """

    def __init__(self, count: int | None = None) -> None:
        import joblib

        # Honors the limits of containers.
        self.count = count or joblib.cpu_count()
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop(0)
        self._workers.clear()

    def map(
        self,
        function: Callable[..., Result],
        tasks: Iterable[tuple[Any, ...]],
        again: Callable[..., Result] | None = None,
    ) -> Iterator[Result]:
        """Results in the order of the tasks; few tasks are in progress at a time, so memory stays bounded.

        Args:
            function: called with each task; picklable, as tasks and results are.
            tasks: its arguments.
            again: repeats a task in place of `function` if that crashed its process or exceeded a limit.

        Raises:
            WorkerError: a worker crashed or exceeded a limit; all results before that task's have been returned.
        """
        waiting = ((number, task, again is None) for number, task in enumerate(tasks))
        busy = dict[_Worker, deque[_Task]]()
        done = dict[int, Callable[[], Result]]()
        next_number = 0
        try:
            task = next(waiting, None)
            while task is not None or busy or done:
                while task is not None and task[0] < next_number + 3 * self.count and (worker := self._free(busy)):
                    worker.submit(function, task[1])
                    busy.setdefault(worker, deque()).append(task)
                    task = next(waiting, None)
                by_pipe = {worker.pipe: worker for worker in busy}
                for pipe in wait(list(by_pipe)):
                    worker = by_pipe[cast(Connection, pipe)]
                    kind, *content = worker.receive()
                    if kind not in _ANSWERS:
                        continue
                    number, arguments, last = busy[worker].popleft()
                    left = list(busy[worker])
                    if kind in _LOST or not left:
                        del busy[worker]
                    if kind in _LOST:
                        self._workers.remove(worker)
                        worker.stop(0)
                        repeated = [] if again is None or last else [(again, (number, arguments, True))]
                        for what, one in [*repeated, *((function, one) for one in left)]:
                            other = self._start()
                            other.submit(what, one[1])
                            busy[other] = deque([one])
                    if kind in _LOST and not last:
                        _last_words(2)  # drops the output of the crash: the task is repeated
                    if kind not in _LOST or last:
                        done[number] = lambda worker=worker, kind=kind, content=content: worker.result(kind, content)
                while next_number in done:
                    yield done.pop(next_number)()
                    next_number += 1
        finally:
            for worker in busy:
                self._workers.remove(worker)
                worker.stop(0)

    def _free(self, busy: "dict[_Worker, deque[_Task]]") -> "_Worker | None":
        """A worker that can take another task, a new one if there are too few; None if all have enough."""
        least = min(self._workers, key=lambda worker: len(busy.get(worker, ())), default=None)
        if least is None or (least in busy and len(self._workers) < self.count):
            return self._start()
        return least if len(busy.get(least, ())) < AHEAD else None

    def _start(self) -> "_Worker":
        worker = _Worker()
        self._workers.append(worker)
        return worker


_Task = tuple[int, tuple[Any, ...], bool]
"""Number, arguments, and whether the task fails if its process is lost; otherwise it is repeated."""
_LOST = ("ended", "memory")
_ANSWERS = ("result", "error", *_LOST)


class _NewProcess:
    """A new interpreter, with the part of `multiprocessing.Process` that is used here.

    Not multiprocessing's `spawn`, which would run the caller's script again.
    """

    def __init__(self, pipe: Connection, errors: int) -> None:
        script = "import sys; from tundish.base.workers import serve_anew; serve_anew(*map(int, sys.argv[1:]))"
        command = [sys.executable, "-P", "-W", "ignore", "-c", script, str(pipe.fileno()), str(os.getpid())]
        with one_thread_each():
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=errors, pass_fds=[pipe.fileno()], env=dict(os.environ)
            )
        self.terminate, self.kill = self._process.terminate, self._process.kill

    @property
    def exitcode(self) -> int | None:
        """See multiprocessing.Process."""
        return self._process.poll()

    def join(self, seconds: float | None = None) -> None:
        """See multiprocessing.Process."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)


def serve_anew(pipe: int, parent: int) -> None:
    """The main function of a `_NewProcess`: does one task."""
    _serve(Connection(pipe), parent, None, 2, once=True)


class _Worker:
    """A worker process, and the pipe to it."""

    def __init__(
        self,
        task: "tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None" = None,
        errors: int = 2,
        *,
        forked: bool = True,
    ) -> None:
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        self.pipe = cast(Connection, here)
        """Readable when there is something to receive."""
        self.doing = _NOTHING
        self._process: Any
        if forked:
            self._process = context.Process(target=_serve, args=(there, os.getpid(), task, errors))
            with warnings.catch_warnings(), one_thread_each():
                # Python 3.12 warns of forking with any thread, those of numpy's BLAS too. The workers use no lock of
                # such a thread: they run tiktoken, tokenizers and numpy's copying.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._process.start()
        else:
            self._process = _NewProcess(cast(Connection, there), errors)
            self.pipe.send(task)
        there.close()

    def submit(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        """Queue a function call."""
        try:
            self.pipe.send((function, arguments, {}))
        except OSError:  # it was killed, which `receive` reports
            pass

    def receive(self) -> tuple[Any, ...]:
        """The next message; one of _ANSWERS is the last of a task."""
        while True:
            try:
                kind, *content = self.pipe.recv()
            except (EOFError, OSError):
                self._process.join()
                return ("ended",)
            if kind != "doing":
                self.doing = _NOTHING if kind in ("result", "error") else self.doing
                return kind, *content
            self.doing = content[0]
            if not self.pipe.poll():
                return kind, *content

    def result(self, kind: str, content: list[Any], errors: int = 2) -> Any:
        """The result in an answer; raises the error if it is one."""
        if kind == "result":
            return content[0]
        raise content[0] if kind == "error" else self._lost(kind, errors)

    def _lost(self, kind: str, errors: int) -> StageError:
        code, words = self._process.exitcode, _last_words(errors)
        what, seconds, memory = self.doing
        if kind == "ended" and code == -signal.SIGKILL:
            return WorkerError(
                "a process that prepares data was killed by SIGKILL, most likely by the out-of-memory killer (check "
                "dmesg). Use a machine with more memory, or fewer CPUs (taskset).",
                failure=FailureCause.HOST_OUT_OF_MEMORY,
            )
        if kind == "memory" or "memory allocation of" in words:
            cause = took_memory(memory)
        elif code == -signal.SIGPROF:
            cause = f"took more than {seconds:.2g} s of CPU time"
        else:
            name = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
            cause = f"crashed its process ({name}{': ' * bool(words)}{words})"
        return WorkerError(f"{what} {cause}. Check what it is and where it comes from.", what, cause)

    def stop(self, seconds: float) -> None:
        """End the process: by SIGTERM if it is given seconds, then by SIGKILL."""
        self.pipe.close()
        if seconds:
            self._process.terminate()
            self._process.join(seconds)
        self._process.kill()
        self._process.join()


def _last_words(errors: int) -> str:
    """The last line of the file to which a process wrote its errors; empty if they went to a terminal.

    In a worker, the file is emptied: what is left at the end are warnings for the user.
    """
    try:
        end = os.pread(errors, 4096, max(0, os.fstat(errors).st_size - 4096))
        if _starter is not None:
            os.ftruncate(errors, 0)
            os.lseek(errors, 0, os.SEEK_SET)
    except OSError:
        return ""
    lines = [line for line in end.decode(errors="replace").splitlines() if line.strip()]
    relevant = [line for line in lines if "memory allocation of" in line] or lines
    return relevant[-1].strip()[:200] if relevant else ""


def _serve(pipe: Connection, parent: int, task: Any, errors: int, *, once: bool = False) -> None:
    """The main function of a worker: does one task, or tasks until its parent ends it."""
    global _starter
    die_with(parent)
    # Ctrl-C interrupts the parent, which then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    once = once or task is not None
    signal.signal(signal.SIGTERM, _quit if once else signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    faulthandler.disable()  # a crash becomes an error of the parent, not a trace on the terminal
    if errors != 2:
        os.dup2(errors, 2)
    _starter = pipe
    if once:
        pipe.send(_answer(*(task or pipe.recv())))
        return
    # Tasks are read while others are done; otherwise both ends of the pipe could wait for each other.
    tasks = SimpleQueue[Any]()
    threading.Thread(target=_read, args=(pipe, tasks), daemon=True).start()
    while True:
        pipe.send(_answer(*tasks.get()))


def _read(pipe: Connection, tasks: "SimpleQueue[Any]") -> None:
    try:
        while True:
            tasks.put(pipe.recv())
    except BaseException:  # the parent has closed the pipe, or there is no memory for the task
        os._exit(1)


def _quit(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    try:
        return "result", function(*arguments, **named)
    except MemoryError:
        return ("memory",)
    except Exception as error:
        if not isinstance(error, InputError) and not hasattr(error, "__notes__"):
            error.add_note("".join(traceback.format_exception(error)))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return "error", StageError("".join(traceback.format_exception_only(error)).strip())
        return "error", error


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Keep `tokenizers` from starting one thread per CPU in each process that is forked in the block."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


@contextmanager
def no_collection() -> Iterator[None]:
    """Turn off Python's garbage collector, which would repeatedly scan hundreds of thousands of live objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
