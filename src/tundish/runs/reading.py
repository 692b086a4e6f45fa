"""Reading a run: its record, from the files in its folder and the state of its supervisor."""

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
"""How long after its first event a run may have no supervisor yet."""
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
"""Latest event → status; all other events mean RUNNING."""
BEFORE_STAGES = ("STARTED", "TRAIN_FINISHED")
"""Events that are followed by a long stage without events."""


def run_names() -> list[str]:
    """The names of all runs on this machine, damaged ones included."""
    try:
        # Runs that are being created or removed have a dot.
        return [name for name in os.listdir(runs_dir()) if not name.startswith(".")]
    except FileNotFoundError:
        return []


def trackings() -> Iterator[tuple[RunFolder, Tracking]]:
    """Each run of this machine and where it is in MLflow; damaged runs are logged and skipped."""
    for name in run_names():
        run = RunFolder(runs_dir() / name)
        try:
            yield run, run.read_tracking()
        except RunNotFoundError:
            continue  # removed in the meantime
        except RunDamagedError as error:
            log.warning("Skipped a damaged run: %s", error.message)


def read_events(run: RunFolder) -> ObjectList[TrainingEvent]:
    """The events of a run; of TRAIN_UPDATED only the latest.

    Raises:
        RunDamagedError: they cannot be read.
    """
    happened = (TrainingEvent(e.type, e.time, e.message, e.cause) for e in run.read_events())
    return ObjectList(happened, TrainingEvent.COLUMNS)


def read_run(name: str) -> RunRecord:
    """The record of the run of that name.

    Raises:
        RunNotFoundError: there is no such run.
        RunDamagedError: a file in its folder cannot be read.
    """
    run = find_run(name)
    spec, tracking = RunSpec.read(run), run.read_tracking()
    happened, life = _lived(run)
    status, details = _status(happened, life)
    if status in (RunStatus.STARTING, RunStatus.RUNNING) and happened[-1].type in BEFORE_STAGES:
        details = run.read_doing() or details
    facts = {name: value for event in happened for name, value in event.facts.items()}
    times = {event.type: event.time for event in happened}
    end, eta = _estimated_end(happened, status)
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
        completed_at=happened[-1].time if status.is_terminal() else None,
        submitted_config=spec,
        events=ObjectList((TrainingEvent(e.type, e.time, e.message, e.cause) for e in happened), TrainingEvent.COLUMNS),
        experiment_id=tracking.experiment_id,
        run_id=tracking.run_id,
        run_dir=run.folder,
        tracking_uri=tracking.tracking_uri,
        registry_uri=tracking.registry_uri,
        train_loss=facts.get("loss"),
        eval_loss=facts.get("eval_loss"),
        tokens_per_second=facts.get("tokens_per_s"),
        registered_name=facts.get("name"),
        registered_version=facts.get("version"),
        cause=(happened[-1].cause or life.cause) if status is RunStatus.FAILED else None,
        last_seen=(None if status.is_terminal() else run.last_beat()) or happened[-1].time,
    )


def _lived(run: RunFolder) -> tuple[list[events.Event], Life]:
    """A run's events and the state of its supervisor; after a terminal event, the launcher is not asked."""
    happened = run.read_events()
    if happened[-1].type in events.TERMINAL_TYPES:
        return happened, Life(alive=False)
    life = launch.state(run)
    if life is None:  # create() is about to start it, or was killed before it could
        recent = (datetime.now(UTC) - happened[-1].time).total_seconds() < START_SECONDS
        return happened, Life(alive=recent)
    # Read again: a supervisor that exited in the meantime wrote its last event first.
    return (happened if life.alive else run.read_events()), life


def damaged_run(name: str, error: RunDamagedError) -> RunRecord:
    """The record of a run that cannot be read, for lists."""
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
        RunNotFoundError: there is no run of that name; similar names are suggested.
        RunDamagedError: it is not a folder.
    """
    if (RUN_NAME.fullmatch(name) and os.path.lexists(runs_dir() / name)) or name in (names := run_names()):
        run = RunFolder(runs_dir() / name)
        run.check()
        return run
    hint = did_you_mean(name, names) or " `tundish list` shows the runs."
    raise RunNotFoundError(f"there is no run {name!r} in {runs_dir()}.{hint}")


def wait(name: str, timeout: float | None = None) -> RunRecord:
    """Wait for a run to end, and return it.

    Raises:
        TimeoutError: it did not end within `timeout` seconds.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while not (run := read_run(name)).status.is_terminal():
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError(f"{name}: still {run.status} after {timeout:g} s ({run.details}). It continues.")
        time.sleep(0.5)
    return run


def _status(happened: list[events.Event], life: Life) -> tuple[RunStatus, str]:
    last = happened[-1]
    status, message = STATUS_OF.get(last.type, RunStatus.RUNNING), last.message.partition("\n")[0]
    if status.is_terminal():
        return status, message
    if life.alive:
        return (RunStatus.QUEUED, life.waiting) if life.waiting else (status, life.unknown or message)
    how = life.end or f"The supervisor exited after {last.type} without reporting a result; its log may show why."
    return (RunStatus.STOPPED if life.canceled else RunStatus.FAILED), f"{how} `tundish resume` continues it."


def _estimated_end(happened: list[events.Event], status: RunStatus) -> tuple[datetime | None, str | None]:
    latest = next((event for event in reversed(happened) if event.type == "TRAIN_UPDATED"), None)
    # An earlier TRAIN_FINISHED does not count: the run may have been extended since.
    ended = latest is not None and any(event.type == "TRAIN_FINISHED" for event in happened[happened.index(latest) :])
    if latest is None or status.is_terminal() or ended:
        return None, None
    try:
        end = latest.time + timedelta(seconds=latest.facts.get("eta_s", 0))
    except OverflowError:
        return None, None
    left = (end - datetime.now(UTC)).total_seconds()
    return (end, events.short_duration(left)) if left > 0 else (None, None)
