"""The supervisor: takes one run through its stages, in a process of its own, and says how it ended.

Each stage is a process too: what it loads goes with it, and the supervisor stays small while the model trains. A stage
that has left a result is done: a supervisor that is started again goes on with the next one. Where it is killed, the
kernel ends its stage, and so all ranks.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from tundish.base import events
from tundish.base.files import locked
from tundish.base.home import RUN_VARIABLE
from tundish.base.processes import ProcessId, processes_with, stop_all
from tundish.base.run_folder import RunFolder
from tundish.errors import LockHeldError, RequestError, StageError, TundishError
from tundish.launch import devices, local, slurm
from tundish.plan.spec import RunSpec
from tundish.supervise.stage_process import (
    Canceled,
    Place,
    Stopped,
    be_deaf,
    is_done,
    listen,
    run_stage,
    training_starts,
)

STAGES = ("prepare", "train", "export", "register")
LOCK_SECONDS = 60.0
"""For the supervisor before to be gone; a lock of another node's lasts a while after that node was lost."""


def main(folder: str, *command: str) -> None:
    """Run all stages that are left; the last event is COMPLETED, FAILED, STOPPED or CANCELED.

    Args:
        folder: of the run.
        command: starts training on all nodes of a Slurm job, after `--`; none: on this machine.
    """
    paths = RunFolder(Path(folder))
    listen()
    try:
        with locked(paths.lock, LOCK_SECONDS):
            _supervise(paths, command[1:])
    except LockHeldError as error:
        sys.exit(f"Another process supervises this run: {error.message}")


def _supervise(paths: RunFolder, command: Sequence[str]) -> None:
    """Run what is left, and say how it ended."""
    reached = (0, 0)
    try:
        reached = _reached(paths)
        if not _has_ended(paths):
            _note(paths)
            _run(paths, command)
    except Canceled:
        _end(paths, "CANCELED", "Canceled by user.")
    except Stopped as stopped:
        _stop(paths, stopped, reached)
    except TundishError as error:
        _end(paths, "FAILED", error.message, mlflow="FAILED")
    except Exception as error:
        text = f"The supervisor failed: {error!r}. Log: {paths.log('supervisor')}"
        _end(paths, "FAILED", text, mlflow="FAILED")
        raise
    finally:
        devices.leave(paths.folder.name)


def _has_ended(paths: RunFolder) -> bool:
    return paths.read_events()[-1].type in events.TERMINAL_TYPES


def _note(paths: RunFolder) -> None:
    """Say who supervises the run: who has started this process may have been killed before it could."""
    compute = RunSpec.read(paths).compute
    if compute.launcher == "slurm":
        slurm.note(paths, os.environ["SLURM_JOB_ID"])
    else:
        local.note(paths, compute, ProcessId.of(os.getpid()))


def _run(paths: RunFolder, command: Sequence[str]) -> None:
    end_processes_of(paths)
    shutil.rmtree(paths.scratch, ignore_errors=True)  # of a supervisor that was killed; the last stage may be done
    held: Sequence[str] = ()
    if not command and not is_done(paths, "train"):
        held = devices.wait_for_devices(paths.folder.name)
    events.append(paths.events, "STARTED", f"Run started on {os.uname().nodename}.")
    registered = is_done(paths, "register")
    for stage in STAGES:
        if not is_done(paths, stage):
            _run_with_retry(paths, stage, Place(command=command, devices=held))
        if stage == "train":
            devices.leave(paths.folder.name)  # the next run may train while this one is exported
    be_deaf()
    if registered:  # and killed before it was said; resuming has opened the MLflow run again
        end_mlflow_run(paths, "FINISHED")
    result = paths.read_result("register") or {}
    name, version = result.get("name"), result.get("version")
    message = f"Run completed. Registered as version {version} of {name}."
    events.append(paths.events, "COMPLETED", message, name=name, version=version)


def _run_with_retry(paths: RunFolder, stage: str, place: Place) -> None:
    """Run a stage; training that has begun and then crashed, once more from its newest checkpoint."""
    before = training_starts(paths)
    try:
        run_stage(paths, stage, place)
    except StageError as error:
        # What a stage refuses in its own words, or before it has begun, it would refuse again.
        if stage != "train" or paths.result(stage).exists() or training_starts(paths) == before:
            raise
        text, newline, quoted = error.message.partition("\n")
        again = "It is tried once more from its newest checkpoint."
        events.append(paths.events, "REQUEUED", f"{text} {again}{newline}{quoted}")
        end_processes_of(paths)
        run_stage(paths, stage, place)


def _stop(paths: RunFolder, stopped: Stopped, reached: tuple[int, int]) -> None:
    """Say what comes after a stop: a Slurm job goes back into the queue; here, the caller resumes the run."""
    saved = "A checkpoint was saved." if _reached(paths)[1] > reached[1] else "No new checkpoint was saved."
    name, why = paths.folder.name, stopped.signal.name
    if RunSpec.read(paths).compute.launcher != "slurm":
        return _end(
            paths, "STOPPED", f"Stopped by {why}. {saved} `tundish resume {name}` continues it.", mlflow="KILLED"
        )
    if why == "SIGUSR1" and _reached(paths) == reached:
        text = "In the time that Slurm gave to the run, it came no further. Raise compute's time_limit, or save more "
        return _end(paths, "FAILED", text + "often.", mlflow="FAILED")
    job = os.environ["SLURM_JOB_ID"]
    text = f"Slurm job {job} was told to end by {why}. {saved} It goes on when Slurm starts it again."
    _end(paths, "REQUEUED", text)
    try:
        # A job that somebody has canceled, or that Slurm puts back itself, is not RUNNING any more.
        if why == "SIGUSR1" or slurm.is_running(job):
            slurm.requeue(job)
    except RequestError as error:
        _end(paths, "FAILED", f"{error.message} `tundish resume {name}` continues the run.", mlflow="FAILED")


def _reached(paths: RunFolder) -> tuple[int, int]:
    """Stages done, and checkpoints saved."""
    saved = sum(event.type == "CHECKPOINT_SAVED" for event in paths.read_events())
    return sum(is_done(paths, stage) for stage in STAGES), saved


def _end(paths: RunFolder, type: str, message: str, *, mlflow: str | None = None) -> None:
    """End what is left of the stage; say how it ended."""
    be_deaf()
    stop_all(psutil.Process().children(recursive=True), grace_s=0)
    end_processes_of(paths)
    if mlflow is not None:
        end_mlflow_run(paths, mlflow)
    events.append(paths.events, type, message)


def end_processes_of(paths: RunFolder) -> None:
    """End what a supervisor or a launcher that was killed has left behind on this machine."""
    stop_all(processes_with(RUN_VARIABLE, str(paths.events)), grace_s=0)


def end_mlflow_run(paths: RunFolder, status: str) -> None:
    """Close the MLflow run from a process of its own; a store that cannot be reached must not hide the cause."""
    command = [sys.executable, "-m", "tundish.supervise.stages", f"close-{status}", str(paths.folder)]
    with contextlib.suppress(subprocess.TimeoutExpired, OSError):
        subprocess.run(command, stdin=subprocess.DEVNULL, check=False, timeout=60)


if __name__ == "__main__":
    main(*sys.argv[1:])
