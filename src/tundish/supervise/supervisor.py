"""The supervisor: takes one run through its stages, in a process of its own, and records how the run ended.

Each stage is a process too: the memory that it takes is free after it, and the supervisor stays small while the model
trains. A stage that has left a result is done: a supervisor that is started again continues with the next one. When the
supervisor is killed, the kernel ends its stage, and so all ranks.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from tundish.base.files import locked
from tundish.base.processes import stop_all
from tundish.base.run_folder import RunFolder
from tundish.errors import FailureCause, LockHeldError, StageError, TundishError
from tundish.launch import launcher_of, release_devices
from tundish.plan.spec import RunSpec
from tundish.supervise.causes import cause_of
from tundish.supervise.closing import close_command
from tundish.supervise.preparing import adopt, planned
from tundish.supervise.stage_process import (
    Canceled,
    Devices,
    Stopped,
    ignore_signals,
    listen_to_signals,
    run_stage,
    training_starts,
)

STAGES = ("prepare", "train", "export", "register")
LOCK_SECONDS = 60.0
"""For the supervisor before to exit; the lock of a node that was lost is held for a while after that."""


def main(folder: str, *command: str) -> None:
    """Run all stages that are left; the last event is COMPLETED, FAILED, STOPPED, CANCELED or REQUEUED.

    Args:
        folder: of the run.
        command: after `--`, starts training on all nodes of a cluster's job; none: on this machine.
    """
    run = RunFolder(Path(folder))
    listen_to_signals()
    try:
        with locked(run.lock, LOCK_SECONDS):
            _supervise(run, command[1:])
    except LockHeldError as error:
        sys.exit(f"Another process supervises this run: {error.message}")


def _supervise(run: RunFolder, command: Sequence[str]) -> None:
    """Run what is left, and record how it ended."""
    before = (0, 0)
    try:
        before = _progress(run)
        if not run.has_ended():
            compute = RunSpec.read(run).compute
            launcher_of(compute).record_supervisor(run, compute)
            _run(run, command)
    except Canceled:
        _end(run, "CANCELED", "Canceled by user.")
    except Stopped as stopped:
        _stop(run, stopped, before)
    except TundishError as error:
        _end(run, "FAILED", error.message, mlflow="FAILED", cause=cause_of(error))
    except Exception as error:
        text = f"The supervisor failed: {error!r}. Log: {run.log('supervisor')}"
        _end(run, "FAILED", text, mlflow="FAILED", cause=cause_of(error))
        raise
    finally:
        release_devices(run)


def _run(run: RunFolder, command: Sequence[str]) -> None:
    end_processes_of(run)
    shutil.rmtree(run.scratch, ignore_errors=True)  # of a supervisor that was killed; the last stage may be done
    launcher = launcher_of(RunSpec.read(run).compute)
    # Waited for before the data is prepared: a run in the queue takes no CPU from the ones that train.
    devices = () if run.is_done("train") else launcher.wait_for_devices(run)
    run.add_event("STARTED", f"Run started on {os.uname().nodename}.")
    if not run.is_done("train"):
        planned(run)  # a run that was created before there were plans gets one
    was_registered = run.is_done("register")
    for stage in STAGES:
        if not run.is_done(stage) and not (stage == "prepare" and adopt(run)):
            _run_with_retry(run, stage, Devices(command=command, visible=devices))
        if stage == "train":
            launcher.release_devices(run)  # the next run may train while this one is exported
    ignore_signals()
    if was_registered:  # killed before COMPLETED was recorded; resuming reopened the MLflow run
        end_mlflow_run(run, "FINISHED")
    result = run.read_result("register") or {}
    name, version = result.get("name"), result.get("version")
    message = f"Run completed. Registered as version {version} of {name}."
    run.add_event("COMPLETED", message, name=name, version=version)


def _run_with_retry(run: RunFolder, stage: str, devices: Devices) -> None:
    """Run a stage; training that crashed after it had begun, once more from its newest checkpoint."""
    starts = training_starts(run)
    try:
        run_stage(run, stage, devices)
    except StageError as error:
        # What a stage refuses with a message of its own, or before it has begun, it would refuse again.
        if stage != "train" or run.result(stage).exists() or training_starts(run) == starts:
            raise
        text, newline, quoted = error.message.partition("\n")
        message = f"{text} Training is retried once from its newest checkpoint.{newline}{quoted}"
        run.add_event("REQUEUED", message, cause=error.failure)
        end_processes_of(run)
        run_stage(run, stage, devices)


def _stop(run: RunFolder, stopped: Stopped, before: tuple[int, int]) -> None:
    """Record what comes after a stop: the launcher restarts the run, or its user resumes it."""
    after = _progress(run)
    saved = "A checkpoint was saved." if after[1] > before[1] else "No new checkpoint was saved."
    resume = f"`tundish resume {run.name}` continues it."
    try:
        launcher = launcher_of(RunSpec.read(run).compute)
        restart = launcher.restart(stopped.signal, progressed=after != before)
        if restart is None:
            _end(run, "STOPPED", f"Stopped by {stopped.signal.name}. {saved} {resume}", mlflow="KILLED")
        else:
            # Recorded before it is asked for: the restart may end this process at once.
            _end(run, "REQUEUED", f"{restart.reason} {saved}")
            restart.request()
    except TundishError as error:
        _end(run, "FAILED", f"{error.message} {resume}", mlflow="FAILED", cause=cause_of(error))


def _progress(run: RunFolder) -> tuple[int, int]:
    """Stages done, and checkpoints saved."""
    saved = sum(event.type == "CHECKPOINT_SAVED" for event in run.read_events())
    return sum(run.is_done(stage) for stage in STAGES), saved


def _end(run: RunFolder, type: str, message: str, *, mlflow: str | None = None, **facts: FailureCause) -> None:
    """End what is left of the stage, and record how the run ended."""
    ignore_signals()
    stop_all(psutil.Process().children(recursive=True), grace_s=0)
    end_processes_of(run)
    if mlflow is not None:
        end_mlflow_run(run, mlflow)
    run.add_event(type, message, **facts)


def end_processes_of(run: RunFolder) -> None:
    """End what a supervisor or a launcher that was killed has left behind on this machine."""
    stop_all(run.processes(), grace_s=0)


def end_mlflow_run(run: RunFolder, status: str) -> None:
    """Close the MLflow run from a process of its own; a store that cannot be reached must not hide the cause."""
    with contextlib.suppress(subprocess.TimeoutExpired, OSError):
        subprocess.run(close_command(run, status), stdin=subprocess.DEVNULL, check=False, timeout=60)


if __name__ == "__main__":
    main(*sys.argv[1:])
