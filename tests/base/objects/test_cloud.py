"""base/objects/cloud.py and the protocol: one behavior on a real S3 server, in memory and on disk."""

import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.s3 import PAGE

from tundish.base.objects import cloud
from tundish.base.objects.cloud import CloudFolder
from tundish.base.objects.contract import ObjectStore
from tundish.base.objects.opening import open_store
from tundish.errors import StoreError


@pytest.fixture(params=[pytest.param("s3", marks=pytest.mark.slow), "memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty folder `lab/x` of a store."""
    from obstore.store import LocalStore, MemoryStore

    if request.param == "s3":
        return open_store(request.getfixturevalue("bucket").uri("lab/x/"))
    if request.param == "local":
        (tmp_path / "store").mkdir()
        return CloudFolder("s3://local/lab/x", LocalStore(tmp_path / "store"), "lab/x")
    return CloudFolder("s3://memory/lab/x", MemoryStore(), "lab/x")


def _file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "content"
    path.write_bytes(content)
    return path


def test_what_was_written_is_listed_found_and_read(store: ObjectStore, tmp_path: Path) -> None:
    """Data would be incomplete, or a checkpoint other than the one that was saved."""
    keys = [*(f"ep1-ba1/{number:02}" for number in range(2 * PAGE + 1)), "a b#?%25ü", "ep1-ba10/x", "z"]
    for key in keys:
        store.upload(_file(tmp_path, key.encode()), key)
    assert [entry.key for entry in store.list()] == sorted(keys)
    assert [entry.key for entry in store.list("ep1-ba1")] == keys[: 2 * PAGE + 1], "ep1-ba10 only begins like it"
    assert store.list("ep1") == store.list("none") == []
    entry = store.find("a b#?%25ü")
    assert entry is not None and entry in store.list() and entry.version and entry.size == len("a b#?%25ü".encode())
    assert store.read("a b#?%25ü") == "a b#?%25ü".encode()
    assert (store.read("z", 0, 4096), store.read("ep1-ba10/x", 3), store.read("ep1-ba10/x", 1, 3)) == (
        b"z",
        b"-ba10/x",
        b"p1-",
    )
    store.download("ep1-ba10/x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"ep1-ba10/x"


def test_only_what_is_named_is_deleted(store: ObjectStore, tmp_path: Path) -> None:
    """With ep1-ba1, ep1-ba10 would be removed."""
    for key in ("ep1-ba1", "ep1-ba10", "ep1-ba1x/y"):
        store.upload(_file(tmp_path, b"x"), key)
    store.delete("ep1-ba1")
    store.delete("ep1-ba1")
    assert [entry.key for entry in store.list()] == ["ep1-ba10", "ep1-ba1x/y"]
    assert store.find("ep1-ba1") is None


def test_a_version_differs_when_the_content_does(store: ObjectStore, tmp_path: Path) -> None:
    """Yesterday's data would be trained, as nothing is downloaded again whose version is the same."""
    versions = list[Any]()
    for content in (b"one", b"two"):
        store.upload(_file(tmp_path, content), "train.jsonl")
        versions.append(store.find("train.jsonl"))
    assert versions[0].version != versions[1].version and versions[1] == store.list()[0]


def test_large_objects_travel_in_parts(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 100 GB would be held in memory, or be refused by the store."""
    monkeypatch.setattr(cloud, "SMALLEST_PART", 5 << 20)
    monkeypatch.setattr(cloud, "PART_BYTES", 3 << 20)
    content = os.urandom(11 << 20)
    store.upload(_file(tmp_path, content), "large")
    for key, expected in (("large", content), ("empty", b"")):
        store.upload(_file(tmp_path, expected), key)
        store.download(key, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == expected
    assert store.read("large", 7 << 20, 5) == content[7 << 20 :][:5]


@pytest.mark.slow
def test_an_object_that_is_replaced_while_it_is_read_is_an_error(bucket: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Half of the old data and half of the new would be trained."""
    monkeypatch.setattr(cloud, "PART_BYTES", 4)
    monkeypatch.setattr(cloud, "THREADS", 1)
    bucket.put("x/data", b"old old old ")
    store = open_store(bucket.uri("x"))
    write = os.pwrite

    def replaced(*arguments: Any) -> int:
        bucket.put("x/data", b"new new new ")
        return write(*arguments)

    monkeypatch.setattr(cloud.os, "pwrite", replaced)
    with pytest.raises(StoreError, match=r"/x/data: it was replaced while it was read\. Try again"):
        store.download("data", tmp_path / "copy")


@pytest.mark.slow
def test_an_object_that_marks_a_folder_is_none_of_its_objects(bucket: Any) -> None:
    """The console of S3 makes them; one would be taken for a file without a name."""
    bucket.put("lab/", b"")
    bucket.put("lab/x", b"x")
    assert [entry.key for entry in open_store(bucket.uri("lab")).list()] == ["x"]


@pytest.mark.slow
def test_a_forked_process_says_that_it_cannot_ask(bucket: Any) -> None:
    """It would wait for ever for threads that it does not have."""
    store = open_store(bucket.uri("lab"))
    assert store.list() == []
    pid = os.fork()
    if not pid:
        try:
            store.list()
        except RuntimeError:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_web_server_is_read_and_nothing_else(tmp_path: Path) -> None:
    """A data file on a web server would have to be copied by hand."""
    (tmp_path / "train.jsonl").write_bytes(b"{}\n" * 1000)

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        store = open_store(f"http://127.0.0.1:{server.server_port}")
        store.download("train.jsonl", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == b"{}\n" * 1000
        assert store.find("train.jsonl") is not None and store.find("none") is None
        with pytest.raises(StoreError, match="other web servers cannot list files"):
            store.list()
    finally:
        server.shutdown()
        server.server_close()
