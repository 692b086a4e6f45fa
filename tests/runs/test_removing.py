"""runs/removing.py: a removed run is gone, what others need stays."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tundish import foundation_model as fm
from tundish.base import events
from tundish.base.files import locked
from tundish.base.run_folder import RunFolder, Tracking
from tundish.errors import RequestError, RunNotFoundError
from tundish.runs import removing
from tundish.tracking.experiment import open_tracking

MakeRun = Callable[..., RunFolder]
ENDED = (("CREATED", "waits"), ("FAILED", "in train"))


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow keeps files: no database has to be made."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())


def _tracked(paths: RunFolder) -> Any:
    """Give the run an MLflow run and a checkpoint, and return MLflow's client."""
    from mlflow import MlflowClient

    tracking = open_tracking(paths.folder.name, "/Users/me/x", {}, root=str(paths.folder.parent.parent / "saved"))
    tracking.write(paths)
    checkpoint = Path(tracking.save_folder) / "ep1-ba2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "__0_0.distcp").write_bytes(bytes(100_000))
    return MlflowClient(tracking.tracking_uri)


def test_a_run_goes_with_its_checkpoints_and_its_mlflow_run(make_run: MakeRun) -> None:
    """The disk would stay full, or another run lose something."""
    paths, other = make_run("chat-1", *ENDED), make_run("chat-2", *ENDED)
    client = _tracked(paths)
    _tracked(other)
    tracking = paths.read_tracking()
    (plan,) = removing.plan(["chat-1", "chat-1"])
    assert (plan.name, plan.status) == ("chat-1", "FAILED") and 100_000 <= plan.bytes < 200_000
    assert paths.folder.exists(), "a plan removes nothing"
    removing.remove(plan)
    assert [run.name for run in fm.list()] == ["chat-2"]
    assert not Path(tracking.save_folder).parent.exists() and Path(other.read_tracking().save_folder).exists()
    assert client.get_run(tracking.run_id).info.lifecycle_stage == "deleted"
    assert client.get_run(other.read_tracking().run_id).info.lifecycle_stage == "active"
    with pytest.raises(RunNotFoundError):
        removing.plan(["chat-1"])


def test_a_registered_version_stays_and_so_does_what_it_is_read_from(make_run: MakeRun, tmp_path: Path) -> None:
    """`models:/…` would name files that are gone."""
    paths = make_run("chat-1", *ENDED)
    client, tracking = _tracked(paths), paths.read_tracking()
    model = tmp_path / "model"
    model.mkdir()
    client.create_registered_model("main.lab.chat-1")
    client.create_model_version("main.lab.chat-1", model.as_uri(), run_id=tracking.run_id)
    (plan,) = removing.plan(["chat-1"])
    assert plan.notes == ["main.lab.chat-1 version 1 is kept, and with it the MLflow run that it was logged in."]
    removing.remove(plan)
    assert client.get_run(tracking.run_id).info.lifecycle_stage == "active" and model.exists()
    assert client.get_model_version("main.lab.chat-1", "1").run_id == tracking.run_id
    assert not paths.folder.exists() and not Path(tracking.save_folder).exists()


def test_a_run_that_goes_on_is_not_removed(make_run: MakeRun) -> None:
    """Its processes would write into nothing; all that is in the way must be told at once."""
    for name in ("chat-1", "chat-2"):  # just created: its supervisor is about to start
        events.append(make_run(name).events, "CREATED", "waits")
    with pytest.raises(
        RequestError, match=r"chat-1 is still active. Stop it with `tundish cancel chat-1`.*chat-2 is still active"
    ):
        removing.plan(["chat-1", "chat-2"], local=True)


def test_a_run_that_is_resumed_meanwhile_stays(make_run: MakeRun) -> None:
    """Between the question and its answer, somebody may go on with it."""
    paths = make_run("chat-1", *ENDED)
    (plan,) = removing.plan(["chat-1"], local=True)
    events.append(paths.events, "REQUEUED", "Run resumed by user.")
    with pytest.raises(RequestError, match="chat-1 is still active"):
        removing.remove(plan)
    assert paths.spec.exists()


