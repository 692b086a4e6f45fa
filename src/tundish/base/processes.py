"""Processes of this machine: start with a log, tell apart, stop with everything that they have started."""

import contextlib
import ctypes
import os
import platform
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import psutil

from tundish.base.home import absolute_environment

GRACE_SECONDS = 4.0
PR_SET_PDEATHSIG = 1
"""Linux, prctl(2): the signal that a process gets when its parent dies."""


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that cannot be mistaken for a later one of the same number, nor for one of another machine."""

    pid: int
    ticks: int
    """Start, in the kernel's ticks since it booted: unlike the time of day, nobody sets it."""
    boot: str
    """The kernel's name for the time since it booted."""
    host: str

    @classmethod
    def of(cls, pid: int) -> "ProcessId":
        """The process that has this number now.

        Raises:
            FileNotFoundError: there is none.
        """
        return cls(pid, _ticks(pid), _boot(), platform.node())

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, of this machine: of others nothing can be told."""
        return self.host == platform.node()

    def process(self) -> psutil.Process | None:
        """The running process, or None when it has ended or is of another machine."""
        try:
            if not self.is_here or self.boot != _boot() or _ticks(self.pid) != self.ticks:
                return None
            process = psutil.Process(self.pid)
            return process if process.status() != psutil.STATUS_ZOMBIE else None
        except (psutil.NoSuchProcess, OSError):
            return None


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _ticks(pid: int) -> int:
    """Field 22 of proc(5)'s stat; the name before it may hold spaces and brackets."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def start(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    cwd: Path,
    *,
    detached: bool = False,
    deaf: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a process whose output is appended to `log`.

    A `detached` one outlives its starter; another one is killed by the kernel when its starter dies, however that dies.
    A `deaf` one does not end by SIGTERM or SIGUSR1, which a system sends to all processes of a run at once.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    parent = os.getpid()
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**absolute_environment(), **environment},
            cwd=cwd,
            start_new_session=detached,
            preexec_fn=None if detached else lambda: _prepare(parent, deaf),
        )
    if detached:
        # Reaped when it ends, should its starter still live by then.
        threading.Thread(target=process.wait, daemon=True).start()
    return process


def _prepare(parent: int, deaf: bool) -> None:
    """In the new process, before its program is loaded."""
    die_with(parent)
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def die_with(parent: int) -> None:
    """From now on this process is killed when `parent`, which has started it, dies; at once if it has died already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def die_with_starter(variable: str) -> None:
    """From now on this process is killed when the one dies that has started it, even if it did before this was called.

    Args:
        variable: of the environment, where it is set at all: whoever has started this process has the same value. A
            process that has lost its starter has been given another parent, and that one has not.
    """
    parent, value = os.getppid(), os.environ.get(variable)
    die_with(parent)
    try:
        lost = value is not None and psutil.Process(parent).environ().get(variable) != value
    except psutil.Error:  # gone, or somebody else's
        lost = True
    if lost:
        os._exit(1)


def processes_with(variable: str, value: str) -> list[psutil.Process]:
    """The user's processes in whose environment a variable has a value; not this one."""
    found: list[psutil.Process] = []
    for process in cast(Iterator[psutil.Process], cast(Any, psutil).process_iter()):
        try:
            if process.pid != os.getpid() and process.environ().get(variable) == value:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # ended meanwhile, or somebody else's
    return found


def command_lines() -> Iterator[list[str]]:
    """Of all processes that this user may look at."""
    for process in cast(Iterator[psutil.Process], cast(Any, psutil).process_iter()):
        with contextlib.suppress(psutil.Error, OSError):  # ended meanwhile, or somebody else's
            yield process.cmdline()


def stop_tree(root: psutil.Process, *, grace_s: float = GRACE_SECONDS) -> None:
    """End a process and all its descendants: first asked, then killed after `grace_s` seconds."""
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    stop_all(processes, grace_s=grace_s)


def stop_all(processes: Sequence[psutil.Process], *, grace_s: float = GRACE_SECONDS) -> None:
    """End processes: first asked, where `grace_s` seconds are given for it, then killed."""
    alive = list(processes)
    if grace_s > 0:
        for process in processes:
            _signal(process, kill=False)
        _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        _signal(process, kill=True)
    psutil.wait_procs(alive, timeout=GRACE_SECONDS)


def _signal(process: psutil.Process, *, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        return


@contextmanager
def interrupt_waits(error: KeyboardInterrupt) -> Iterator[None]:
    """Ctrl-C does not end what is done in this block, which belongs together; `error` is raised behind it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # it is the main thread that Ctrl-C ends
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)
    if came:
        raise error
