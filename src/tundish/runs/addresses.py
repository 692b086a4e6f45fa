"""Where the checkpoint is that a user names: a path of this machine, a URI, or an MLflow run's artifact."""

import re

from tundish.errors import SpecError
from tundish.paths import default_tracking_uri, is_uri, resolve
from tundish.runs.reading import trackings
from tundish.runs.tracking import artifact_address, tracking_uri

ARTIFACT = re.compile(r"(?:dbfs:)?/databricks/mlflow-tracking/([^/]+)/([^/]+)/artifacts/(.+)")


def checkpoint_address(given: str) -> str:
    """The path or URI of a checkpoint, a `.symlink` or a `.pt` file.

    `dbfs:/databricks/mlflow-tracking/<experiment>/<run>/artifacts/…` is where that run's checkpoints are, wherever its
    save_folder was; for a run that this machine does not know, the tracking server is asked.

    Raises:
        SpecError: the path leaves its root, or names an MLflow run that nobody knows.
    """
    if artifact := ARTIFACT.fullmatch(given):
        return _of_run(artifact[2], artifact[3]) or _of_store(given, artifact[2], artifact[3])
    if is_uri(given) and not given.startswith("dbfs:"):
        return given
    return resolve(given)


def _of_run(mlflow_run: str, path: str) -> str | None:
    """In the save_folder of the run of this machine that has the MLflow run."""
    for paths, tracking in trackings():
        below = f"{paths.folder.name}/checkpoints/"
        if tracking.run_id == mlflow_run and path.startswith(below) and ".." not in path.split("/"):
            return f"{tracking.save_folder}/{path.removeprefix(below)}"
    return None


def _of_store(given: str, mlflow_run: str, path: str) -> str:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        return resolve(given)
    except SpecError as missing:
        if tracking_uri() == default_tracking_uri():
            raise
        try:
            root = str(MlflowClient(tracking_uri()).get_run(mlflow_run).info.artifact_uri)
        except MlflowException as error:
            raise missing from error
        if ".." in path.split("/"):
            raise SpecError(f"{given}: leaves its run. Copy the path from get_checkpoints().") from missing
        return f"{artifact_address(root, tracking_uri())}/{path}"
