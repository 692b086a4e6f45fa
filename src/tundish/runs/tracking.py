"""A run's place in MLflow: its experiment, its run, its artifact folder."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from tundish.errors import SpecError
from tundish.paths import RunPaths, default_tracking_uri, home, mlflow_artifacts_dir, write_atomic


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracking:
    """What `create()` has made in MLflow."""

    tracking_uri: str
    experiment_id: str
    experiment_name: str
    run_id: str
    save_folder: str
    """Where the checkpoints go: `<artifacts>/<run_name>/checkpoints`."""

    @classmethod
    def read(cls, paths: RunPaths) -> "Tracking":
        """What was written when the run was created."""
        return cls(**json.loads(paths.result("tracking").read_text()))

    @property
    def environment(self) -> dict[str, str]:
        """With this, Composer's logger goes on with the run that `create()` has made."""
        return {
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "MLFLOW_EXPERIMENT_ID": self.experiment_id,
            "MLFLOW_RUN_ID": self.run_id,
        }

    def write(self, paths: RunPaths) -> None:
        """Keep it in the run folder."""
        write_atomic(paths.result("tracking"), json.dumps(asdict(self), indent=2) + "\n")


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, else the SQLite file in `$TUNDISH_HOME`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri()


def planned_save_folder(run_name: str, experiment_name: str, root: str | None = None) -> str:
    """The save folder before the MLflow run exists; Composer fills in the run's id."""
    return _below(root or f"{_artifact_root(experiment_name)}/{{mlflow_run_id}}/artifacts", run_name)


def _below(root: str, run_name: str) -> str:
    return f"{root.rstrip('/')}/{run_name}/checkpoints"


def open_tracking(run_name: str, experiment_name: str, tags: dict[str, str], root: str | None = None) -> Tracking:
    """Make the experiment, where it does not exist, and the run.

    Args:
        run_name: tundish's and MLflow's name of the run.
        experiment_name: MLflow's.
        tags: of the run.
        root: path or URI below which the checkpoints go; None = the run's MLflow artifacts.

    Raises:
        SpecError: MLflow refuses.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = tracking_uri()
    if uri == default_tracking_uri():
        (home() / "mlflow").mkdir(parents=True, exist_ok=True)
    try:
        with _quiet():
            client: Any = MlflowClient(uri)
            experiment = client.get_experiment_by_name(experiment_name)
            experiment_id = experiment.experiment_id if experiment else _create_experiment(client, experiment_name, uri)
            run = client.create_run(experiment_id, run_name=run_name, tags=tags)
    except MlflowException as error:
        raise SpecError(
            f"experiment_path: MLflow at {uri} does not take a run in {experiment_name!r} ({error}). "
            "Check MLFLOW_TRACKING_URI, or name another experiment."
        ) from error
    return Tracking(
        tracking_uri=uri,
        experiment_id=experiment_id,
        experiment_name=experiment_name,
        run_id=run.info.run_id,
        save_folder=_below(root or _artifacts(run.info.artifact_uri), run_name),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing below a warning is logged: MLflow's first database migration tells of each of its forty steps."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def end_tracking(tracking: Tracking, status: str) -> None:
    """Close the MLflow run with `FAILED` or `KILLED`."""
    from mlflow import MlflowClient

    MlflowClient(tracking.tracking_uri).set_terminated(tracking.run_id, status)


def reopen_tracking(tracking: Tracking) -> None:
    """Let the MLflow run go on that was closed."""
    from mlflow import MlflowClient

    MlflowClient(tracking.tracking_uri).update_run(tracking.run_id, "RUNNING")


def _create_experiment(client: Any, name: str, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    # MLflow's own default is a folder of the working directory; a server chooses for itself.
    location = None if uri.startswith("http") else _artifact_root(name).as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:
        # Another process made it in between.
        if (experiment := client.get_experiment_by_name(name)) is None:
            raise
        return experiment.experiment_id


def _artifact_root(experiment_name: str) -> Path:
    return mlflow_artifacts_dir() / hashlib.sha256(experiment_name.encode()).hexdigest()[:16]


def local_path(artifact_uri: str) -> Path | None:
    """The folder that MLflow's URI names, where it is one of this machine."""
    parsed = urlparse(artifact_uri)
    return Path(unquote(parsed.path)) if parsed.scheme in ("", "file") else None


def _artifacts(artifact_uri: str) -> str:
    """The run's artifact folder, or its URI where it is on another machine."""
    folder = local_path(artifact_uri)
    return artifact_uri if folder is None else str(folder)
