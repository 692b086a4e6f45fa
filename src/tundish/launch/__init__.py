"""Launching: `submit`, `state` and `cancel` a run's supervisor, on this machine or by Slurm.

A run folder's `supervisor.json` says which launcher has it and what it is called there. State is asked for, not
remembered.
"""

from typing import Any

from tundish.base.processes import ProcessId
from tundish.base.run_folder import RunFolder, SlurmJob
from tundish.errors import RunDamagedError
from tundish.launch import local, slurm
from tundish.launch.contract import Life
from tundish.plan.compute import Compute

__all__ = ["Life", "cancel", "is_submitted", "state", "submit"]
LAUNCHERS: dict[str, Any] = {"local": local, "slurm": slurm}


def submit(paths: RunFolder, compute: Compute) -> None:
    """Start the run's supervisor, now or when its turn comes.

    Raises:
        SpecError: the launcher refuses.
    """
    LAUNCHERS[compute.launcher].submit(paths, compute)


def state(paths: RunFolder) -> Life | None:
    """What the run's launcher knows of it; None before it was submitted.

    Raises:
        RunDamagedError: `supervisor.json` does not say who has it.
    """
    record = _record(paths)
    return None if record is None else LAUNCHERS[record[0]].state(paths, record[1])


def cancel(paths: RunFolder, seconds: float) -> None:
    """End the supervisor and all that it has started, within so many seconds.

    Raises:
        RequestError: it is where this machine cannot end it.
        RunDamagedError: `supervisor.json` does not say who has it.
    """
    record = _record(paths)
    if record is not None:
        LAUNCHERS[record[0]].cancel(paths, record[1], seconds)


def is_submitted(paths: RunFolder) -> bool:
    """Whether a launcher has the run, or may have: who has submitted it may have been killed before it was noted."""
    try:
        gone_on = paths.read_events()[-1].type != "CREATED"
        return gone_on or _record(paths) is not None or local.is_starting(paths) or slurm.may_have(paths)
    except RunDamagedError:
        return True  # somebody else has been there


def _record(paths: RunFolder) -> tuple[str, ProcessId | SlurmJob] | None:
    if not paths.supervisor.exists():
        slurm.adopt(paths)
    return RunFolder(paths.folder).read_supervisor()
