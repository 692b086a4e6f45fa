"""A run's place in MLflow: its experiment, its run, its artifact folder."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from tundish import mlflow_process
from tundish.errors import RequestError, SpecError
from tundish.locks import locked
from tundish.paths import default_tracking_uri, home, make_folder, mlflow_artifacts_dir
from tundish.run_folder import Tracking
from tundish.text import holds_secret


def tracking_uri() -> str:
    """What the user has chosen for MLflow, in this process or by the environment; else the file in `$TUNDISH_HOME`."""
    return _absolute(mlflow_process.chosen_uri() or default_tracking_uri())


def registry_uri() -> str | None:
    """`MLFLOW_REGISTRY_URI`; Unity Catalog where Databricks does the tracking; else None: the tracking store is it."""
    if given := os.environ.get(mlflow_process.REGISTRY_VARIABLE):  # `mlflow.set_registry_uri` sets it, too
        return _absolute(given)
    scheme, separator, profile = tracking_uri().partition("://")
    return f"databricks-uc{separator}{profile}" if scheme == "databricks" else None


def uri_problems() -> list[str]:
    """Passwords that would be written into a run's files and logs."""
    return [
        f"{name}: holds a password, which would be written into the run's files. Take it out, and set "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, PGPASSWORD or ~/.pgpass for PostgreSQL, "
        "an option file for MySQL."
        for name, given in (
            (mlflow_process.VARIABLE, mlflow_process.chosen_uri()),
            (mlflow_process.REGISTRY_VARIABLE, os.environ.get(mlflow_process.REGISTRY_VARIABLE)),
        )
        if given and holds_secret(given)
    ]


def _made(uri: str) -> str:
    """The same URI; the folder of the default store is made for it."""
    if uri == default_tracking_uri():
        make_folder(home() / "mlflow")
    return uri


def _absolute(uri: str) -> str:
    """Relative paths mean the caller's working directory; the run's processes have another one."""
    if ":" not in uri and uri not in ("databricks", "databricks-uc"):
        return str(Path(uri).absolute())
    relative = re.fullmatch(r"(sqlite:///)([^/:?].*)", uri)
    return relative[1] + str(Path(relative[2]).absolute()) if relative else uri


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

    uri, registry = _made(tracking_uri()), registry_uri()
    # A SQLite file that is made by two at once is made by none: MLflow's migrations know no lock.
    alone = locked(home() / "mlflow" / "lock") if uri == default_tracking_uri() else nullcontext()
    try:
        with quiet(), impatient(), alone:
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
        save_folder=_below(root or artifact_address(run.info.artifact_uri, uri), run_name),
        registry_uri=registry,
    )


def check_registry(name: str) -> None:
    """Ask the model registry for a name, where it is another store than the tracking's, which `create()` uses anyway.

    Raises:
        SpecError: it does not answer, or refuses the name. Better now than after the training.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if (uri := registry_uri()) is None:
        return
    try:
        with quiet(), impatient():
            MlflowClient(_made(tracking_uri()), uri).search_model_versions(f"name='{name}'", max_results=1)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):  # the model may be new
            raise SpecError(
                f"register_to: the model registry {uri} takes no model {name!r} ({error}). "
                "Check MLFLOW_REGISTRY_URI and what it needs to log in, or give another name."
            ) from error


@contextmanager
def impatient() -> Iterator[None]:
    """A server that is away is told to who waits for it within half a minute; MLflow asks for four, and up to twenty.

    What the environment says of it counts.
    """
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    added = {name: limit for name, limit in limits.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing below a warning is logged: MLflow's first database migration tells of each of its forty steps."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def end_tracking(tracking: Tracking, status: str) -> None:
    """Close the MLflow run with `FAILED` or `KILLED`; a server that is away is given up after half a minute."""
    from mlflow import MlflowClient

    with impatient():
        MlflowClient(tracking.tracking_uri).set_terminated(tracking.run_id, status)


def reopen_tracking(tracking: Tracking) -> None:
    """Let the MLflow run go on that was closed.

    Raises:
        RequestError: MLflow does not answer, or does not have it.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        with impatient():
            MlflowClient(tracking.tracking_uri).update_run(tracking.run_id, "RUNNING")
    except MlflowException as error:
        raise RequestError(
            f"MLflow at {tracking.tracking_uri} does not go on with run {tracking.run_id} ({error}). "
            "Check that the server runs and can be reached; then resume the run again."
        ) from error


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


def artifact_address(artifact_uri: str, tracking_uri: str) -> str:
    """The path or URI of an artifact folder, the same for every process, wherever its MLFLOW_TRACKING_URI points.

    Args:
        artifact_uri: as MLflow has it for a run.
        tracking_uri: of the store that has it; serves what is at `mlflow-artifacts:/…`.
    """
    parsed = urlparse(artifact_uri)
    if parsed.scheme in ("", "file"):
        return unquote(parsed.path)
    if parsed.scheme != "mlflow-artifacts":
        return artifact_uri
    scheme, _, server = tracking_uri.rstrip("/").partition("://")
    return f"{scheme}://{parsed.netloc or server}/api/2.0/mlflow-artifacts/artifacts{parsed.path}"
