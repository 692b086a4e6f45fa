"""Sending on what waits on a run's disk, to a real MLflow server that goes away and comes back."""

import errno
import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tundish.base import events
from tundish.base.journal import Journal
from tundish.base.run_folder import RunFolder
from tundish.checkpoints.save_folder import SaveFolder
from tundish.errors import StageError, StoreError, TundishError
from tundish.tracking.experiment import open_tracking
from tundish.tracking.publishing import (
    AWAY,
    BACK,
    Checkpoints,
    Publisher,
    channels,
    publish_all,
    set_status,
    wait_seconds,
)

pytestmark = pytest.mark.slow

MakeRun = Callable[..., RunFolder]


def _run(make_run: MakeRun, name: str) -> RunFolder:
    paths = RunFolder(make_run(name, ("CREATED", "x"), ("TRAIN_STARTED", "x")).folder)
    open_tracking(name, f"/Users/me/{name}", {}).write(paths)
    paths.foundry_yaml.write_text("save_num_checkpoints_to_keep: 1\n")
    return paths


def _log(paths: RunFolder, *steps: int) -> None:
    for step in steps:
        Journal(paths.metrics).append({"time": step * 1000, "step": step, "metrics": {"loss": float(step), "lr": 0.5}})


def _points(paths: RunFolder, key: str = "loss") -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    tracking = paths.read_tracking()
    return [
        (one.step, one.value) for one in MlflowClient(tracking.tracking_uri).get_metric_history(tracking.run_id, key)
    ]


def _said(paths: RunFolder) -> list[str]:
    return [event.type for event in events.read(paths.events) if event.type in (AWAY, BACK)]


def test_a_server_that_goes_away_and_comes_back_has_everything_once(make_run: MakeRun, mlflow_that_goes: Any) -> None:
    """A curve with a hole, a table that is lost, a checkpoint that is nowhere; or a warning every two seconds."""
    from mlflow import MlflowClient

    paths = _run(make_run, "chat-1")
    artifacts = Journal(paths.artifacts_journal)
    publisher = Publisher(channels(paths), paths.events)
    artifacts.append({"params": {"world": "1"}})
    _log(paths, 1, 2)
    assert publisher.attempt() is None and _said(paths) == []
    mlflow_that_goes.stop()
    _log(paths, *range(3, 1200))
    row = {"table": "answers.json", "columns": ["step", "output"], "rows": [[3, "x"]]}
    paths.artifacts.mkdir()
    (paths.artifacts / "page.html").write_text("<p>")
    for record in (row, row, {"file": "page.html"}, {"params": {"world": "2", "more": "3"}}):
        artifacts.append(record)
    checkpoints = [_checkpoint(paths, number) for number in (1, 2)]
    for _ in range(2):
        failure = publisher.attempt()
        assert failure is not None and "connection refused" in failure.message
    assert _said(paths) == [AWAY] and [folder.is_dir() for folder in checkpoints] == [False, True], "as many are kept"
    (away,) = [event.message for event in events.read(paths.events) if event.type == AWAY]
    assert away.startswith(f"{mlflow_that_goes.uri}: connection refused. ") and "kept on disk" in away

    mlflow_that_goes.start()
    # Another process, as after a resume: what was told stays told.
    publisher = Publisher(channels(paths), paths.events)
    assert publisher.attempt() is None and _said(paths) == [AWAY, BACK]
    assert _points(paths) == [(step, float(step)) for step in range(1, 1200)]
    client, run_id = MlflowClient(mlflow_that_goes.uri), paths.read_tracking().run_id
    assert {info.path for info in client.list_artifacts(run_id)} == {"answers.json", "page.html", "chat-1"}
    table = json.loads(Path(client.download_artifacts(run_id, "answers.json")).read_text())
    assert table["data"] == [[3, "x"], [3, "x"]]
    assert client.get_run(run_id).data.params == {"world": "1", "more": "3"}
    left = [info.path for info in client.list_artifacts(run_id, "chat-1/checkpoints")]
    assert [path.rpartition("/")[2] for path in left] == ["ep1-ba2", "latest-sharded-rank0.symlink"], "as many are kept"
    assert not checkpoints[0].exists() and checkpoints[1].is_dir()


