"""Runs of this machine: each has a supervisor process of its own, detached from the process that called `create()`."""

import contextlib
import os
import shlex
import signal
from collections.abc import Mapping, Sequence

import psutil

from tundish.base.files import is_held
from tundish.base.processes import ProcessId, command_lines, start, stop_all, stop_tree
from tundish.base.run_folder import RunFolder
from tundish.base.text import counted
from tundish.errors import FailureCause, RequestError
from tundish.launch import devices
from tundish.launch.command import node_script, supervisor_command, train_environment
from tundish.launch.contract import Health, Life, Restart
from tundish.plan.compute import Compute, count_gpus

RECORD = ProcessId
STARTS_ALL_NODES = False
SERVICE = ""
NAMED_RUNS = 3
"""Of those that a run waits for, in one sentence."""


def health() -> Health:
    """See Launcher."""
    return Health("ok", "this machine")


def problems(compute: Compute) -> list[str]:
    """More nodes or GPUs than this machine has."""
    problems: list[str] = []
    if compute.nodes > 1:
        problems.append(
            f"compute: nodes is {compute.nodes}, but a run on this machine uses one. With Slurm, add launcher 'slurm'; "
            "without, `tundish render --launch` prints a script to start on each host."
        )
    if compute.device == "gpu" and compute.devices_per_node > (gpus := count_gpus()):
        problems.append(
            f"compute: devices_per_node is {compute.devices_per_node}, but this machine has "
            f"{counted(gpus, 'GPU')} to give. Ask for fewer, or for device 'cpu'."
        )
    return problems


def submit(run: RunFolder, compute: Compute) -> None:
    """Take a place in the queue for the devices, and start the supervisor, which waits in it."""
    # In this process's name until the supervisor exists: the order of calls is the order of the queue.
    devices.enter(run.name, compute, ProcessId.of(os.getpid()))
    process = start(supervisor_command(run), run.log("supervisor"), {}, run.folder, detached=True)
    try:
        _record(run, compute, ProcessId.of(process.pid))
    except BaseException:
        with contextlib.suppress(psutil.NoSuchProcess):
            stop_tree(psutil.Process(process.pid), grace_s=0)
        raise


def record_supervisor(run: RunFolder, compute: Compute) -> None:
    """Record this process as the run's supervisor."""
    _record(run, compute, ProcessId.of(os.getpid()))


def _record(run: RunFolder, compute: Compute, supervisor: ProcessId) -> None:
    run.write_supervisor("local", supervisor)
    devices.enter(run.name, compute, supervisor)


def adopt(run: RunFolder) -> None:
    """Nothing: a supervisor records itself as soon as it starts."""


def may_have(run: RunFolder) -> bool:
    """Whether the run's supervisor is starting, though it may not have recorded itself yet."""
    return any(command[1:] == supervisor_command(run)[1:] for command in command_lines())


def state(run: RunFolder, record: ProcessId) -> Life:
    """From the process table and the queue."""
    if not record.is_here:
        # Of another machine's process, only the lock on the shared disk is visible here.
        return Life(alive=is_held(run.lock), cause=FailureCause.KILLED)
    if record.process() is None:
        return Life(alive=False, cause=FailureCause.KILLED)
    place = devices.place(run.name)
    # A supervisor that waits for no other run is about to take its devices.
    return Life(alive=True, waiting=_waiting(*place) if place is not None and place[1] else "")


def _waiting(position: int, others: list[str]) -> str:
    more = f" and {len(others) - NAMED_RUNS} more" if len(others) > NAMED_RUNS else ""
    return f"Waiting for devices: position {position} in the queue, behind {', '.join(others[:NAMED_RUNS])}{more}."


def cancel(run: RunFolder, record: ProcessId, seconds: float) -> None:
    """Ask the supervisor to end its stage and itself, and kill what is left."""
    if not record.is_here and is_held(run.lock):
        raise RequestError(
            f"{run.name} runs on {record.host}, and a process can be ended only on its own machine. Cancel it there."
        )
    if (process := record.process()) is not None:
        family = [process]
        try:
            family += process.children(recursive=True)
            process.send_signal(signal.SIGINT)
            process.wait(seconds)
        except psutil.NoSuchProcess:
            pass  # it exited by itself just now
        except psutil.TimeoutExpired:
            stop_tree(process, grace_s=0)
        stop_all(family, grace_s=0)  # processes that lost their parent are no longer its children
    devices.leave(run.name)


def wait_for_devices(run: RunFolder) -> Sequence[str]:
    """Wait for the run's turn in the queue, and until enough devices are free."""
    return devices.wait_for_devices(run.name)


def release_devices(run: RunFolder) -> None:
    """Leave the queue."""
    devices.leave(run.name)


def restart(stopped_by: signal.Signals, *, progressed: bool) -> Restart | None:
    """Nothing restarts a run after its machine has shut down: its user resumes it."""
    return None


def scripts(
    compute: Compute, run: RunFolder, address: str | None, port: int, environment: Mapping[str, str]
) -> dict[str, str]:
    """A script to start on each host."""
    variables = train_environment(compute, run, os.cpu_count() or 1) | dict(environment)
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    where = shlex.quote(f"Output of this host goes to {run.logs}, events to {run.events}.")
    return {
        f"node{node}.sh": f"#!/bin/bash\n# Host {node} of {compute.nodes}, counted from 0.\n{exports}echo {where}\n"
        + node_script(compute, run, rank=str(node), address=address or "127.0.0.1", port=str(port))
        for node in range(compute.nodes)
    }
