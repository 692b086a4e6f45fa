"""Launching: `submit`, `state` and `cancel` a run's supervisor, on this machine or by Slurm.

A run folder's `supervisor.json` says which launcher has it and what it is called there. State is asked for, not
remembered.
"""

import json
from typing import Any

from tundish.compute import Compute
from tundish.launch import local, slurm
from tundish.launch.life import Life
from tundish.paths import RunPaths

__all__ = ["Life", "cancel", "state", "submit"]
LAUNCHERS: dict[str, Any] = {"local": local, "slurm": slurm}


def submit(paths: RunPaths, compute: Compute) -> None:
    """Start the run's supervisor, now or when its turn comes.

    Raises:
        SpecError: the launcher refuses.
    """
    LAUNCHERS[compute.launcher].submit(paths, compute)


def state(paths: RunPaths) -> Life | None:
    """What the run's launcher knows of it; None before it was submitted."""
    record = _record(paths)
    return None if record is None else LAUNCHERS[record["launcher"]].state(paths, record)


def cancel(paths: RunPaths, seconds: float) -> None:
    """End the supervisor and all that it has started, within so many seconds.

    Raises:
        RequestError: it is where this machine cannot end it.
    """
    record = _record(paths)
    if record is not None:
        LAUNCHERS[record["launcher"]].cancel(paths, record, seconds)


def _record(paths: RunPaths) -> dict[str, Any] | None:
    if not paths.supervisor.exists():
        slurm.adopt(paths)
    try:
        return json.loads(paths.supervisor.read_text())
    except FileNotFoundError:
        return None
