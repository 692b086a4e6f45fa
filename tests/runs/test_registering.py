"""The register stage, run by the supervisor: what fails keeps the export, and one command registers it."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tundish import foundation_model as fm
from tundish.base import events
from tundish.base.files import write_atomic
from tundish.base.processes import processes_with
from tundish.base.run_folder import RUN_VARIABLE, RunFolder
from tundish.checkpoints.save_folder import SaveFolder
from tundish.errors import RequestError, SpecError, StageError
from tundish.supervise import stage_process
from tundish.tracking.experiment import check_registry, open_tracking

pytestmark = pytest.mark.slow

MakeRun = Callable[..., RunFolder]


@pytest.fixture
def exported_run(make_run: MakeRun, tiny_model: Path) -> Callable[[str], RunFolder]:
    """Makes a run that has failed after its export, with an MLflow run in the store of the environment."""

    def make(name: str) -> RunFolder:
        paths = make_run(name, ("CREATED", "waits"), ("FAILED", "in register"))
        open_tracking(name, f"/Users/me/{name}", {}).write(paths)
        shutil.copytree(tiny_model, paths.export)
        write_atomic(paths.foundry_yaml, "global_train_batch_size: 4\nsave_num_checkpoints_to_keep: -1\n")
        for stage in ("prepare", "train", "export"):
            write_atomic(paths.result(stage), "{}")
        return paths

    return make


def test_a_registration_that_fails_keeps_the_export_and_resume_makes_up_for_it(
    exported_run: Callable[[str], RunFolder], mlflow_server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Days of training would be lost to a full disk; or COMPLETED be said before there is a version."""
    from mlflow import MlflowClient

    server, artifacts = mlflow_server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    client = MlflowClient(server)
    paths = exported_run("chat-1")
    # Another shell, which does not know of the server.
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with _no_room(artifacts):
        failed = fm.resume("chat-1").wait(timeout=900)
    assert failed.status.display_name == "Failed"
    for part in (
        f"main.lab.chat-1 could not be registered: {server}: it returned a server error (500). Check the",
        f"The export is kept: {paths.export}. `tundish resume chat-1` registers it.",
        str(paths.log("register")),
    ):
        assert part in str(failed.details)
    assert (paths.export / "model.safetensors").is_file() and not paths.scratch.exists()
    run_id = paths.read_tracking().run_id
    assert client.get_run(run_id).info.status == "FAILED"

    done = fm.resume("chat-1").wait(timeout=900)
    assert done.status.display_name == "Completed", done.details
    assert done.details == "Run completed. Registered as version 1 of main.lab.chat-1."
    (version,) = client.search_model_versions("name='main.lab.chat-1'")
    assert (version.status, version.run_id) == ("READY", run_id)
    assert client.get_run(run_id).info.status == "FINISHED"
    messages = [event.message for event in events.read(paths.events) if event.type == "REQUEUED"]
    assert messages == ["Run resumed by user. Training is done; the stages after it continue."] * 2


@contextmanager
def _no_room(folder: Path) -> Iterator[None]:
    """Nothing can be written into a folder, not even by root."""
    aside = folder.rename(folder.with_name("aside"))
    folder.write_text("no folder")
    try:
        yield
    finally:
        folder.unlink()
        aside.rename(folder)


def test_a_run_that_was_killed_when_all_was_done_is_finished_in_mlflow_too(
    exported_run: Callable[[str], RunFolder],
) -> None:
    """Resuming opens the MLflow run again, and no stage is left that ends it: it would seem to run for ever."""
    from mlflow import MlflowClient

    paths = exported_run("chat-1")
    write_atomic(paths.result("register"), json.dumps({"name": "main.lab.chat-1", "version": "1"}))
    paths.scratch.mkdir(parents=True)
    assert fm.resume("chat-1").wait(timeout=900).status.display_name == "Completed"
    tracking = paths.read_tracking()
    assert MlflowClient(tracking.tracking_uri).get_run(tracking.run_id).info.status == "FINISHED"
    assert not paths.scratch.exists(), "MLflow's copy of a large model"


def test_a_server_that_never_answers_is_given_up_with_all_its_processes(
    exported_run: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that hangs for ever at its last stage, or a copy of the model left behind."""
    monkeypatch.setenv("TUNDISH_MLFLOW_WAIT", "0")  # for the tracking server: that one is here
    paths, wait = exported_run("chat-2"), stage_process._wait
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracking = json.loads(paths.result("tracking").read_text())
        write_atomic(paths.result("tracking"), json.dumps(tracking | {"registry_uri": uri}))
        asked: list[socket.socket] = []

        def soon(process: subprocess.Popen[bytes], limit: float | None) -> int | None:
            """The half hour is over when the server has been asked, however long the machine takes to come to that."""
            assert limit is not None and limit >= 1800
            asked.append(silent.accept()[0])
            return wait(process, 0.1)

        monkeypatch.setattr(stage_process, "_wait", soon)
        with pytest.raises(StageError, match=r"was not done after 1,800 s, and was stopped.*`tundish resume chat-2`"):
            stage_process.run_stage(paths, "register", stage_process.Devices())
        asked[0].close()
    assert not processes_with(RUN_VARIABLE, str(paths.events))
    assert paths.export.is_dir() and not paths.scratch.exists()


def test_a_large_upload_may_take_longer(make_run: Callable[..., RunFolder]) -> None:
    """A large model's, or that of its checkpoints, for which the server was away, would be stopped half done."""
    paths = make_run("chat-1", ("CREATED", "waits"))
    local = paths.read_tracking()
    stored = replace(local, save_folder="s3://lab/chat-1/checkpoints")
    for folder, size in ((paths.export, 140), (SaveFolder(stored.save_folder).local / "ep1-ba1", 420)):
        folder.mkdir(parents=True)
        with open(folder / "weights", "wb") as file:
            file.truncate(size * 10**9)
    assert stage_process._register_seconds(paths) == 1800 + 14_000
    stored.write(paths)
    assert stage_process._register_seconds(paths) == 1800 + 56_000


def test_resuming_without_the_server_is_refused_in_a_sentence(
    exported_run: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback after four minutes, and a run that is neither failed nor going on."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    paths = exported_run("chat-3")
    tracking = json.loads(paths.result("tracking").read_text())
    write_atomic(paths.result("tracking"), json.dumps(tracking | {"tracking_uri": "http://127.0.0.1:1"}))
    with pytest.raises(
        RequestError,
        match=r"MLflow run \S+ cannot be reopened: .*http://127\.0\.0\.1:1: connection refused.*Then resume the run",
    ):
        fm.resume("chat-3")
    assert events.read(paths.events)[-1].type == "FAILED"


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1", "uc:http://127.0.0.1:1", "databricks-uc"])
def test_a_registry_that_cannot_be_used_is_told_before_the_training(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be told when the model has been trained."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", uri)
    for name in [name for name in os.environ if name.startswith("DATABRICKS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", "/nowhere")
    with pytest.raises(SpecError, match=f"^register_to: the model registry does not accept 'main.lab.x': {uri}: "):
        check_registry("main.lab.x")