def _checkpoint(paths: RunFolder, number: int) -> Path:
    """A complete checkpoint that waits on this machine."""
    from tundish.checkpoints.manifest import FileFacts, write_manifest

    folder = SaveFolder(paths.read_tracking().save_folder).local / f"ep1-ba{number}"
    folder.mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp"):
        (folder / name).write_bytes(b"x" * number)
    write_manifest(folder, {file.name: FileFacts.of(file) for file in folder.iterdir()})
    return folder


def test_what_is_sent_twice_is_there_once(make_run: MakeRun) -> None:
    """An answer that was lost on the way would double the points."""
    paths = _run(make_run, "chat-1")
    _log(paths, 1, 2, 3)
    publisher = Publisher(channels(paths), None)
    assert publisher.attempt() is None and Journal(paths.metrics).is_sent
    Journal(paths.metrics).note_sent(0)
    assert publisher.attempt() is None
    assert _points(paths) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_deleted_run_is_told_in_a_sentence_and_nothing_is_lost(make_run: MakeRun) -> None:
    """Somebody tidies up experiments while a run trains."""
    from mlflow import MlflowClient

    paths = _run(make_run, "chat-1")
    _log(paths, 1)
    client, tracking = MlflowClient(paths.read_tracking().tracking_uri), paths.read_tracking()
    client.delete_run(tracking.run_id)
    waited: list[float] = []
    with pytest.raises(StageError, match=r"has been deleted there\. Restore it .* are kept, and published with the"):
        publish_all(paths, 5, waited.append)
    assert waited and _said(paths) == [AWAY]
    client.restore_run(tracking.run_id)
    publish_all(paths, 5, waited.append)
    assert _points(paths) == [(1, 1.0)] and _said(paths) == [AWAY, BACK]


def test_a_journal_outlives_kills(tmp_path: Path) -> None:
    """A line that was cut off would stop all that come after it."""
    journal = Journal(tmp_path / "metrics.jsonl")
    assert journal.is_sent and not list(journal.unsent())
    journal.append({"step": 1})
    with open(journal.path, "ab") as file:
        file.write(b'{"step": 2, "met')
    assert [record["step"] for record, _ in journal.unsent()] == [1], "it may still be in the middle of it"
    journal.append({"step": 3})
    assert [record["step"] for record, _ in journal.unsent()] == [1, 3]
    journal.note_sent(next(place for _, place in journal.unsent()))
    assert [record["step"] for record, _ in journal.unsent()] == [3] and not journal.is_sent
    (tmp_path / "metrics.sent").write_text("")
    assert len(list(journal.unsent())) == 2, "sent again rather than never"


def test_how_long_a_run_waits_may_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour is too long for one, too short for another."""
    assert wait_seconds() == 3600
    monkeypatch.setenv("TUNDISH_MLFLOW_WAIT", "1.5")
    assert wait_seconds() == 1.5
    monkeypatch.setenv("TUNDISH_MLFLOW_WAIT", "long")
    assert wait_seconds() == 3600


def test_lines_that_a_disk_has_forgotten_hide_no_new_ones(tmp_path: Path) -> None:
    """After a loss of power the first points of the resumed run would be lost, as if they had been sent."""
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in range(9):
        journal.append({"step": step})
    journal.note_sent(journal.path.stat().st_size)
    os.truncate(journal.path, 20)
    Journal(journal.path).append({"step": 7})
    assert [record["step"] for record, _ in journal.unsent()] == [7]


def test_what_is_new_is_sent_by_itself(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would see a curve before the run's end."""
    monkeypatch.setattr("tundish.tracking.publishing.PAUSE_SECONDS", 0.05)
    paths = _run(make_run, "chat-1")
    publisher = Publisher(channels(paths), paths.events)
    publisher.start()
    _log(paths, 1)
    from tests.runs.processes import wait_until

    wait_until(lambda: Journal(paths.metrics).is_sent, 60)
    _log(paths, 2)
    publisher.finish()
    assert Journal(paths.metrics).is_sent and _points(paths) == [(1, 1.0), (2, 2.0)]


