"""Launching: `submit`, `state` and `cancel` a run's supervisor, by whichever launcher the run's compute names.

A run folder's `supervisor.json` says which launcher has the run and how the launcher identifies the supervisor. State
is always asked for, never remembered.
"""

from typing import Any

from tundish.base.run_folder import RunFolder
from tundish.errors import RunDamagedError
from tundish.launch import local, slurm
from tundish.launch.contract import Launcher, Life, Restart
from tundish.plan.compute import Compute

__all__ = ["LAUNCHERS", "Launcher", "Life", "Restart", "cancel", "is_submitted", "launcher_of", "problems", "state"]
__all__ += ["release_devices", "submit"]
LAUNCHERS: dict[str, Launcher] = {"local": local, "slurm": slurm}
"""By the name that `Compute.launcher` has."""


def launcher_of(compute: Compute) -> Launcher:
    """The launcher that starts a run on this compute."""
    return LAUNCHERS[compute.launcher]


def problems(compute: Compute) -> list[str]:
    """What this machine cannot give of what is asked for."""
    return launcher_of(compute).problems(compute)


def submit(run: RunFolder, compute: Compute) -> None:
    """Start the run's supervisor, now or when its turn comes.

    Raises:
        SpecError: the launcher refuses.
    """
    launcher_of(compute).submit(run, compute)


def state(run: RunFolder) -> Life | None:
    """Whether the run's supervisor is alive; None before it was submitted.

    Raises:
        RunDamagedError: `supervisor.json` cannot be read.
    """
    launcher, record = _recorded(run)
    return None if launcher is None else launcher.state(run, record)


def cancel(run: RunFolder, seconds: float) -> None:
    """End the run's supervisor, and everything that it has started, within so many seconds.

    Raises:
        RequestError: it cannot be ended from this machine.
        RunDamagedError: `supervisor.json` cannot be read.
    """
    launcher, record = _recorded(run)
    if launcher is not None:
        launcher.cancel(run, record, seconds)


def release_devices(run: RunFolder) -> None:
    """Give up what any launcher holds for a run that will not use it."""
    # Not only the run's own launcher: its spec, which names that, may be damaged.
    for launcher in LAUNCHERS.values():
        launcher.release_devices(run)


def is_submitted(run: RunFolder) -> bool:
    """Whether a launcher has the run, or may have it: its submitter may have been killed before recording it."""
    try:
        if run.read_events()[-1].type != "CREATED" or _recorded(run)[0] is not None:
            return True
    except RunDamagedError:
        return True  # `create()` leaves no damaged files: the run was used since
    return any(launcher.may_have(run) for launcher in LAUNCHERS.values())


def _recorded(run: RunFolder) -> tuple[Launcher | None, Any]:
    """The run's launcher, and the record by which it knows the supervisor; None before it was submitted."""
    if not run.supervisor.exists():  # its submitter may have been killed before recording it
        for launcher in LAUNCHERS.values():
            launcher.adopt(run)
    recorded = run.read_supervisor({name: launcher.RECORD for name, launcher in LAUNCHERS.items()})
    return (None, None) if recorded is None else (LAUNCHERS[recorded[0]], recorded[1])
