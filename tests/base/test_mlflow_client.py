"""Stores of MLflow that cannot be used: one sentence each, the same from `create()` and from `doctor`."""

import contextlib
import logging
import pickle
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import FileInfo

from tundish import foundation_model as fm
from tundish.base.mlflow_client import open_client, store_errors, why
from tundish.base.objects import opening
from tundish.base.objects.cloud import CloudFolder
from tundish.base.objects.opening import check_artifacts
from tundish.doctor import services
from tundish.errors import RequestError, SpecError, StoreError
from tundish.tracking import metrics
from tundish.tracking.experiment import check_registry, open_tracking

pytestmark = pytest.mark.slow

Answering = Callable[[int, bytes], str]


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answering]:
    """Starts web servers that say the same to everybody: `answering(status, body)` is the address of one."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    servers: list[ThreadingHTTPServer] = []

    def start(status: int, body: bytes) -> str:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_PUT = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _refusals(uri: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """What `create()` and what `doctor` say of a store."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SpecError) as error:
        open_tracking("chat-1", "/Users/me/chat-1", {})
    finding = services.mlflow()
    assert finding.check == "MLflow" and finding.state == "problem"
    return error.value.message, f"{finding.found}. {finding.advice}"


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("postgresql://lab@127.0.0.1:1/db", ("not installed", "`pip install psycopg2-binary`")),
        ("mysql://lab@127.0.0.1:1/db", ("not installed", "`pip install mysqlclient`")),
        ("mysql+pymysql://lab@127.0.0.1:1/db", ("not installed", "`pip install pymysql`")),
        ("mssql://lab@127.0.0.1:1/db", ("not installed", "`pip install pyodbc`")),
        ("gopher://x", ("does not support this kind of store", "Supported are http(s)://, sqlite:///")),
        ("s3://bucket/x", ("does not support this kind of store",)),
        ("databricks", ("credentials are missing", "pip install databricks-sdk", "DATABRICKS_HOST")),
        ("http://127.0.0.1:1", ("connection refused", "Check MLFLOW_TRACKING_URI")),
        ("http://127.0.0.1:99999", ("the address is malformed",)),
        ("sqlite:////{tmp}/text.db", ("not a SQLite database",)),
        ("sqlite:////{tmp}/none/m.db", ("there is no such folder",)),
        ("sqlite:////{tmp}/text.db/m.db", ("is not a folder",)),
        ("sqlite:////{tmp}", ("is a folder",)),
        ("{tmp}/text.db", ("text.db",)),
    ],
)
def test_a_store_that_cannot_be_opened_is_one_sentence(
    uri: str, parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback in `create()`, of what `doctor` calls OK."""
    (tmp_path / "text.db").write_text("no database" * 100)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", "/nowhere")
    created, looked_at = _refusals(uri.format(tmp=tmp_path).replace("/////", "////"), monkeypatch)
    for part in parts:
        assert part in created and part in looked_at
    assert created.startswith("experiment_path: MLflow cannot create a run in '/Users/me/chat-1': ")
    assert len(created.splitlines()) == 1 and len(created) < 420, created


@pytest.mark.parametrize(
    ("status", "body", "part"),
    [
        (200, b"<html>hello</html>", "not an MLflow server"),
        (302, b"", "not an MLflow server"),
        (404, b"<html>", "not an MLflow server"),
        (401, b"who are you", "authentication failed (401). Set MLFLOW_TRACKING_USERNAME"),
        (403, b"no", "permission denied (403)"),
        (500, b"boom", "returned a server error (500)"),
        (507, b"full", "its disk is full"),
    ],
)
def test_what_a_server_answers_is_told(
    status: int, body: bytes, part: str, answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server on that port would pass for MLflow, or its page be printed."""
    created, looked_at = _refusals(answering(status, body), monkeypatch)
    assert part in created and part in looked_at and "<html>" not in created


def test_a_locked_database_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`OperationalError (Background on this error at …)` helps nobody."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr("tundish.base.mlflow_client.CONNECT_SECONDS", 0.2)
    open_tracking("chat-1", "/Users/me/chat-1", {})
    assert services.mlflow().state == "ok"
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        created, looked_at = _refusals(uri, monkeypatch)
        other.execute("ROLLBACK")
    assert all(
        "another process has locked the database. Wait until it is done" in text for text in (created, looked_at)
    )
    open_client(uri)


def test_a_database_of_another_mlflow_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer MLflow's file would be called damaged, or be changed."""
    open_client(f"sqlite:///{tmp_path}/ours.db")
    shutil.copy(tmp_path / "ours.db", tmp_path / "theirs.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "theirs.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = 'f00000000000'")
        database.commit()
    created, looked_at = _refusals(f"sqlite:///{tmp_path}/theirs.db", monkeypatch)
    assert "created by another version of MLflow" in created and "another version" in looked_at


def test_a_store_that_does_not_answer_leaves_nothing_to_undo(
    arguments: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A refusal would be told twice, and a folder be left that only a store that is gone could free."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SpecError, match="connection refused"):
        fm.create(**arguments)
    assert not list((home / "runs").iterdir()) and not [one for one in caplog.records if "create()" in one.message]


def test_doctor_makes_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look would leave files behind, or say that a store is there which is not."""
    assert services.mlflow().found == f"{home}/mlflow/mlflow.db, which the first run creates" and not home.exists()
    for uri in (f"sqlite:///{tmp_path}/m.db", f"{tmp_path}/mlruns", f"file://{tmp_path}/mlruns"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert services.mlflow().found.endswith(", which the first run creates")
        assert not list(tmp_path.iterdir())


def test_a_new_store_leaves_the_process_its_logging(tmp_path: Path) -> None:
    """A notebook's first run would end its log: alembic sets up logging anew, and closes all files that are open."""
    import mlflow  # which does so, too

    assert mlflow
    logger, file = logging.getLogger("theirs"), logging.FileHandler(tmp_path / "theirs.log", mode="w")
    handlers = list(logging.root.handlers)
    logging.root.addHandler(file)
    try:
        logger.warning("before")
        open_client(f"sqlite:///{tmp_path}/mlflow.db")
        logger.warning("after")
        assert logging.root.handlers == [*handlers, file]
    finally:
        logging.root.removeHandler(file)
        file.close()
    assert (tmp_path / "theirs.log").read_text() == "before\nafter\n"


def test_a_registry_s_errors_are_told_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be told when the model has been trained."""
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "postgresql://lab@127.0.0.1:1/db")
    with pytest.raises(SpecError, match=r"^register_to: .*postgresql://lab@127.0.0.1:1/db: .*psycopg2-binary"):
        check_registry("main.lab.x")
    open_tracking("chat-1", "/Users/me/chat-1", {})
    finding = services.mlflow()
    assert finding.state == "problem" and "psycopg2-binary" in finding.advice


@pytest.mark.parametrize("address", ["mlflow-artifacts:/1", "s3://lab/1"])
def test_an_artifact_store_is_asked_once_whatever_it_holds(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`create()` would list the artifacts of all runs of the experiment, on a server folder by folder, for minutes."""
    asked: list[str | None] = []

    class Endless:
        """A store with a folder in every folder."""

        def list_artifacts(self, path: str | None = None) -> list[Any]:
            asked.append(path)
            assert len(asked) < 3
            return [FileInfo(f"{path or ''}/x".lstrip("/"), is_dir=True, file_size=None)]

        def list(self, prefix: str | None) -> list[Any]:
            asked.append(prefix)
            return []

    registry = "mlflow.store.artifact.artifact_repository_registry.get_artifact_repository"
    monkeypatch.setattr(registry, lambda root: Endless())
    monkeypatch.setattr(opening, "open_cloud", lambda root: CloudFolder(root, Endless(), "1"))
    check_artifacts(address, "http://localhost:1")
    assert asked == ([None] if address.startswith("mlflow") else ["1/tundish/"])


def test_an_artifact_store_that_cannot_be_used_is_told_before_the_run() -> None:
    """The first checkpoint would be the first to learn of it."""
    with pytest.raises(StoreError, match=r"^gopher://x: MLflow does not support this kind of store"):
        check_artifacts("gopher://x", "unused")
    missing = ModuleNotFoundError("No module named 'google.cloud'", name="google.cloud")
    assert why(missing) == ("it needs a package that is not installed", "`pip install google-cloud-storage`.")


def test_reading_metrics_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook would show a hundred lines of requests' own."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(
        RequestError,
        match=r"metrics of run abc cannot be read from MLflow: http://127\.0\.0\.1:1: connection refused\. Check",
    ):
        metrics.read("http://127.0.0.1:1", "abc")


def test_unknown_errors_are_one_line_without_secrets() -> None:
    """Whatever a plugin raises."""
    wrong, advice = why(RuntimeError("cannot log in\n  at http://me:geheim@host\n" + "x" * 1000))
    assert wrong.startswith("cannot log in at http://***@host xxx") and len(wrong) <= 300 and "\n" not in wrong
    assert advice
    with pytest.raises(StoreError, match="a store: no disk") as error, store_errors("a store"):
        raise RuntimeError("no disk")
    assert pickle.loads(pickle.dumps(error.value)).advice == error.value.advice
