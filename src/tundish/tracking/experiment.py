"""A run's place in MLflow: its experiment, its run, its artifact folder."""

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tundish.base.files import locked, make_folder
from tundish.base.home import default_tracking_uri, home, mlflow_artifacts_dir
from tundish.base.mlflow_client import (
    artifact_address,
    ask_registry,
    impatient,
    open_client,
    quiet,
    store_errors,
)
from tundish.base.objects.opening import check_artifacts
from tundish.base.run_folder import Tracking
from tundish.base.text import holds_secret
from tundish.errors import RequestError, SpecError, StoreError
from tundish.tracking import this_process

SQLITE = "sqlite:///"
Stores = tuple[str, str | None]
"""URIs of the tracking store and of the model registry; None: the tracking store is also the registry."""
MARK = "tundish.draft"
"""Tag of an MLflow run, by which it is found if the process that created it was killed before it could record it."""


def tracking_uri() -> str:
    """The store that the user chose, in this process or in the environment; by default the file in `$TUNDISH_HOME`."""
    return _absolute(this_process.chosen_uri() or default_tracking_uri())


def registry_uri() -> str | None:
    """`MLFLOW_REGISTRY_URI`, or Unity Catalog if Databricks does the tracking; None: the tracking store is one."""
    if uri := os.environ.get(this_process.REGISTRY_VARIABLE):  # `mlflow.set_registry_uri` sets it too
        return _absolute(uri)
    scheme, separator, profile = tracking_uri().partition("://")
    return f"databricks-uc{separator}{profile}" if scheme == "databricks" else None


def uri_problems() -> list[str]:
    """A problem for each URI whose password would be written into a run's files and logs."""
    return [
        f"{name}: holds a password, which would be written into the run's files. Remove it, and set "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, PGPASSWORD or ~/.pgpass for PostgreSQL, "
        "an option file for MySQL."
        for name, uri in (
            (this_process.VARIABLE, this_process.chosen_uri()),
            (this_process.REGISTRY_VARIABLE, os.environ.get(this_process.REGISTRY_VARIABLE)),
        )
        if uri and holds_secret(uri)
    ]


def _create_default_store(uri: str) -> None:
    """Create the folder and the file of the default store, if `uri` is that."""
    if uri == default_tracking_uri():
        make_folder(home() / "mlflow")
        # SQLite creates files with mode 0644: in a home that a group shares, the others could not write to it.
        os.close(os.open(uri.removeprefix(SQLITE), os.O_WRONLY | os.O_CREAT, 0o666))


def _absolute(uri: str) -> str:
    """The URI with an absolute path."""
    # Relative ones mean the caller's working directory, and a run's processes have another.
    if ":" not in uri and uri not in ("databricks", "databricks-uc"):
        return str(Path(uri).absolute())
    relative = re.fullmatch(r"(sqlite:///)([^/:?].*)", uri)
    return relative[1] + str(Path(relative[2]).absolute()) if relative else uri


def planned_save_folder(run_name: str, experiment_name: str, root: str | None = None) -> str:
    """The save folder before the MLflow run exists; Composer fills in the id of that run."""
    return _below(root or f"{_artifact_root(experiment_name)}/{{mlflow_run_id}}/artifacts", run_name)


def _below(root: str, run_name: str) -> str:
    return f"{root.rstrip('/')}/{run_name}/checkpoints"


