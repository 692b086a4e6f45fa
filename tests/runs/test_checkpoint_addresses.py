"""runs/addresses.py: the paths of the managed service mean checkpoints, wherever these are."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tundish.base.mlflow_client import artifact_address
from tundish.base.run_folder import RunFolder
from tundish.errors import SpecError
from tundish.plan.address import Address
from tundish.plan.spec import RunSpec
from tundish.runs.checkpoint_addresses import checkpoint_address, model_of_run

pytestmark = pytest.mark.slow

MakeRun = Callable[..., RunFolder]
OF_RUN = "dbfs:/databricks/mlflow-tracking/1/id-of-ift-1/artifacts/ift-1/checkpoints/ep1-ba10"


def _address(given: str) -> str:
    return checkpoint_address(Address.parse(given, "checkpoint"))


@pytest.mark.parametrize("save_folder", ["s3://lab/ift-1/checkpoints", "/mnt/big/ift-1/checkpoints"])
def test_an_artifact_path_is_where_its_run_saved(make_run: MakeRun, save_folder: str) -> None:
    """Notebooks name checkpoints by the service's paths; those of a run that saves elsewhere would not be found."""
    paths = make_run("ift-1", ("CREATED", "waits"))
    replace(paths.read_tracking(), save_folder=save_folder).write(paths)
    assert _address(OF_RUN) == f"{save_folder}/ep1-ba10"
    assert _address(OF_RUN.removeprefix("dbfs:")) == f"{save_folder}/ep1-ba10"


def test_another_run_that_is_damaged_keeps_no_run_from_being_created(make_run: MakeRun) -> None:
    """Weights of a run whose spec was lost could not be used any more: `create()` would name the other run's file."""
    paths = make_run("ift-1", ("CREATED", "waits"))
    address = f"{paths.read_tracking().save_folder}/ep1-ba1"
    assert model_of_run(address) == RunSpec.read(paths).model
    paths.spec.write_text("{")
    assert model_of_run(address) is None


@pytest.mark.parametrize("rest", ["ift-1/checkpoints/../../../secret", "../../x"])
def test_an_artifact_path_stays_in_its_run(make_run: MakeRun, rest: str) -> None:
    """Any checkpoint of the store, or file of the machine, would be read by way of a run."""
    make_run("ift-1", ("CREATED", "waits"))
    with pytest.raises(SpecError):
        _address(f"dbfs:/databricks/mlflow-tracking/1/id-of-ift-1/artifacts/{rest}")


def test_a_server_is_asked_for_runs_of_other_machines(
    mlflow_server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A colleague's run, trained elsewhere, would have no path."""
    from mlflow import MlflowClient

    uri, _ = mlflow_server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(uri)
    mlflow_run = client.create_run(client.create_experiment("of another machine"))
    experiment, run = mlflow_run.info.experiment_id, mlflow_run.info.run_id
    given = f"dbfs:/databricks/mlflow-tracking/{experiment}/{run}/artifacts/ift-9/checkpoints/ep1-ba1"
    address = _address(given)
    assert address == f"{uri}/api/2.0/mlflow-artifacts/artifacts/{experiment}/{run}/artifacts/ift-9/checkpoints/ep1-ba1"
    with pytest.raises(SpecError, match=r"(has no MLflow run|the run or its experiment no longer exists)"):
        _address(given.replace(str(run), "0" * 32))


def test_other_addresses_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path or a URI would be taken for another."""
    monkeypatch.chdir(tmp_path)
    assert _address("s3://lab/x/ep1-ba1") == "s3://lab/x/ep1-ba1"
    assert _address("./ep1-ba1") == str(tmp_path / "ep1-ba1")


def test_artifacts_have_one_address_for_every_process() -> None:
    """`mlflow-artifacts:/` means another server wherever MLFLOW_TRACKING_URI is another."""
    served = "https://lab:8443/api/2.0/mlflow-artifacts/artifacts/1/ab/artifacts"
    assert artifact_address("mlflow-artifacts:/1/ab/artifacts", "https://lab:8443/") == served
    assert artifact_address("mlflow-artifacts://lab:8443/1/ab/artifacts", "https://other") == served
    assert artifact_address("s3://b/1/ab/artifacts", "https://lab") == "s3://b/1/ab/artifacts"
    assert artifact_address("file:///a%20b/c", "sqlite:///x.db") == artifact_address("/a b/c", "x") == "/a b/c"
