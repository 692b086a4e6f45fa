"""mlflow_store.py: who looks into a database by MLflow leaves nothing in the folder where that is done."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_reading_a_database_leaves_no_folder_behind(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An `mlruns` folder in every working directory; or one with somebody's runs be removed."""
    from mlflow import MlflowClient

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (home / "mlflow").mkdir(parents=True)
    clients: list[Any] = [MlflowClient(f"sqlite:///{path}") for path in (tmp_path / "x.db", home / "mlflow/mlflow.db")]
    mine, ours = (client.get_experiment("0").artifact_location for client in clients)
    assert not list(Path().iterdir())
    assert mine == f"{tmp_path}/here/mlruns/0" and ours == f"file://{home}/mlflow/artifacts/0"
    Path("mlruns").mkdir()
    client: Any = MlflowClient(f"sqlite:///{tmp_path}/y.db")
    assert client.get_experiment("0") and Path("mlruns").is_dir()