def test_checkpoints_that_another_run_begins_with_stay(make_run: MakeRun) -> None:
    """The other run would fail when it reads them."""
    paths = make_run("chat-1", *ENDED)
    checkpoint = f"{paths.read_tracking().save_folder}/ep1-ba2"
    user = make_run("chat-2", custom_weights_path=checkpoint)
    events.append(user.events, "CREATED", "waits")
    with pytest.raises(RequestError, match="chat-2 starts from a checkpoint of chat-1"):
        removing.plan(["chat-1"], local=True)
    events.append(user.events, "COMPLETED", "done")
    assert removing.plan(["chat-1"], local=True)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("broken", ["spec", "tracking", "events"])
def test_a_damaged_run_can_be_removed(make_run: MakeRun, broken: str, local: bool) -> None:
    """It would be listed for ever."""
    paths = make_run("chat-1", *ENDED)
    _tracked(paths)
    file = {"spec": paths.spec, "tracking": paths.result("tracking"), "events": paths.events}[broken]
    file.write_text('{"cut": ')
    (plan,) = removing.plan(["chat-1"], local=local)
    assert plan.status == "DAMAGED" and plan.mlflow is None
    assert ("are kept: the file that says where they are cannot be read" in " ".join(plan.notes)) == (
        broken == "tracking"
    )
    with locked(paths.lock), pytest.raises(RequestError, match="is still active"):
        removing.remove(plan)
    removing.remove(plan)
    assert not paths.folder.exists()


def test_a_folder_that_is_not_ours_is_left_alone(make_run: MakeRun, tmp_path: Path) -> None:
    """A save_folder that somebody has changed by hand would be removed, whatever is in it."""
    paths, mine = make_run("chat-1", *ENDED), tmp_path / "mine"
    mine.mkdir()
    content = {field: getattr(paths.read_tracking(), field) for field in Tracking.__slots__}
    Tracking(**content | {"save_folder": str(mine)}).write(paths)
    (plan,) = removing.plan(["chat-1"], local=True)
    assert plan.notes[0] == f"Its checkpoints are kept: {mine} is not a folder that tundish created."
    removing.remove(plan)
    assert mine.exists() and not paths.folder.exists()


def test_a_store_that_is_away_keeps_the_run_unless_it_is_not_asked(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the run would be gone; or a run whose server is gone for good stay for ever."""
    paths = make_run("chat-1", *ENDED)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    content = {field: getattr(paths.read_tracking(), field) for field in Tracking.__slots__}
    Tracking(**content | {"tracking_uri": "http://127.0.0.1:9"}).write(paths)
    with pytest.raises(RequestError, match=r"does not answer for run id-of-chat-1: .*Use --local to remove only"):
        removing.plan(["chat-1"])
    assert paths.spec.exists()
    (plan,) = removing.plan(["chat-1"], local=True)
    assert plan.notes == ["Its MLflow run id-of-chat-1 is kept."]
    removing.remove(plan)
    assert not paths.folder.exists()


def test_a_removal_that_was_interrupted_can_be_done_again(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a checkpoint would look whole, or the run be gone and its checkpoints stay."""
    paths = make_run("chat-1", *ENDED)
    save_folder = Path(paths.read_tracking().save_folder)
    (save_folder / "ep1-ba2").mkdir(parents=True)
    (plan,) = removing.plan(["chat-1"], local=True)
    rmtree = removing.shutil.rmtree
    monkeypatch.setattr("tundish.checkpoints.save_folder.shutil.rmtree", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        removing.remove(plan)
    monkeypatch.setattr("tundish.checkpoints.save_folder.shutil.rmtree", rmtree)
    assert not save_folder.exists() and fm.get("chat-1").status.value == "FAILED"
    removing.remove(removing.plan(["chat-1"], local=True)[0])
    assert os.listdir(paths.folder.parent) == [] and not save_folder.parent.exists()


def _interrupt(path: Path, ignore_errors: bool = False) -> None:
    if not ignore_errors:
        raise KeyboardInterrupt


def test_old_runs_are_those_that_ended_long_ago(make_run: MakeRun) -> None:
    """A run that was created long ago and ended yesterday, or goes on, would be removed."""
    make_run("old", ("CREATED", "waits"), created_at="2026-01-01T10:00:00+00:00")
    make_run("new", *ENDED, created_at="2026-01-01T10:00:00+00:00")
    going = make_run("going", created_at="2026-01-01T10:00:00+00:00")
    events.append(going.events, "CREATED", "waits")
    make_run("damaged", *ENDED).spec.write_text("{")
    assert "new" not in removing.ended_before(datetime(2026, 6, 1, tzinfo=UTC))
    assert removing.ended_before(datetime.now(UTC)) == ["new"]
