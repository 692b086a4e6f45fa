"""Where a checkpoint is that a user names: a path on this machine, a URI, or an artifact of an MLflow run."""

from contextlib import suppress

from tundish.base.home import default_tracking_uri
from tundish.base.mlflow_client import artifact_address, open_client, store_errors
from tundish.errors import RunDamagedError, RunNotFoundError, SpecError, StoreError
from tundish.plan.address import ARTIFACTS, Address
from tundish.plan.spec import RunSpec
from tundish.runs.reading import trackings
from tundish.tracking.experiment import tracking_uri


def checkpoint_address(address: Address) -> str:
    """The path or URI of a checkpoint, a `.symlink` or a `.pt` file.

    `dbfs:/databricks/mlflow-tracking/<experiment>/<run>/artifacts/…` leads to the checkpoints of that run, wherever its
    save_folder is; for a run that is not of this machine, the tracking server is asked.

    Raises:
        SpecError: it names an MLflow run that is unknown.
    """
    if address.kind != "artifact":
        return address.text
    _, mlflow_run, _, path = address.text.removeprefix(f"dbfs:{ARTIFACTS}").split("/", 3)
    return _of_run(mlflow_run, path) or _of_store(address.text, mlflow_run, path)


def model_of_run(address: str) -> str | None:
    """The model that the run of a checkpoint started from; None if no run here saved it, or that run is damaged."""
    for run, tracking in trackings():
        if tracking.save_folder == address.rstrip("/").rpartition("/")[0]:
            with suppress(RunDamagedError, RunNotFoundError):
                return RunSpec.read(run).model
    return None


def _of_run(mlflow_run: str, path: str) -> str | None:
    """The address in the save_folder of the run of this machine that has this MLflow run."""
    for run, tracking in trackings():
        below = f"{run.folder.name}/checkpoints/"
        if tracking.run_id == mlflow_run and path.startswith(below):
            return f"{tracking.save_folder}/{path.removeprefix(below)}"
    return None


def _of_store(given: str, mlflow_run: str, path: str) -> str:
    try:
        # "file", not "checkpoint": any artifact in the folders of the default store.
        return Address.parse(given, "file").text
    except SpecError as missing:
        if tracking_uri() == default_tracking_uri():
            raise
        try:
            client = open_client(tracking_uri())
            with store_errors(tracking_uri()):
                root = str(client.get_run(mlflow_run).info.artifact_uri)
        except StoreError as error:
            raise SpecError(f"{given}: {error.message}") from missing
        return f"{artifact_address(root, tracking_uri())}/{path}"