def open_tracking(
    run_name: str,
    experiment_name: str,
    tags: dict[str, str],
    root: str | None = None,
    on_answer: Callable[[], None] = lambda: None,
    *,
    stores: Stores | None = None,
) -> Tracking:
    """Create the experiment, if it does not exist, and the run.

    Args:
        run_name: the run's name, in tundish and in MLflow.
        experiment_name: the experiment's name in MLflow.
        tags: of the run.
        root: path or URI below which the checkpoints go; None: the run's MLflow artifacts.
        on_answer: called when the store has answered, before anything is created in it.
        stores: those that the run's plan names; None: those that are chosen now.

    Raises:
        SpecError: the store cannot be used, or refuses the run.
    """
    uri, registry = stores or (tracking_uri(), registry_uri())
    _create_default_store(uri)
    # MLflow's migrations take no lock: if two processes set up one SQLite file at once, neither succeeds.
    lock = locked(home() / "mlflow" / "lock") if uri == default_tracking_uri() else nullcontext()
    try:
        with lock:
            client = open_client(uri)
        on_answer()
        with store_errors(uri), quiet(), impatient():
            experiment = client.get_experiment_by_name(experiment_name)
            experiment_id = experiment.experiment_id if experiment else _create_experiment(client, experiment_name, uri)
            check_artifacts(client.get_experiment(experiment_id).artifact_location, uri)
            run = client.create_run(experiment_id, run_name=run_name, tags=tags)
    except StoreError as error:
        raise SpecError(
            f"experiment_path: MLflow cannot create a run in {experiment_name!r}: {error.message}"
        ) from error
    return Tracking(
        tracking_uri=uri,
        experiment_id=experiment_id,
        experiment_name=experiment_name,
        run_id=run.info.run_id,
        save_folder=_below(root or artifact_address(run.info.artifact_uri, uri), run_name),
        registry_uri=registry,
    )


def delete_runs(uri: str, experiment_name: str, mark: str) -> None:
    """Delete the MLflow runs of a `create()` that did not complete, by their tag MARK.

    Raises:
        StoreError: MLflow does not answer.
    """
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists():
        return  # killed before the store existed; asking would create it
    client = open_client(uri)
    with store_errors(uri), quiet(), impatient():
        if (experiment := client.get_experiment_by_name(experiment_name)) is None:
            return
        for run in client.search_runs([experiment.experiment_id], f"tags.`{MARK}` = '{mark}'"):
            client.delete_run(run.info.run_id)


def check_registry(name: str, stores: Stores | None = None) -> None:
    """Look up a name in the model registry, if that is a store of its own: `create()` uses the tracking store anyway.

    Raises:
        SpecError: it does not answer, or refuses the name.
    """
    tracking, registry = stores or (tracking_uri(), registry_uri())
    if registry is None:
        return
    _create_default_store(tracking)
    try:
        ask_registry(registry, tracking, name)
    except StoreError as error:
        raise SpecError(
            f"register_to: the model registry does not accept {name!r}: {error.message} "
            "MLFLOW_REGISTRY_URI names the registry."
        ) from error


def end_tracking(tracking: Tracking, status: str) -> None:
    """Close the MLflow run with `FAILED` or `KILLED`; gives up after half a minute on a server that does not answer."""
    from mlflow import MlflowClient

    with impatient():
        MlflowClient(tracking.tracking_uri).set_terminated(tracking.run_id, status)


def reopen_tracking(tracking: Tracking) -> None:
    """Set a closed MLflow run to `RUNNING` again.

    Raises:
        RequestError: MLflow does not answer, or does not have it.
    """
    try:
        client = open_client(tracking.tracking_uri)
        with store_errors(tracking.tracking_uri), impatient():
            client.update_run(tracking.run_id, "RUNNING")
    except StoreError as error:
        raise RequestError(
            f"MLflow run {tracking.run_id} cannot be reopened: {error.message} Then resume the run again."
        ) from error


def _create_experiment(client: Any, name: str, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    # MLflow's default is a folder in the working directory; a server has a setting of its own.
    location = None if uri.startswith("http") else _artifact_root(name).as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:
        # Another process may have created it in the meantime.
        if (experiment := client.get_experiment_by_name(name)) is None:
            raise
        return experiment.experiment_id


def _artifact_root(experiment_name: str) -> Path:
    return mlflow_artifacts_dir() / hashlib.sha256(experiment_name.encode()).hexdigest()[:16]
