"""Reading a run back: its record from the files of its folder, and whether its supervisor lives."""

import logging
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from tundish import launch
from tundish.base import events
from tundish.base.home import runs_dir
from tundish.base.run_folder import RUN_NAME, RunFolder, Tracking
from tundish.base.typed_json import moment
from tundish.errors import RunDamagedError, RunNotFoundError, did_you_mean
from tundish.launch import Life
from tundish.plan.spec import RunSpec
from tundish.runs.records import ObjectList, RunRecord, RunStatus, TrainingEvent

log = logging.getLogger(__name__)
START_SECONDS = 30.0
"""Between a run's first event and its supervisor's start."""
STATUS_OF = {
    "CREATED": RunStatus.PENDING,
    "CHECK_PASSED": RunStatus.PENDING,
    "REQUEUED": RunStatus.PENDING,
    "STARTED": RunStatus.STARTING,
    "COMPLETED": RunStatus.COMPLETED,
    "STOPPED": RunStatus.STOPPED,
    "CANCELED": RunStatus.STOPPED,
    "FAILED": RunStatus.FAILED,
}
"""What an event means for the status; every other one means RUNNING."""


BEFORE_STAGES = ("STARTED", "TRAIN_FINISHED")
"""Events after which a stage that may take long writes none until it is done."""


def run_names() -> list[str]:
    """The names of all runs on this machine, damaged ones too."""
    try:
        # What is being made or removed is hidden.
        return [name for name in os.listdir(runs_dir()) if not name.startswith(".")]
    except FileNotFoundError:
        return []


def trackings() -> Iterator[tuple[RunFolder, Tracking]]:
    """Each run of this machine with what it has in MLflow; the log tells which ones are damaged."""
    for name in run_names():
        paths = RunFolder(runs_dir() / name)
        try:
            yield paths, paths.read_tracking()
        except RunNotFoundError:
            continue  # removed meanwhile
        except RunDamagedError as error:
            log.warning("Left out a damaged run: %s", error.message)


def read_events(paths: RunFolder) -> ObjectList[TrainingEvent]:
    """The run's events; of TRAIN_UPDATED the latest.

    Raises:
        RunDamagedError: they cannot be read.
    """
    found = (TrainingEvent(e.type, e.time, e.message, e.cause) for e in paths.read_events())
    return ObjectList(found, TrainingEvent.COLUMNS)


def read_run(name: str) -> RunRecord:
    """The record of the run of that name.

    Raises:
        RunNotFoundError: there is none.
        RunDamagedError: a file of its folder cannot be read.
    """
    paths = find_run(name)
    spec, tracking = RunSpec.read(paths), paths.read_tracking()
    found, life = _lived(paths)
    status, details = _status(found, life)
    if status in (RunStatus.STARTING, RunStatus.RUNNING) and found[-1].type in BEFORE_STAGES:
        details = paths.read_doing() or details
    facts = {name: value for event in found for name, value in event.facts.items()}
    times = {event.type: event.time for event in found}
    end, eta = _estimated_end(found, status)
    return RunRecord(
        name=spec.run_name,
        status=status,
        created_by=spec.created_by,
        model=spec.model,
        save_folder=tracking.save_folder,
        train_data_path=spec.train_data_path,
        register_to=spec.register_to,
        submitted_experiment_path=spec.experiment_path,
        task_type=spec.task_type,
        eval_data_path=spec.eval_data_path,
        eval_prompts=list(spec.eval_prompts) or None,
        custom_weights_path=spec.custom_weights_path,
        training_duration=str(spec.training_duration),
        learning_rate=spec.learning_rate,
        context_length=spec.context_length,
        data_prep_cluster_id=spec.data_prep_cluster_id,
        details=details,
        created_at=moment(spec.created_at),
        started_at=times.get("STARTED"),
        estimated_end_time=end,
        formatted_eta=eta,
        completed_at=found[-1].time if status.is_terminal() else None,
        submitted_config=spec,
        events=ObjectList((TrainingEvent(e.type, e.time, e.message, e.cause) for e in found), TrainingEvent.COLUMNS),
        experiment_id=tracking.experiment_id,
        run_id=tracking.run_id,
        run_dir=paths.folder,
        tracking_uri=tracking.tracking_uri,
        registry_uri=tracking.registry_uri,
        train_loss=facts.get("loss"),
        eval_loss=facts.get("eval_loss"),
        tokens_per_second=facts.get("tokens_per_s"),
        registered_name=facts.get("name"),
        registered_version=facts.get("version"),
        cause=(found[-1].cause or life.cause) if status is RunStatus.FAILED else None,
        last_seen=(None if status.is_terminal() else paths.last_beat()) or found[-1].time,
    )


