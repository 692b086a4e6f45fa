"""mlflow_process.py: `mlflow` in a notebook finds its runs, and its user's choice is everybody's."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish import foundation_model as fm
from tundish.base.run_folder import RunFolder
from tundish.errors import SpecError
from tundish.runs import planning
from tundish.tracking import this_process
from tundish.tracking.experiment import open_tracking, tracking_uri

MakeRun = Callable[..., RunFolder]


def test_mlflow_finds_a_run_that_was_read_here(
    make_run: MakeRun, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mlflow.get_run(run.run_id)` would say that there is none, and leave an `mlruns` folder where the notebook is."""
    import mlflow

    folder = tmp_path / "notebook folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    open_tracking("chat-1", "/Users/me/chat-1", {}).write(make_run("chat-1", experiment_path="/Users/me/chat-1"))
    for read in (lambda: fm.get("chat-1"), lambda: fm.list()[0]):
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run = read()
        assert run.tracking_uri == f"sqlite:///{home}/mlflow/mlflow.db"
        assert mlflow.get_run(str(run.run_id)).info.run_name == "chat-1"
        found: Any = mlflow.search_runs(experiment_names=[run.experiment_path])
        assert list(found["run_id"]) == [run.run_id] and mlflow.get_registry_uri() == run.tracking_uri
    assert not list(folder.iterdir())


def test_what_the_user_has_set_for_mlflow_is_used_and_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs would be in a store that the notebook does not look at, or its other work go to ours."""
    import mlflow

    server, file = "http://server:5000", f"sqlite:///{tmp_path}/mine.db"
    mlflow.set_tracking_uri(file)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)  # later, and MLflow itself does not look at it any more
    assert tracking_uri() == mlflow.get_tracking_uri() == file
    assert not this_process.use("sqlite:////ours.db", None) and mlflow.get_tracking_uri() == file
    mlflow.set_tracking_uri(None)  # pyright: ignore[reportArgumentType]  which removes the variable as well
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    assert tracking_uri() == server and not this_process.use("sqlite:////ours.db", None)


def test_what_tundish_has_set_is_nobody_s_choice(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one store, looked at, would send the next run there; or the user could choose none any more."""
    assert this_process.use("sqlite:////a.db", None) and not this_process.use("sqlite:////a.db", None)
    assert this_process.use("databricks", "databricks-uc")
    assert os.environ["MLFLOW_TRACKING_URI"] == "databricks" and os.environ["MLFLOW_REGISTRY_URI"] == "databricks-uc"
    assert tracking_uri() == f"sqlite:///{home}/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking_uri() == "http://server:5000" and not this_process.use("sqlite:////a.db", None)


def test_a_password_in_what_mlflow_was_told_is_refused(arguments: dict[str, Any]) -> None:
    """It would be in the run's files: it was looked for in the environment alone."""
    import mlflow

    mlflow.set_tracking_uri("postgresql://lab:geheim@db/mlflow")
    os.environ["MLFLOW_TRACKING_URI"] = "sqlite:////other.db"
    with pytest.raises(SpecError, match="holds a password"):
        planning.render_only(arguments)
