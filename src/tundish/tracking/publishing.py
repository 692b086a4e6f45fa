"""Uploads what is pending on a run's disk to MLflow and to the store of its checkpoints, whenever they are reachable.

Training only writes to the disk and never waits for a server. One thread of the first rank uploads; what is still
pending when training ends is uploaded before the model is registered, or when the run is resumed.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tundish.base import events
from tundish.base.journal import Journal
from tundish.base.mlflow_client import impatient, store_errors
from tundish.base.run_folder import RunFolder, Tracking
from tundish.checkpoints.folder import list_checkpoints
from tundish.checkpoints.save_folder import SaveFolder, remove
from tundish.errors import StageError, StoreError, TundishError
from tundish.plan.foundry import checkpoints_to_keep

log = logging.getLogger(__name__)

WAIT_VARIABLE = "TUNDISH_MLFLOW_WAIT"
"""Environment variable: seconds that a trained run waits for MLflow before it fails."""
WAIT_SECONDS = 3600.0
PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 30.0
"""Between two attempts; the pause doubles while a store is unreachable."""
LAST_SECONDS = 10.0
"""For the last attempt at an unreachable store when training ends, and for any last attempt when it is stopped."""
MOST_METRICS, MOST_PARAMS = 1000, 100
"""MLflow's limits for one request."""
AWAY, BACK = "MLFLOW_AWAY", "MLFLOW_BACK"


class Channel(Protocol):
    """One kind of pending data, and where it is uploaded to."""

    def send(self) -> None:
        """Upload what is pending, in order.

        Raises:
            TundishError: some of it is still pending.
        """
        ...


class Metrics:
    """Points of metrics. MLflow's databases store a point once even if it is sent twice, because an answer was lost."""

    def __init__(self, run: RunFolder, tracking: Tracking) -> None:
        self.journal, self.tracking = Journal(run.metrics), tracking

    def send(self) -> None:
        """See Channel."""
        from mlflow.entities import Metric

        batch: list[Metric] = []
        end = 0
        for record, position in self.journal.unsent():
            points = [Metric(key, value, record["time"], record["step"]) for key, value in record["metrics"].items()]
            if batch and len(batch) + len(points) > MOST_METRICS:
                self._send(batch, end)
                batch = []
            batch, end = batch + points, position
        if batch:
            self._send(batch, end)

    def _send(self, points: Sequence[Any], end: int) -> None:
        with store_errors(self.tracking.tracking_uri):
            # One record alone may have more points than a request.
            for start in range(0, len(points), MOST_METRICS):
                client(self.tracking).log_batch(self.tracking.run_id, metrics=points[start : start + MOST_METRICS])
        self.journal.note_sent(end)


class Artifacts:
    """Params, data sets, tables and files, in the order in which they were logged."""

    def __init__(self, run: RunFolder, tracking: Tracking) -> None:
        self.journal, self.tracking, self.folder = Journal(run.artifacts_journal), tracking, run.artifacts

    def send(self) -> None:
        """See Channel."""
        for record, position in self.journal.unsent():
            with store_errors(self.tracking.tracking_uri):
                self._send(record)
            self.journal.note_sent(position)

    def _send(self, record: dict[str, Any]) -> None:
        mlflow, run_id = client(self.tracking), self.tracking.run_id
        if "params" in record:
            log_params(self.tracking, record["params"])
        elif "inputs" in record:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            datasets: list[dict[str, Any]] = record["inputs"]
            tags = [[InputTag("mlflow.data.context", dataset.pop("context"))] for dataset in datasets]
            inputs = [DatasetInput(Dataset(**dataset), tag) for dataset, tag in zip(datasets, tags, strict=True)]
            mlflow.log_inputs(run_id, inputs)
        elif "table" in record:
            import pandas as pd

            mlflow.log_table(run_id, pd.DataFrame(record["rows"], columns=record["columns"]), record["table"])
        elif (self.folder / record["file"]).is_file():
            mlflow.log_artifact(run_id, str(self.folder / record["file"]))


class Checkpoints:
    """Complete checkpoints of this machine that belong elsewhere, oldest first.

    Args:
        place: where they belong.
        keep: how many stay there; less than 1: all.
    """

    def __init__(self, place: SaveFolder, keep: int) -> None:
        self.place, self.keep = place, keep
        self._done: set[str] = set()

    def send(self) -> None:
        """See Channel."""
        pending = list_checkpoints(self.place.local)
        first = max(0, len(pending) - self.keep) if self.keep > 0 else 0
        remove(pending[:first])  # they would fill the disk while a store is unreachable for long
        for folder in pending[first:]:
            if folder.name not in self._done:
                with store_errors(self.place.address):
                    self.place.publish(folder)
                    if self.keep > 0:
                        self.place.keep_newest(self.keep)
                self._done.add(folder.name)


def channels(run: RunFolder) -> list[Channel]:
    """All channels of a run."""
    tracking = run.read_tracking()
    place = SaveFolder(tracking.save_folder)
    remote = [Checkpoints(place, checkpoints_to_keep(run.foundry_yaml.read_text()))] if place.is_remote else []
    return [Metrics(run, tracking), Artifacts(run, tracking), *remote]