def _lived(paths: RunFolder) -> tuple[list[events.Event], Life]:
    """The run's events, and what its launcher says of it; who has said its end is not asked for."""
    found = paths.read_events()
    if found[-1].type in events.TERMINAL_TYPES:
        return found, Life(alive=False)
    life = launch.state(paths)
    if life is None:  # create() is just about to start it, or was killed before it could
        recent = (datetime.now(UTC) - found[-1].time).total_seconds() < START_SECONDS
        return found, Life(alive=recent)
    # Read again: who has ended in between has written its last event by then.
    return (found if life.alive else paths.read_events()), life


def damaged_run(name: str, error: RunDamagedError) -> RunRecord:
    """What a list shows of a run that cannot be read."""
    return RunRecord(
        name=name,
        status=RunStatus.UNKNOWN,
        created_by="",
        task_type=None,
        details=f"Damaged: {error.message}",
        run_dir=runs_dir() / name,
        damaged_file=error.path,
    )


def find_run(name: str) -> RunFolder:
    """The folder of an existing run.

    Raises:
        RunNotFoundError: there is none of that name; near names are listed.
        RunDamagedError: it is no folder.
    """
    if (RUN_NAME.fullmatch(name) and os.path.lexists(runs_dir() / name)) or name in (names := run_names()):
        paths = RunFolder(runs_dir() / name)
        paths.check()
        return paths
    hint = did_you_mean(name, names) or " `tundish list` shows the runs."
    raise RunNotFoundError(f"there is no run {name!r} in {runs_dir()}.{hint}")


def wait(name: str, timeout: float | None = None) -> RunRecord:
    """The run once it has ended.

    Raises:
        TimeoutError: after `timeout` seconds.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while not (run := read_run(name)).status.is_terminal():
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError(f"{name}: still {run.status} after {timeout:g} s ({run.details}). It goes on.")
        time.sleep(0.5)
    return run


def _status(found: list[events.Event], life: Life) -> tuple[RunStatus, str]:
    last = found[-1]
    status, said = STATUS_OF.get(last.type, RunStatus.RUNNING), last.message.partition("\n")[0]
    if status.is_terminal():
        return status, said
    if life.alive:
        return (RunStatus.QUEUED, life.waiting) if life.waiting else (status, life.unknown or said)
    how = life.end or f"The supervisor ended without a word after {last.type}; its log may say why."
    return (RunStatus.STOPPED if life.canceled else RunStatus.FAILED), f"{how} `tundish resume` continues it."


def _estimated_end(found: list[events.Event], status: RunStatus) -> tuple[datetime | None, str | None]:
    latest = next((event for event in reversed(found) if event.type == "TRAIN_UPDATED"), None)
    # A run that is trained longer has finished training before.
    ended = latest is not None and any(event.type == "TRAIN_FINISHED" for event in found[found.index(latest) :])
    if latest is None or status.is_terminal() or ended:
        return None, None
    try:
        end = latest.time + timedelta(seconds=latest.facts.get("eta_s", 0))
    except OverflowError:
        return None, None
    left = (end - datetime.now(UTC)).total_seconds()
    return (end, events.short_duration(left)) if left > 0 else (None, None)
