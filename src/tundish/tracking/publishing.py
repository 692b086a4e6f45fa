"""What waits on a run's disk → MLflow and the store of its checkpoints, whenever they can be reached.

Training writes to the disk alone and never waits for a server. One thread of the first rank sends on; what it has not
got rid of when training ends is sent before the model is registered, or when the run is resumed.
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
from tundish.base.mlflow_client import impatient, told
from tundish.base.run_folder import RunFolder, Tracking
from tundish.checkpoints.folder import list_checkpoints
from tundish.checkpoints.save_folder import SaveFolder, remove
from tundish.errors import StageError, StoreError, TundishError
from tundish.plan.foundry import checkpoints_to_keep

log = logging.getLogger(__name__)

WAIT_VARIABLE = "TUNDISH_MLFLOW_WAIT"
"""Environment variable: seconds that a trained run waits for MLflow before it is FAILED."""
WAIT_SECONDS = 3600.0
PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 30.0
"""Between two attempts at a store that is away."""
LAST_SECONDS = 10.0
"""For an attempt at a store that is away, when training ends; for any, when it is stopped."""
MOST_METRICS, MOST_PARAMS = 1000, 100
"""Of one request: MLflow's limits."""
AWAY, BACK = "MLFLOW_AWAY", "MLFLOW_BACK"


class Channel(Protocol):
    """Something that waits, and its way."""

    def send(self) -> None:
        """Send what waits, in order.

        Raises:
            TundishError: some of it still waits.
        """
        ...


class Metrics:
    """Points of metrics. One that is sent twice, as its answer was lost, is one point in MLflow's databases."""

    def __init__(self, paths: RunFolder, tracking: Tracking) -> None:
        self.journal, self.tracking = Journal(paths.metrics), tracking

    def send(self) -> None:
        """See Channel."""
        from mlflow.entities import Metric

        points: list[Metric] = []
        end = 0
        for record, place in self.journal.unsent():
            found = [Metric(key, value, record["time"], record["step"]) for key, value in record["metrics"].items()]
            if points and len(points) + len(found) > MOST_METRICS:
                self._send(points, end)
                points = []
            points, end = points + found, place
        if points:
            self._send(points, end)

    def _send(self, points: Sequence[Any], end: int) -> None:
        with told(self.tracking.tracking_uri):
            for start in range(0, len(points), MOST_METRICS):
                _client(self.tracking).log_batch(self.tracking.run_id, metrics=points[start : start + MOST_METRICS])
        self.journal.note_sent(end)


class Artifacts:
    """Params, data sets, tables and files, in the order in which they were logged."""

    def __init__(self, paths: RunFolder, tracking: Tracking) -> None:
        self.journal, self.tracking, self.folder = Journal(paths.artifacts_journal), tracking, paths.artifacts

    def send(self) -> None:
        """See Channel."""
        for record, place in self.journal.unsent():
            with told(self.tracking.tracking_uri):
                self._send(record)
            self.journal.note_sent(place)

    def _send(self, record: dict[str, Any]) -> None:
        client, run_id = _client(self.tracking), self.tracking.run_id
        if "params" in record:
            log_params(self.tracking, record["params"])
        elif "inputs" in record:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            given: list[dict[str, Any]] = record["inputs"]
            tags = [[InputTag("mlflow.data.context", one.pop("context"))] for one in given]
            inputs = [DatasetInput(Dataset(**one), tag) for one, tag in zip(given, tags, strict=True)]
            client.log_inputs(run_id, inputs)
        elif "table" in record:
            import pandas as pd

            client.log_table(run_id, pd.DataFrame(record["rows"], columns=record["columns"]), record["table"])
        elif (self.folder / record["file"]).is_file():
            client.log_artifact(run_id, str(self.folder / record["file"]))


class Checkpoints:
    """Complete checkpoints of this machine that belong elsewhere, oldest first.

    Args:
        place: where they belong.
        keep: so many are left there; less than 1: all.
    """

    def __init__(self, place: SaveFolder, keep: int) -> None:
        self.place, self.keep = place, keep
        self._done: set[str] = set()

    def send(self) -> None:
        """See Channel."""
        here = list_checkpoints(self.place.local)
        first = max(0, len(here) - self.keep) if self.keep > 0 else 0
        remove(here[:first])  # while a store is away for long, they would fill the disk
        for folder in here[first:]:
            if folder.name not in self._done:
                with told(self.place.address):
                    self.place.publish(folder)
                    if self.keep > 0:
                        self.place.keep_newest(self.keep)
                self._done.add(folder.name)