class Publisher:
    """Uploads what is pending, from a thread of its own; reports once when that fails, and once when it works again.

    Args:
        channels: what is to be uploaded.
        events_path: of the run, for the reports; None: it has no supervisor, and they go to the log only.
    """

    def __init__(self, channels: Sequence[Channel], events_path: Path | None) -> None:
        self.channels, self.events_path = channels, events_path
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        # The latest report of an earlier process counts: a resumed run must not report the same again.
        types = [event.type for event in events.read(events_path)] if events_path else []
        self._away = next((type == AWAY for type in reversed(types) if type in (AWAY, BACK)), False)

    def attempt(self) -> TundishError | None:
        """Upload what is pending; returns the first error if some of it still is."""
        failure: TundishError | None = None
        for channel in self.channels:
            try:
                with store_errors("pending uploads"):  # for errors of the run's own disk, which may be full
                    channel.send()
            except TundishError as error:  # other channels lead to other stores, which may be reachable
                failure = failure or error
                if not self._away:
                    self._away = True
                    kept = "metrics and checkpoints are kept on disk, and uploaded when that works again."
                    self._report(AWAY, f"{error.message} Training continues: {kept}")
        if failure is None and self._away:
            self._away = False
            self._report(BACK, "Uploads work again; all pending metrics and checkpoints are published.")
        return failure

    def start(self) -> None:
        """Upload continuously until `finish`."""
        self._thread = threading.Thread(target=self._run, daemon=True, name="publisher")
        self._thread.start()

    def finish(self, *, hurry: bool = False) -> None:
        """Upload the rest, without waiting for an unreachable store: what is left stays on the disk.

        Args:
            hurry: this process will soon be killed; do not wait for the upload of a large checkpoint either.
        """
        if self._thread is None:  # `start` was never called: training had already reached its end
            self.attempt()
            return
        self._closed.set()
        end = time.monotonic() + LAST_SECONDS
        while self._thread.is_alive() and not ((self._away or hurry) and time.monotonic() > end):
            self._thread.join(0.2)
        self._thread = None

    def _run(self) -> None:
        pause = PAUSE_SECONDS
        while not self._closed.wait(pause):
            pause = PAUSE_SECONDS if self.attempt() is None else min(2 * pause, LONGEST_PAUSE_SECONDS)
        if not self._away:
            self.attempt()

    def _report(self, type: str, message: str) -> None:
        log.warning(message)
        if self.events_path is not None:
            with contextlib.suppress(OSError):  # the log has it
                events.append(self.events_path, type, message)


def wait_seconds() -> float:
    """How long a trained run waits for MLflow: `$TUNDISH_MLFLOW_WAIT`, else an hour."""
    try:
        return max(0.0, float(os.environ.get(WAIT_VARIABLE) or WAIT_SECONDS))
    except ValueError:
        return WAIT_SECONDS


def publish_all(run: RunFolder, seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Upload everything that is pending.

    Args:
        run: its folder.
        seconds: to wait for an unreachable store.
        sleep: called with the seconds between two attempts.

    Raises:
        StageError: the store is still unreachable.
    """
    publisher, pause, end = Publisher(channels(run), run.events), PAUSE_SECONDS, time.monotonic() + seconds
    while (failure := publisher.attempt()) is not None:
        if time.monotonic() + pause > end:
            raise StageError(
                f"{failure.message} Gave up after waiting {events.short_duration(seconds)} "
                f"({WAIT_VARIABLE} sets the seconds). Metrics and checkpoints are kept, and published with the model.",
                failure=failure.failure,
            )
        sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def log_params(tracking: Tracking, params: Mapping[str, str]) -> None:
    """Log params that the run does not have yet; changed ones become tags, because MLflow never changes a param.

    Raises:
        Exception: whatever MLflow's client raises.
    """
    from mlflow.entities import Param, RunTag

    mlflow, run_id = client(tracking), tracking.run_id
    known = mlflow.get_run(run_id).data.params
    new = [Param(name, value) for name, value in params.items() if name not in known]
    for start in range(0, len(new), MOST_PARAMS):
        mlflow.log_batch(run_id, params=new[start : start + MOST_PARAMS])
    changed = [RunTag(f"resumed.{name}", value) for name, value in params.items() if known.get(name, value) != value]
    for start in range(0, len(changed), MOST_PARAMS):
        mlflow.log_batch(run_id, tags=changed[start : start + MOST_PARAMS])


def set_status(run: RunFolder, status: str) -> None:
    """Set the MLflow status of a run that has no supervisor to do so."""
    tracking = run.read_tracking()
    try:
        with store_errors(tracking.tracking_uri), impatient(retries=1):
            if status == "RUNNING":
                client(tracking).update_run(tracking.run_id, status)
            else:  # also records the end time
                client(tracking).set_terminated(tracking.run_id, status)
    except StoreError as error:
        log.warning("The run's status in MLflow could not be set to %s: %s", status, error.message)


def client(tracking: Tracking) -> Any:
    """MLflow's client of the run's store."""
    from mlflow import MlflowClient

    return MlflowClient(tracking.tracking_uri)
