"""Processes of this machine: start with a log, wait, stop with everything that they have started."""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil

GRACE_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that cannot be mistaken for a later one of the same number."""

    pid: int
    started: float
    """Seconds since 1970, as the kernel tells."""

    @classmethod
    def of(cls, pid: int) -> "ProcessId":
        """The process that has this number now."""
        return cls(pid, psutil.Process(pid).create_time())

    def process(self) -> psutil.Process | None:
        """The running process, or None when it has ended."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1.0
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


def start(
    command: Sequence[str], log: Path, environment: Mapping[str, str], cwd: Path, *, detached: bool = False
) -> subprocess.Popen[bytes]:
    """Start a process whose output is appended to `log`; `detached` ones outlive their starter."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            cwd=cwd,
            start_new_session=detached,
        )


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


def stop_tree(root: psutil.Process, *, grace_s: float = GRACE_SECONDS) -> None:
    """End a process and all its descendants: first asked, then killed after `grace_s` seconds."""
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    stop_all(processes, grace_s=grace_s)


def stop_all(processes: Sequence[psutil.Process], *, grace_s: float = GRACE_SECONDS) -> None:
    """End processes: first asked, then killed after `grace_s` seconds."""
    for process in processes:
        _signal(process, kill=False)
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        _signal(process, kill=True)
    psutil.wait_procs(alive, timeout=grace_s)


def _signal(process: psutil.Process, *, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        return