def channels(paths: RunFolder) -> list[Channel]:
    """All ways of a run."""
    tracking = paths.read_tracking()
    found: list[Channel] = [Metrics(paths, tracking), Artifacts(paths, tracking)]
    place = SaveFolder(tracking.save_folder)
    if place.is_remote:
        found.append(Checkpoints(place, checkpoints_to_keep(paths.foundry_yaml.read_text())))
    return found


class Publisher:
    """Sends what waits, from a thread of its own, and says once when that fails, and once when it works again.

    Args:
        ways: what is to be sent.
        events_path: of the run; None: it has no supervisor, and the log is told.
    """

    def __init__(self, ways: Sequence[Channel], events_path: Path | None) -> None:
        self.ways, self.events_path = ways, events_path
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None
        said = [event.type for event in events.read(events_path)] if events_path else []
        self._away = next((type == AWAY for type in reversed(said) if type in (AWAY, BACK)), False)

    def attempt(self) -> TundishError | None:
        """Send what waits; why some of it still does."""
        failure: TundishError | None = None
        for way in self.ways:
            try:
                with told("what waits for MLflow"):  # the run's own disk may be full
                    way.send()
            except TundishError as error:  # the other ways may be open
                failure = failure or error
                self._tell_away(error)
        if failure is None and self._away:
            self._away = False
            self._tell(BACK, "Uploads work again; all pending metrics and checkpoints are published.")
        return failure

    def _tell_away(self, error: TundishError) -> None:
        if not self._away:
            self._away = True
            text = "Training continues: metrics and checkpoints are kept on disk, and uploaded when that works again."
            self._tell(AWAY, f"{error.message} {text}")

    def start(self) -> None:
        """Go on with it until `finish`."""
        self._thread = threading.Thread(target=self._go_on, daemon=True, name="publisher")
        self._thread.start()

    def finish(self, *, hurry: bool = False) -> None:
        """Send the rest; a store that is away is not waited for: what is left is kept on the disk.

        Args:
            hurry: whether this process will soon be killed; nor is a large checkpoint's upload waited for.
        """
        if self._thread is None:  # there was nothing to train any more
            self.attempt()
            return
        self._ends.set()
        end = time.monotonic() + LAST_SECONDS
        while self._thread.is_alive() and not ((self._away or hurry) and time.monotonic() > end):
            self._thread.join(0.2)
        self._thread = None

    def _go_on(self) -> None:
        pause = PAUSE_SECONDS
        while not self._ends.wait(pause):
            pause = PAUSE_SECONDS if self.attempt() is None else min(2 * pause, LONGEST_PAUSE_SECONDS)
        if not self._away:
            self.attempt()

    def _tell(self, type: str, message: str) -> None:
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


def publish_all(paths: RunFolder, seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Send everything that waits.

    Args:
        paths: of the run.
        seconds: to wait for a store that is away.
        sleep: between attempts.

    Raises:
        StageError: it is still away.
    """
    publisher, pause, end = Publisher(channels(paths), paths.events), PAUSE_SECONDS, time.monotonic() + seconds
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
    """Log params that the run does not have yet; changed ones become tags, since MLflow never changes a param.

    Raises:
        Exception: MLflow's client's.
    """
    from mlflow.entities import Param, RunTag

    client, run_id = _client(tracking), tracking.run_id
    known = client.get_run(run_id).data.params
    new = [Param(name, value) for name, value in params.items() if name not in known]
    for start in range(0, len(new), MOST_PARAMS):
        client.log_batch(run_id, params=new[start : start + MOST_PARAMS])
    changed = [RunTag(f"resumed.{name}", value) for name, value in params.items() if known.get(name, value) != value]
    for start in range(0, len(changed), MOST_PARAMS):
        client.log_batch(run_id, tags=changed[start : start + MOST_PARAMS])


def tell_status(paths: RunFolder, status: str) -> None:
    """Set the MLflow status of a run that has no supervisor to do so."""
    tracking = paths.read_tracking()
    try:
        with told(tracking.tracking_uri), impatient(retries=1):
            if status == "RUNNING":
                _client(tracking).update_run(tracking.run_id, status)
            else:
                _client(tracking).set_terminated(tracking.run_id, status)
    except StoreError as error:
        log.warning("The run's status in MLflow could not be set to %s: %s", status, error.message)


def _client(tracking: Tracking) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking.tracking_uri)
