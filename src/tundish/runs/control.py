"""Stopping runs, and resuming them."""

import contextlib
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tundish import launch
from tundish.base.files import locked
from tundish.base.processes import interrupt_waits, start
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
from tundish.plan.spec import RunSpec
from tundish.runs import selecting
from tundish.runs.changing import apply, longer, on_other_devices
from tundish.runs.reading import find_run, read_run
from tundish.runs.records import RunRecord, RunStatus
from tundish.supervise import supervisor
from tundish.supervise.closing import close_command
from tundish.supervise.preparing import planned
from tundish.tracking.experiment import reopen_tracking

CANCEL_SECONDS = 5.0
"""For the supervisor to end its stage and itself; after that it is killed."""
LOCK_SECONDS = 2.0
"""How long `cancel()` waits for another process that changes the run: it answers within ten seconds in any case."""
CLOSE_SECONDS = 6.0
"""How long `cancel()` waits for MLflow to record the end; a store that is down records it later, or never."""


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
        several = [runs] if isinstance(runs, str | RunRecord) else list(runs or ())
        names = [selecting.name_of(run) for run in several]
    canceled, problems, damaged = list[str](), list[str](), list[Path]()
    for name in names:
        try:
            canceled += [name] if _cancel_one(name) else []
        except RequestError as error:
            problems.append(error.message)
        except RunDamagedError as error:
            problems.append(error.message)
            damaged.append(error.path)
    closing = [_close_mlflow_run(find_run(name)) for name in canceled]
    end = time.monotonic() + CLOSE_SECONDS
    for process in closing:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
    if problems:
        text = " ".join([*problems, *([cancel_message(canceled, len(canceled))] if canceled else [])])
        raise RunDamagedError(text, damaged[0]) if damaged else RequestError(text)
    return canceled, len(names)


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
        run = find_run(name)
    except RunNotFoundError:
        return False
    try:
        if _is_over(run):
            return False  # without the lock: whatever holds it, nothing has to be stopped
        with locked(run.folder, LOCK_SECONDS):
            if _is_over(run):
                return False
            launch.cancel(run, CANCEL_SECONDS)
            supervisor.end_processes_of(run)
            if not run.has_ended():
                run.add_event("CANCELED", "Canceled by user.")
            return run.read_events()[-1].type == "CANCELED"
    except LockHeldError as error:
        raise RequestError(f"{name} was not canceled: another process is changing it. {error.message}") from error
    except RunDamagedError as error:
        with contextlib.suppress(TundishError):
            launch.cancel(run, CANCEL_SECONDS)
        supervisor.end_processes_of(run)
        raise RunDamagedError(f"{error.message} Its processes have been ended.", error.path) from error


def _is_over(run: RunFolder) -> bool:
    """Whether nothing of the run is alive: its supervisor may have been killed, and its ranks not."""
    return read_run(run.name).status.is_terminal() and (run.has_ended() or not run.processes())


def _close_mlflow_run(run: RunFolder) -> subprocess.Popen[bytes]:
    """Close the MLflow run, in a process that continues alone if the store does not answer for a while."""
    return start(close_command(run, "KILLED", if_ended=True), run.log("close"), {}, run.folder, detached=True)


def resume(name: str, compute: object = None, training_duration: object = None) -> RunRecord:
    """Resume a run that has failed, was canceled, or whose supervisor was killed; or train one longer.

    Raises:
        RunNotFoundError: there is no run of that name.
        RequestError: it has not ended, or has nothing left to do.
        SpecError: `compute` is wrong, the run's batches cannot be shared by so many devices, or this machine does not
            have the devices that the run needs; `training_duration` is wrong, or not longer.
    """
    run = find_run(name)
    with locked(run.folder):  # two callers who resume a run at once start it once; no one cancels it meanwhile
        return _resume(run, compute, training_duration)


def _resume(run: RunFolder, compute: object, training_duration: object) -> RunRecord:
    status = read_run(run.name).status
    if not status.is_terminal():
        raise RequestError(f"{run.name} is {status.display_name.lower()}. Cancel it first, or wait for its end.")
    if status is RunStatus.COMPLETED and training_duration is None:
        raise RequestError(
            f"{run.name} is completed; nothing is left to do. Give a longer training_duration, or create another run."
        )
    used, note = RunSpec.read(run).compute, ""
    trains = training_duration is not None or not run.is_done("train")
    # What follows training needs no plan: that of a run of before could not be made without its model's folder.
    before = planned(run) if trains or compute is not None else None
    after = before
    if after is not None and compute is not None:
        after = on_other_devices(after, compute, run)
    elif trains and (problems := launch.problems(used)):
        raise SpecError(problems)  # it would wait in the queue forever, and all runs behind it too
    if after is not None and training_duration is not None:
        after, note = longer(after, training_duration, run)
    supervisor.end_processes_of(run)
    reopen_tracking(run.read_tracking())
    if before is not None and after is not None:
        apply(before, after, run, train_again=training_duration is not None)
        used = after.spec.compute
    if run.is_done("train"):
        how = "Training is done; the stages after it continue."
    elif checkpoints := selecting.checkpoints(run.name):
        how = f"Training continues from checkpoint {checkpoints[-1].rpartition('/')[2]}."
    else:
        how = "Training starts from the beginning."
    with interrupt_waits(Interrupted(run.name)):
        run.supervisor.unlink(missing_ok=True)  # of the one before
        run.add_event("REQUEUED", f"Run resumed by user. {note}{how}")
        launch.submit(run, used)
    return read_run(run.name)