def test_a_run_without_supervisor_says_itself_how_it_is(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts that are started by hand would leave a run in MLflow that goes on for ever; and what waits, for good."""
    from mlflow import MlflowClient

    paths = _run(make_run, "chat-1")
    tracking = paths.read_tracking()
    _log(paths, 1)
    Publisher(channels(paths), paths.events).finish()  # started once more when all is trained
    assert _points(paths) == [(1, 1.0)]
    for status in ("FAILED", "RUNNING", "FINISHED"):
        set_status(paths, status)
        assert MlflowClient(tracking.tracking_uri).get_run(tracking.run_id).info.status == status
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said: list[str] = []
    monkeypatch.setattr("tundish.tracking.publishing.log.warning", lambda text, *values: said.append(text % values))
    replace(tracking, tracking_uri="http://127.0.0.1:1").write(paths)
    set_status(paths, "FINISHED")
    (line,) = said
    assert line.startswith(
        "The run's status in MLflow could not be set to FINISHED: http://127.0.0.1:1: connection refused"
    )


def test_many_params_are_sent_in_parts(make_run: MakeRun) -> None:
    """MLflow refuses more than a hundred at once: what was logged after them would wait for ever."""
    from mlflow import MlflowClient

    paths = _run(make_run, "chat-1")
    journal, tracking = Journal(paths.artifacts_journal), paths.read_tracking()
    for value in ("1", "2"):
        journal.append({"params": {f"p{number}": value for number in range(250)}})
    assert Publisher(channels(paths), None).attempt() is None
    data = MlflowClient(tracking.tracking_uri).get_run(tracking.run_id).data
    assert len(data.params) == 250 and data.params["p7"] == "1" and data.tags["resumed.p249"] == "2"


def test_a_store_that_hangs_does_not_hold_up_the_end(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices would be held for minutes after the last batch."""
    monkeypatch.setattr("tundish.tracking.publishing.PAUSE_SECONDS", 0.05)
    monkeypatch.setattr("tundish.tracking.publishing.LAST_SECONDS", 0.1)
    paths = RunFolder(make_run("chat-1", ("CREATED", "x")).folder)
    hangs, asked = threading.Event(), threading.Event()

    class Hanging:
        def send(self) -> None:
            asked.set()
            hangs.wait()

    class Away:
        def send(self) -> None:
            raise StoreError("http://x: connection refused", "Start it.")

    publisher = Publisher([Away(), Hanging()], paths.events)
    publisher.start()
    assert asked.wait(60)
    publisher.finish()
    hangs.set()
    assert _said(paths) == [AWAY]


def test_a_stop_does_not_wait_for_an_upload(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster kills what does not end in time: the job would not go back into its queue."""
    monkeypatch.setattr("tundish.tracking.publishing.LAST_SECONDS", 0.1)
    uploads, asked = threading.Event(), threading.Event()

    class Large:
        def send(self) -> None:
            asked.set()
            uploads.wait()

    publisher = Publisher([Large()], make_run("chat-1", ("CREATED", "x")).events)
    publisher.start()
    publisher.finish(hurry=True)
    assert asked.wait(60), "what is small is sent"
    uploads.set()


def test_checkpoints_that_wait_for_a_store_do_not_fill_the_disk(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a week without the server, each checkpoint since would be there, of a run that keeps one."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    paths = RunFolder(make_run("chat-1", ("CREATED", "x")).folder)
    address = "http://127.0.0.1:1/api/2.0/mlflow-artifacts/artifacts/1/chat-1/checkpoints"
    replace(paths.read_tracking(), save_folder=address).write(paths)
    checkpoints = [_checkpoint(paths, number) for number in (1, 2, 3, 4)]
    for keep, left in ((-1, 4), (2, 2)):
        with pytest.raises(TundishError, match="connection refused"):
            Checkpoints(SaveFolder(address), keep).send()
        assert [folder.is_dir() for folder in checkpoints] == [False] * (4 - left) + [True] * left


def test_a_full_disk_does_not_end_the_publisher(make_run: MakeRun) -> None:
    """Nothing would be sent any more, and nobody be told."""
    paths = RunFolder(make_run("chat-1", ("CREATED", "x")).folder)

    class Full:
        def send(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(paths.metrics))

    failure = Publisher([Full()], paths.events).attempt()
    assert failure is not None and "no space left on device" in failure.message and _said(paths) == [AWAY]
