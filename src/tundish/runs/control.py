"""Stopping runs."""

from collections.abc import Sequence

import psutil

from tundish import events
from tundish.errors import RequestError
from tundish.launch.local import stop_all, stop_tree
from tundish.paths import RunPaths
from tundish.runs import selecting
from tundish.runs.reading import find_run, read_run, run_names, supervisor
from tundish.runs.records import TrainingRun
from tundish.runs.tracking import Tracking, end_tracking

CANCEL_SECONDS = 6.0


def cancel(
    runs: str | TrainingRun | Sequence[str] | Sequence[TrainingRun] | None, experiment_id: str | None
) -> tuple[list[str], int]:
    """Stop runs.

    Returns:
        The names of those that were stopped, and how many were asked for.

    Raises:
        RequestError: neither runs nor an experiment was given, or both.
    """
    if not runs and not experiment_id:
        raise RequestError("Must provide training run(s) or MLflow experiment ID to cancel")
    if runs and experiment_id:
        raise RequestError(
            "Cannot provide both training run(s) and MLflow experiment ID to cancel. Please specify one or the other."
        )
    if experiment_id:
        names = [run.name for run in selecting.select(selecting.Filter(experiment_id=experiment_id))]
    else:
        given = [runs] if isinstance(runs, str | TrainingRun) else list(runs or ())
        names = [selecting.name_of(run) for run in given]
    existing = set(run_names())
    return [name for name in names if name in existing and _cancel_one(name)], len(names)


def cancel_message(canceled: Sequence[str], asked: int) -> str:
    """What `cancel()` prints."""
    if not canceled:
        return "No active runs found to cancel."
    rest = asked - len(canceled)
    more = f" {rest} run(s) were not found or already terminated." if rest else ""
    return f"Canceled {', '.join(canceled)} successfully.{more}"


def _cancel_one(name: str) -> bool:
    paths = find_run(name)
    if read_run(name).status.is_terminal():
        return False
    _stop_supervisor(paths)
    found = events.read(paths.events)
    if not found or found[-1].type not in events.TERMINAL_TYPES:
        events.append(paths.events, "CANCELED", "Canceled by user.")
    end_tracking(Tracking.read(paths), "KILLED")
    return events.read(paths.events)[-1].type == "CANCELED"


def _stop_supervisor(paths: RunPaths) -> None:
    """Ask the supervisor to end its stage and itself; kill what is left after CANCEL_SECONDS."""
    owner = supervisor(paths)
    process = owner.process() if owner else None
    if process is None:
        return
    family = [process, *process.children(recursive=True)]
    process.terminate()
    try:
        process.wait(CANCEL_SECONDS)
    except psutil.TimeoutExpired:
        stop_tree(process, grace_s=0.5)
    stop_all(family, grace_s=0.5)
