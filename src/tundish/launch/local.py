"""Runs of this machine: each has a supervisor process of its own, detached from whoever has called `create()`."""

import contextlib
import json
import os
import signal
import sys
from dataclasses import asdict

import psutil

from tundish.base.files import is_held, write_atomic
from tundish.base.processes import ProcessId, command_lines, start, stop_all, stop_tree
from tundish.base.run_folder import RunFolder
from tundish.errors import RequestError
from tundish.launch import devices
from tundish.launch.contract import Life
from tundish.plan.compute import Compute

SUPERVISOR = ("-m", "tundish.supervise.supervisor")


def submit(paths: RunFolder, compute: Compute) -> None:
    """Take a place in the line for the devices, and start the supervisor, which waits in it."""
    devices.enter(paths.folder.name, compute, ProcessId.of(os.getpid()))
    command = [sys.executable, *SUPERVISOR, str(paths.folder)]
    process = start(command, paths.log("supervisor"), {}, paths.folder, detached=True)
    try:
        note(paths, compute, ProcessId.of(process.pid))
    except BaseException:
        with contextlib.suppress(psutil.NoSuchProcess):
            stop_tree(psutil.Process(process.pid), grace_s=0)
        raise


def is_starting(paths: RunFolder) -> bool:
    """Whether the run's supervisor is there, though it may not have noted itself yet."""
    return any(command[1:] == [*SUPERVISOR, str(paths.folder)] for command in command_lines())


def note(paths: RunFolder, compute: Compute, owner: ProcessId) -> None:
    """Keep who supervises the run. The supervisor does it too: whoever starts it may be killed in between."""
    write_atomic(paths.supervisor, json.dumps({"launcher": "local", **asdict(owner)}) + "\n")
    devices.enter(paths.folder.name, compute, owner)


def state(paths: RunFolder, owner: ProcessId) -> Life:
    """From the process table, and the line."""
    if not owner.is_here:
        # What it has written is all that can be told here, and whether it still holds its lock.
        return Life(alive=is_held(paths.lock))
    if owner.process() is None:
        return Life(alive=False)
    place = devices.place(paths.folder.name)
    return Life(alive=True, waiting="" if place is None else _waiting(*place))


def _waiting(position: int, others: list[str]) -> str:
    shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    behind = f": behind {shown}" if others else ""
    return f"Waits for its devices, number {position} in line{behind}."


def cancel(paths: RunFolder, owner: ProcessId, seconds: float) -> None:
    """Ask the supervisor to end its stage and itself, and kill what is left."""
    if not owner.is_here and is_held(paths.lock):
        text = f"{paths.folder.name} runs on {owner.host}; a process can only be ended on its own machine."
        raise RequestError(f"{text} Cancel it there.")
    if (process := owner.process()) is not None:
        _end(process, seconds)
    devices.leave(paths.folder.name)


def _end(process: psutil.Process, seconds: float) -> None:
    family = [process]
    try:
        family += process.children(recursive=True)
        process.send_signal(signal.SIGINT)
        process.wait(seconds)
    except psutil.NoSuchProcess:
        pass  # it has ended by itself, in this moment
    except psutil.TimeoutExpired:
        stop_tree(process, grace_s=0)
    stop_all(family, grace_s=0)
