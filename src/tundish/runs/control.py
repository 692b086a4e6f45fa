"""Stopping runs, and going on with them."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tundish import launch
from tundish.base import events
from tundish.base.files import locked
from tundish.base.home import RUN_VARIABLE
from tundish.base.processes import interrupt_waits, processes_with, start
from tundish.base.run_folder import RunFolder
from tundish.errors import (
    Interrupted,
    LockHeldError,
    RequestError,
    RunDamagedError,
    RunNotFoundError,
    SpecError,
    TundishError,
)
from tundish.runs import selecting
from tundish.runs.changing import apply, longer, on_other_devices
from tundish.runs.reading import find_run, read_run
from tundish.runs.records import RunRecord, RunStatus
from tundish.supervise import supervisor
from tundish.supervise.preparing import planned
from tundish.tracking.experiment import reopen_tracking

CANCEL_SECONDS = 5.0
"""For the supervisor to end its stage and itself; then it is killed."""
LOCK_SECONDS = 2.0
"""How long `cancel()` waits for somebody else who changes the run: it answers within ten seconds in any case."""
CLOSE_SECONDS = 6.0
"""How long `cancel()` waits for MLflow to note the end; a store that is away notes it when it can, or not."""


def cancel(
    runs: str | RunRecord | Sequence[str] | Sequence[RunRecord] | None, experiment_id: str | None
) -> tuple[list[str], int]:
    """Stop runs.

    Returns:
        The names of those that were stopped, and how many were asked for.

    Raises:
        RequestError: neither runs nor an experiment was given, or both; or one of the runs cannot be canceled now.
        RunDamagedError: one of them is damaged; the others have been canceled.
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
        given = [runs] if isinstance(runs, str | RunRecord) else list(runs or ())
        names = [selecting.name_of(run) for run in given]
    canceled, problems, damaged = list[str](), list[str](), list[Path]()
    for name in names:
        try:
            canceled += [name] if _cancel_one(name) else []
        except RequestError as error:
            problems.append(error.message)
        except RunDamagedError as error:
            problems.append(error.message)
            damaged.append(error.path)
    closing = [_close(find_run(name)) for name in canceled]
    end = time.monotonic() + CLOSE_SECONDS
    for process in closing:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
    if problems:
        text = " ".join([*problems, *([cancel_message(canceled, len(canceled))] if canceled else [])])
        raise RunDamagedError(text, damaged[0]) if damaged else RequestError(text)
    return canceled, len(names)


def resume(name: str, compute: object = None, training_duration: object = None) -> RunRecord:
    """Go on with a run that has failed, was canceled, or whose supervisor was killed; or train one longer.

    Raises:
        RunNotFoundError: there is none of that name.
        RequestError: it is still going on, or has nothing left to do.
        SpecError: `compute` is wrong, the run's batches cannot be shared by so many devices, or this machine does not
            have the devices that the run has left to train on; `training_duration` is wrong, or not longer.
    """
    paths = find_run(name)
    with locked(paths.folder):  # two who resume a run at once do it once; nobody cancels it meanwhile
        return _resume(name, paths, compute, training_duration)


def _resume(name: str, paths: RunFolder, compute: object, training_duration: object) -> RunRecord:
    status = read_run(name).status
    if not status.is_terminal():
        raise RequestError(f"{name} is {status.display_name.lower()}. Cancel it first, or wait for its end.")
    if status is RunStatus.COMPLETED and training_duration is None:
        raise RequestError(
            f"{name} is completed; nothing is left to do. Give a longer training_duration, or create another run."
        )
    plan = planned(paths)
    changed, note = plan, ""
    if compute is not None:
        changed = on_other_devices(changed, compute, paths)
    elif training_duration is not None or not paths.is_done("train"):
        if problems := launch.problems(plan.spec.compute):
            raise SpecError(problems)  # it would wait forever, and all that come after it too
    if training_duration is not None:
        changed, note = longer(changed, training_duration, paths)
    supervisor.end_processes_of(paths)
    reopen_tracking(paths.read_tracking())
    apply(plan, changed, paths, train_again=training_duration is not None)
    checkpoints = selecting.checkpoints(name)
    where = f"from checkpoint {checkpoints[-1].rpartition('/')[2]}" if checkpoints else "from the beginning"
    trained = paths.is_done("train")
    how = "Training is done; what comes after it goes on." if trained else f"Training goes on {where}."
    with interrupt_waits(Interrupted(name)):
        paths.supervisor.unlink(missing_ok=True)  # the next one is about to start
        events.append(paths.events, "REQUEUED", f"Run resumed by user. {note}{how}")
        launch.submit(paths, changed.spec.compute)
    return read_run(name)


def cancel_message(canceled: Sequence[str], asked: int) -> str:
    """What `cancel()` prints."""
    if not canceled:
        return "No active runs found to cancel."
    rest = asked - len(canceled)
    more = f" {rest} run(s) were not found or already terminated." if rest else ""
    return f"Canceled {', '.join(canceled)} successfully.{more}"


def _cancel_one(name: str) -> bool:
    """Whether the run was stopped; one that has ended, or does not exist, is not."""
    try:
        paths = find_run(name)
    except RunNotFoundError:
        return False
    try:
        if _is_over(name, paths):
            return False
        with locked(paths.folder, LOCK_SECONDS):
            return _cancel(name, paths)
    except LockHeldError as error:
        raise RequestError(f"{name} was not canceled: it is just being changed. {error.message}") from error
    except RunDamagedError as error:
        with contextlib.suppress(TundishError):
            launch.cancel(paths, CANCEL_SECONDS)
        supervisor.end_processes_of(paths)
        raise RunDamagedError(f"{error.message} Its processes have been ended.", error.path) from error


def _cancel(name: str, paths: RunFolder) -> bool:
    if _is_over(name, paths):
        return False
    launch.cancel(paths, CANCEL_SECONDS)
    supervisor.end_processes_of(paths)
    if paths.read_events()[-1].type not in events.TERMINAL_TYPES:
        events.append(paths.events, "CANCELED", "Canceled by user.")
    return paths.read_events()[-1].type == "CANCELED"


def _is_over(name: str, paths: RunFolder) -> bool:
    return read_run(name).status.is_terminal() and not _orphans(paths)


def _close(paths: RunFolder) -> subprocess.Popen[bytes]:
    """Let MLflow know, from a process that goes on should its store not answer for a while."""
    command = [sys.executable, "-m", "tundish.supervise.stages", "canceled", str(paths.folder)]
    return start(command, paths.log("close"), {}, paths.folder, detached=True)


def _orphans(paths: RunFolder) -> list[psutil.Process]:
    """What goes on although its supervisor was killed; a run that has said its end has none."""
    found = paths.read_events()
    said = found[-1].type in events.TERMINAL_TYPES
    return [] if said else processes_with(RUN_VARIABLE, str(paths.events))
