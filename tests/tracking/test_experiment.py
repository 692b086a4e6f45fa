"""runs/tracking.py: a run's place in MLflow is found again. Opening a store is tested with the runs that train."""

from pathlib import Path

import pytest

from tundish.base.run_folder import RunFolder
from tundish.tracking.experiment import Tracking, planned_save_folder, registry_uri, tracking_uri


def test_what_was_made_in_mlflow_is_read_back(tmp_path: Path) -> None:
    """Stages would log to another run than `create()` has made."""
    paths = RunFolder(tmp_path)
    paths.result("tracking").parent.mkdir()
    tracking = Tracking(
        tracking_uri="sqlite:////x.db", experiment_id="1", experiment_name="/Users/ü", run_id="abc", save_folder="/s"
    )
    tracking.write(paths)
    assert paths.read_tracking() == tracking


def test_the_store_is_the_environment_s_or_a_file_in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics would go to a store that nobody looks at."""
    assert tracking_uri() == f"sqlite:///{home}/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking_uri() == "http://server:5000"


def test_checkpoints_are_planned_in_the_artifacts_of_the_run(home: Path) -> None:
    """`dbfs:/databricks/mlflow-tracking/…/artifacts/…` paths would not find them; experiments would share a folder."""
    planned = planned_save_folder("chat-1", "/Users/me/chat-1")
    assert planned.startswith(f"{home}/mlflow/artifacts/")
    assert planned.endswith("/{mlflow_run_id}/artifacts/chat-1/checkpoints")
    assert planned != planned_save_folder("chat-1", "/Users/me/chat-2")


@pytest.mark.parametrize(
    ("tracking", "registry", "found"),
    [
        (None, None, None),
        ("http://server:5000", None, None),
        ("databricks", None, "databricks-uc"),
        ("databricks://work", None, "databricks-uc://work"),
        ("databricks", "databricks", "databricks"),
        ("http://server:5000", "uc:http://catalog:8080", "uc:http://catalog:8080"),
        (None, "databricks-uc://work", "databricks-uc://work"),
    ],
)
def test_the_registry_is_the_environment_s_or_unity_catalog_or_the_store(
    tracking: str | None, registry: str | None, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models would be registered where nobody looks for them."""
    for name, value in (("MLFLOW_TRACKING_URI", tracking), ("MLFLOW_REGISTRY_URI", registry)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert registry_uri() == found


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("sqlite:///mlflow.db", "sqlite:///{here}/mlflow.db"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("./mlruns", "{here}/mlruns"),
        ("/data/mlruns", "/data/mlruns"),
        ("file:///data/mlruns", "file:///data/mlruns"),
        ("databricks", "databricks"),
    ],
)
def test_a_store_named_from_here_is_the_same_for_the_run(
    given: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of a run's processes would open a store of its own, in its own working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert tracking_uri() == found.format(here=tmp_path)


def test_each_run_saves_below_the_root_that_was_given(home: Path) -> None:
    """Two runs would write into one folder, or one of them into the root itself."""
    from tundish.plan.overrides import save_root

    for given, root in (
        ({"save_folder": "s3://lab/x/"}, "s3://lab/x"),
        ({"save_folder": "/mnt/big"}, "/mnt/big"),
    ):
        assert planned_save_folder("chat-1", "/Users/me/chat-1", save_root(given)) == f"{root}/chat-1/checkpoints"
    assert save_root({"seed": 1}) is None
