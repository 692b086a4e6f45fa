"""Processes of this machine: started with a log, identified reliably, stopped with everything that they started."""

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
    """Identifies a process: a later one with the same PID, or one of another machine, has another ProcessId."""

    pid: int
    ticks: int
    """When it started, in the kernel's ticks since boot, which do not jump as the time of day does."""
    boot: str
    """The kernel's id of this boot."""
    host: str

    @classmethod
    def of(cls, pid: int) -> "ProcessId":
        """The process that has this PID now.

        Raises:
            FileNotFoundError: no process has it.
        """
        return cls(pid, _ticks(pid), _boot(), platform.node())

    @property
    def is_here(self) -> bool:
        """Whether it runs, or ran, on this machine; only then can its state be determined."""
        return self.host == platform.node()

    def process(self) -> psutil.Process | None:
        """The running process; None if it has exited or is of another machine."""
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
    """Field 22 of stat in proc(5); the process's name before it may contain spaces and parentheses."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def start(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    cwd: Path,
    *,
    detached: bool = False,
    ignore_stop: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a process whose output is appended to `log`.

    A `detached` process outlives this one; any other is killed by the kernel when this one dies, for any reason.
    With `ignore_stop` it ignores SIGTERM and SIGUSR1, which a system sends to all processes of a run at once.
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
            preexec_fn=None if detached else lambda: _prepare(parent, ignore_stop),
        )
    if detached:
        # Reaped when it exits, if this process is still alive then.
        threading.Thread(target=process.wait, daemon=True).start()
    return process


def _prepare(parent: int, ignore_stop: bool) -> None:
    """Runs in the new process, before its program is loaded."""
    die_with(parent)
    if ignore_stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def die_with(parent: int) -> None:
    """Have this process killed when `parent`, which started it, dies; at once if it has died already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def die_with_starter(variable: str) -> None:
    """Have this process killed when the process that started it dies, or at once if that has died already.

    Args:
        variable: of the environment. If it is set here, the starter has the same value; a process whose starter has
            died has another parent by now, and that one does not have it.
    """
    parent, value = os.getppid(), os.environ.get(variable)
    die_with(parent)
    try:
        lost = value is not None and psutil.Process(parent).environ().get(variable) != value
    except psutil.Error:  # the parent exited just now, or is another user's
        lost = True
    if lost:
        os._exit(1)


def processes_with(variable: str, value: str) -> list[psutil.Process]:
    """The user's processes, except this one, whose environment has this value of a variable."""
    processes: list[psutil.Process] = []
    for process in cast(Iterator[psutil.Process], cast(Any, psutil).process_iter()):
        try:
            if process.pid != os.getpid() and process.environ().get(variable) == value:
                processes.append(process)
        except (psutil.Error, OSError):
            continue  # it exited meanwhile, or is another user's
    return processes


def command_lines() -> Iterator[list[str]]:
    """The argv of every process that this user may inspect."""
    for process in cast(Iterator[psutil.Process], cast(Any, psutil).process_iter()):
        with contextlib.suppress(psutil.Error, OSError):  # it exited meanwhile, or is another user's
            yield process.cmdline()


def stop_tree(root: psutil.Process, *, grace_s: float = GRACE_SECONDS) -> None:
    """End a process and all its descendants: SIGTERM, and after `grace_s` seconds SIGKILL."""
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    stop_all(processes, grace_s=grace_s)


def stop_all(processes: Sequence[psutil.Process], *, grace_s: float = GRACE_SECONDS) -> None:
    """End processes: SIGTERM, and after `grace_s` seconds SIGKILL; with 0, SIGKILL at once."""
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
    """Delay Ctrl-C: the block runs to its end, then `error` is raised."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Ctrl-C interrupts only the main thread
        return
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)
    if interrupts:
        raise error
