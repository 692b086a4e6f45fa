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
    told,
)
from tundish.base.objects.opening import check_artifacts
from tundish.base.run_folder import Tracking
from tundish.base.text import holds_secret
from tundish.errors import RequestError, SpecError, StoreError
from tundish.tracking import this_process

SQLITE = "sqlite:///"
Stores = tuple[str, str | None]
"""URIs of the tracking store and of the model registry; None: the tracking store is the registry, too."""
MARK = "tundish.draft"
"""Tag by which a run is found that was made in MLflow by somebody who was killed before it could be noted."""


def tracking_uri() -> str:
    """What the user has chosen for MLflow, in this process or by the environment; else the file in `$TUNDISH_HOME`."""
    return _absolute(this_process.chosen_uri() or default_tracking_uri())


def registry_uri() -> str | None:
    """`MLFLOW_REGISTRY_URI`; Unity Catalog where Databricks does the tracking; else None: the tracking store is it."""
    if given := os.environ.get(this_process.REGISTRY_VARIABLE):  # `mlflow.set_registry_uri` sets it, too
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
            (this_process.VARIABLE, this_process.chosen_uri()),
            (this_process.REGISTRY_VARIABLE, os.environ.get(this_process.REGISTRY_VARIABLE)),
        )
        if given and holds_secret(given)
    ]


def _made(uri: str) -> str:
    """The same URI; the default store's folder and file are made for it."""
    if uri == default_tracking_uri():
        make_folder(home() / "mlflow")
        # SQLite itself would let nobody else write into it, in a home that a group shares.
        os.close(os.open(uri.removeprefix(SQLITE), os.O_WRONLY | os.O_CREAT, 0o666))
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


def open_tracking(
    run_name: str,
    experiment_name: str,
    tags: dict[str, str],
    root: str | None = None,
    answers: Callable[[], None] = lambda: None,
    *,
    stores: Stores | None = None,
) -> Tracking:
    """Make the experiment, where it does not exist, and the run.

    Args:
        run_name: tundish's and MLflow's name of the run.
        experiment_name: MLflow's.
        tags: of the run.
        root: path or URI below which the checkpoints go; None = the run's MLflow artifacts.
        answers: called when the store has answered, before anything is made in it.
        stores: the ones that the run's plan names; None: those that are chosen now.

    Raises:
        SpecError: MLflow refuses.
    """
    given, registry = stores or (tracking_uri(), registry_uri())
    uri = _made(given)
    # A SQLite file that is made by two at once is made by none: MLflow's migrations know no lock.
    alone = locked(home() / "mlflow" / "lock") if uri == default_tracking_uri() else nullcontext()
    try:
        with alone:
            client = open_client(uri)
        answers()
        with told(uri), quiet(), impatient():
            experiment = client.get_experiment_by_name(experiment_name)
            experiment_id = experiment.experiment_id if experiment else _create_experiment(client, experiment_name, uri)
            check_artifacts(client.get_experiment(experiment_id).artifact_location, uri)
            run = client.create_run(experiment_id, run_name=run_name, tags=tags)
    except StoreError as error:
        raise SpecError(f"experiment_path: MLflow takes no run in {experiment_name!r}: {error.message}") from error
    return Tracking(
        tracking_uri=uri,
        experiment_id=experiment_id,
        experiment_name=experiment_name,
        run_id=run.info.run_id,
        save_folder=_below(root or artifact_address(run.info.artifact_uri, uri), run_name),
        registry_uri=registry,
    )


def delete_runs(uri: str, experiment_name: str, mark: str) -> None:
    """Delete the MLflow runs that a `create()` has made and that came to nothing.

    Raises:
        StoreError: MLflow does not answer.
    """
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists():
        return  # killed before there was a store; asking would make one
    client = open_client(uri)
    with told(uri), quiet(), impatient():
        if (experiment := client.get_experiment_by_name(experiment_name)) is None:
            return
        for run in client.search_runs([experiment.experiment_id], f"tags.`{MARK}` = '{mark}'"):
            client.delete_run(run.info.run_id)


def check_registry(name: str, stores: Stores | None = None) -> None:
    """Ask the model registry for a name, where it is another store than the tracking's, which `create()` uses anyway.

    Raises:
        SpecError: it does not answer, or refuses the name. Better now than after the training.
    """
    tracking, registry = stores or (tracking_uri(), registry_uri())
    if registry is None:
        return
    try:
        ask_registry(registry, _made(tracking), name)
    except StoreError as error:
        raise SpecError(
            f"register_to: the model registry takes no model {name!r}: {error.message} MLFLOW_REGISTRY_URI names it."
        ) from error


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
    try:
        client = open_client(tracking.tracking_uri)
        with told(tracking.tracking_uri), impatient():
            client.update_run(tracking.run_id, "RUNNING")
    except StoreError as error:
        raise RequestError(
            f"MLflow cannot reopen run {tracking.run_id}: {error.message} Then resume the run again."
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
