"""checkpoints/save_folder.py: checkpoints in an object store and on an MLflow server, both real, on this machine."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.s3 import Bucket

from tundish.checkpoints.folder import CHECKPOINT_LINK, list_checkpoints
from tundish.checkpoints.manifest import FileFacts, problems, write_manifest
from tundish.checkpoints.save_folder import SaveFolder, save_folder_of
from tundish.errors import CheckpointError
from tundish.model.weights import compare_weights, fetch_weights, find_weights
from tundish.tracking.publishing import Checkpoints

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore"),
]


@dataclass(frozen=True)
class Store:
    """Where checkpoints are kept, and a way to look and to write there that is not ours."""

    place: SaveFolder
    put: Callable[[str, bytes], None]
    """Key below the folder of checkpoints, content."""
    keys: Callable[[], set[str]]


@pytest.fixture(params=["s3", "mlflow"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """An empty folder of a store."""
    if request.param == "s3":
        bucket: Bucket = request.getfixturevalue("bucket")
        prefix = "lab/ift-1/checkpoints/"

        def keys() -> set[str]:
            pages = bucket.client.get_paginator("list_objects_v2").paginate(Bucket=bucket.name)
            return {found["Key"].removeprefix(prefix) for page in pages for found in page.get("Contents", ())}

        def put(key: str, content: bytes) -> None:
            bucket.put(prefix + key, content)

        return Store(SaveFolder(bucket.uri(prefix.rstrip("/"))), put, keys)
    server, artifacts = request.getfixturevalue("mlflow_server")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    folder = artifacts / tmp_path.name / "checkpoints"

    def write(key: str, content: bytes) -> None:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(content)

    def names() -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    return Store(SaveFolder(f"mlflow-artifacts:/{tmp_path.name}/checkpoints"), write, names)


def _make(folder: Path, number: int) -> Path:
    """A complete checkpoint as tundish writes it, on this machine."""
    import torch
    import torch.distributed.checkpoint as dcp

    path = folder / f"ep1-ba{number}"
    dcp.save({"state.model.model.norm": torch.full((3,), float(number))}, checkpoint_id=path, no_dist=True)
    write_manifest(path, {file.name: FileFacts.of(file) for file in path.iterdir()})
    return path


FILES = {".metadata", "__0_0.distcp", "manifest.json"}


def test_what_was_published_is_listed_and_fetched(store: Store, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """A run on another machine would begin anew, or `custom_weights_path` not take what `get_checkpoints()` gave."""
    place = store.place
    assert place.list() == [] and place.newest() is None
    for number in (9, 10):
        place.publish(_make(place.local, number))
    assert store.keys() == {f"ep1-ba{n}/{name}" for n in (9, 10) for name in FILES} | {CHECKPOINT_LINK}
    assert place.list() == [f"{place.address}/ep1-ba9", f"{place.address}/ep1-ba10"]
    assert [path.name for path in list_checkpoints(place.local)] == ["ep1-ba10"], "here is what a resume begins with"
    monkeypatch.setenv("TUNDISH_HOME", str(home.parent / "another machine"))
    newest = place.newest()
    assert newest is not None and newest == place.local / "ep1-ba10" and problems(newest) == []
    link = f"{place.address}/{CHECKPOINT_LINK}"
    assert place.read_link(CHECKPOINT_LINK) == find_weights(link) == f"{place.address}/ep1-ba10"
    assert fetch_weights(link) == place.local / "read" / newest.name, "not where its own run removes older ones"
    assert problems(fetch_weights(f"{place.address}/ep1-ba9")) == []
    assert save_folder_of(f"{place.address}/ep1-ba9/") == (place, "ep1-ba9")


def test_what_is_newer_here_is_used_and_put_there_by_who_publishes(store: Store) -> None:
    """A run that was killed before it was published would lose its last checkpoint, and train it once more."""
    place = store.place
    place.publish(_make(place.local, 1))
    waiting = [_make(place.local, number) for number in (2, 3)]
    assert place.newest() == waiting[-1] and place.list() == [f"{place.address}/ep1-ba1"]
    Checkpoints(place, -1).send()
    assert [address.rpartition("/")[2] for address in place.list()] == ["ep1-ba1", "ep1-ba2", "ep1-ba3"]
    assert place.read_link(CHECKPOINT_LINK).endswith("/ep1-ba3")
    assert list_checkpoints(place.local) == waiting[-1:], "here is what a resume begins with"


def test_a_store_that_is_away_costs_nothing_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is tried once more, or exported, would wait for a store that it does not need."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    place = SaveFolder("http://127.0.0.1:1/api/2.0/mlflow-artifacts/artifacts/1/ab/artifacts/ift-1/checkpoints")
    with pytest.raises(CheckpointError, match="connection refused"):
        place.newest()
    kept = [_make(place.local, number) for number in (1, 2)]
    assert place.newest() == kept[-1]
    with pytest.raises(CheckpointError, match="connection refused"):
        Checkpoints(place, -1).send()
    assert list_checkpoints(place.local) == kept


def test_a_web_address_that_is_no_mlflow_server_s_is_told() -> None:
    """MLflow's client says `not enough values to unpack`."""
    with pytest.raises(CheckpointError, match=r"is not in an MLflow server's artifacts.*Copy the address"):
        SaveFolder("http://127.0.0.1:1/x").list()


def test_what_is_newer_there_is_fetched(store: Store) -> None:
    """A run would go on from an old copy that another machine has long passed."""
    place = store.place
    place.publish(_make(place.local, 1))
    kept = place.local.with_name("kept")
    shutil.copytree(place.local, kept)
    place.publish(_make(place.local, 2))
    shutil.rmtree(place.local)
    kept.rename(place.local)
    newest = place.newest()
    assert newest is not None and newest.name == "ep1-ba2" and problems(newest) == []


@pytest.mark.parametrize("damage", ["flipped", "truncated", "no manifest and truncated"])
def test_a_damaged_copy_is_refused_and_not_used(store: Store, damage: str) -> None:
    """A fault of the store or of the way would be trained on; and from the copy, again at each attempt."""
    place = store.place
    folder = _make(place.local, 1)
    place.publish(folder)
    content = bytearray((folder / "__0_0.distcp").read_bytes())
    shutil.rmtree(place.local)
    content[len(content) // 2] ^= 1
    store.put("ep1-ba1/__0_0.distcp", bytes(content if damage == "flipped" else content[:-1]))
    if damage.startswith("no manifest"):
        store.put("ep1-ba1/manifest.json", b"{}")
    for _ in range(2):
        with pytest.raises(CheckpointError) as error:
            place.newest()
        assert "__0_0.distcp" in error.value.message or "manifest.json" in error.value.message
        assert list_checkpoints(place.local) == []
        assert not [path for path in place.local.iterdir() if not path.name.endswith(".lock")], "nothing is left"


@pytest.mark.parametrize(
    "name", ["x.py", "sub/__0_0.distcp", "__0_0.distcp.exe", "a b.distcp", ".bashrc", "latest.symlink/x", "ü\x07.pt"]
)
def test_odd_names_in_the_store_are_not_written_here(store: Store, name: str, tmp_path: Path) -> None:
    """Whoever may write to the store could put files of any name on this machine."""
    place = store.place
    place.publish(_make(place.local, 1))
    shutil.rmtree(place.local)
    store.put(f"ep1-ba1/{name}", b"odd")
    with pytest.raises(CheckpointError) as error:
        place.newest()
    # A control character is refused by the client already.
    reasons = ("checkpoints have no file of this name", "cannot be read. No part of a key")
    assert any(reason in error.value.message for reason in reasons) and error.value.message.isprintable()
    assert list_checkpoints(place.local) == [] and not list(place.local.rglob(Path(name).name))


@pytest.mark.parametrize("key", ["../out.distcp", "../../out.distcp", "/out.distcp", "a/../../../out.distcp", ".."])
def test_keys_do_not_leave_the_copy(bucket: Bucket, tmp_path: Path, key: str) -> None:
    """Whoever may write to the bucket could write any file of this machine."""
    place = SaveFolder(bucket.uri("lab/checkpoints"))
    place.publish(_make(place.local, 1))
    shutil.rmtree(place.local)
    bucket.put(f"lab/checkpoints/ep1-ba1/{key}", b"escaped")
    try:
        place.newest()
    except CheckpointError as error:
        assert error.message.isprintable()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"escaped"]
    bucket.put("lab/checkpoints/../ep9-ba9/.metadata", b"escaped")
    bucket.put("lab/checkpoints/ep9-ba9/../.metadata", b"escaped")
    with pytest.raises(CheckpointError, match=r"/lab/checkpoints: the key '[^']*\.\.[^']*' cannot be read.* Rename"):
        place.list()


@pytest.mark.parametrize("content", ["", "..", "/", "a/..", "\x1b[2J", "x" * 5000, "\0", "../../etc", "s3://other/.."])
@pytest.mark.parametrize("where", ["here", "there"])
def test_a_link_names_nothing_but_what_lies_beside_it(
    where: str, content: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """It would lead to any folder, or end in a traceback."""
    if where == "here":
        link = str(tmp_path / "latest-sharded-rank0.symlink")
        Path(link).write_text(content)
    else:
        bucket: Bucket = request.getfixturevalue("bucket")
        link = bucket.put("lab/latest-sharded-rank0.symlink", content.encode())
    with pytest.raises((CheckpointError, ValueError)) as error:
        find_weights(link)
    assert type(error.value).__name__ in ("CheckpointError", "SpecError") and str(error.value).isprintable()
    assert len(str(error.value)) < 800


def test_a_link_that_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """To open a pipe is to wait for ever."""
    os.mkfifo(tmp_path / "latest-sharded-rank0.symlink")
    with pytest.raises(CheckpointError, match="cannot be read"):
        find_weights(str(tmp_path / "latest-sharded-rank0.symlink"))


def test_the_oldest_complete_ones_are_removed(store: Store) -> None:
    """The store would fill up; or half an upload count, and the one that a resume needs be removed for it."""
    place = store.place
    for number in (1, 2, 10):
        place.publish(_make(place.local, number))
    store.put("ep1-ba11/__0_0.distcp", b"half")
    place.keep_newest(2)
    assert place.list() == [f"{place.address}/ep1-ba2", f"{place.address}/ep1-ba10"]
    assert not any(key.startswith("ep1-ba1/") for key in store.keys())
    place.keep_newest(0)
    assert place.list() == [f"{place.address}/ep1-ba10"]
    assert place.read_link(CHECKPOINT_LINK).endswith("/ep1-ba10")
    place.clear()
    assert list(store.keys()) == []


@pytest.mark.parametrize("after", range(4))
def test_a_kill_while_publishing_leaves_no_half_checkpoint(store: Store, after: int) -> None:
    """Another machine would go on from half a checkpoint: `.metadata` has to come last, and `latest` after it."""
    place = store.place
    place.publish(_make(place.local, 1))
    second = _make(place.local, 2)
    if place.address.startswith("s3:"):  # obstore's threads do not outlive a fork
        call = f"_publish_and_die({place.address!r}, {str(second)!r}, {after})"
        code = f"import tests.checkpoints.test_save_folder as here; here.{call}"
        command = [sys.executable, "-W", "ignore", "-c", code]
        assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    else:
        pid = os.fork()
        if not pid:
            _publish_and_die(place.address, str(second), after)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    half = {key for key in store.keys() if key.startswith("ep1-ba2/")}
    assert len(half) == min(after, 3)
    complete = ["ep1-ba1"] if after < 3 else ["ep1-ba1", "ep1-ba2"]
    assert place.list() == [f"{place.address}/{name}" for name in complete]
    assert place.read_link(CHECKPOINT_LINK).endswith("/ep1-ba1")
    assert place.newest() == second, "the next attempt makes up for it"
    place.publish(second)
    assert place.list()[-1].endswith("/ep1-ba2") and place.read_link(CHECKPOINT_LINK).endswith("/ep1-ba2")


def _publish_and_die(address: str, folder: str, after: int) -> None:
    """Upload so many files, then be killed."""
    place, put, done = SaveFolder(address), SaveFolder._put, list[Path]()

    def counted(self: SaveFolder, file: Path, key: str) -> None:
        if len(done) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(file)
        put(self, file, key)

    signal.alarm(60)  # should the fork have broken something
    SaveFolder._put = counted  # pyright: ignore[reportAttributeAccessIssue]  this process ends here
    try:
        place.publish(Path(folder))
    finally:
        os._exit(1)


def test_a_store_that_is_not_there_is_told(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's trace would reach the user, without the path that is wrong."""
    place = SaveFolder(f"s3://no-{bucket.name}/checkpoints")
    for ask in (place.list, place.newest, lambda: place.read_link(CHECKPOINT_LINK), lambda: place.holds("ep1-ba1")):
        with pytest.raises(CheckpointError) as error:
            ask()
        assert error.value.message.startswith(place.address) and error.value.message.isprintable()
        assert "the bucket does not exist. Create it, or correct its name." in error.value.message


def test_the_weights_of_a_store_are_compared_by_their_metadata_alone(
    bucket: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    """`create()` would accept another model's weights, or download gigabytes before it returns."""
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    place = SaveFolder(bucket.uri("kept"))
    weights = {f"state.model.model.{name}": t for name, t in load_file(tiny_model / "model.safetensors").items()}
    for number, head in ((1, weights["state.model.model.lm_head.weight"]), (2, torch.zeros(400, 64))):
        state = weights | {"state.model.model.lm_head.weight": head}
        path = place.local / f"ep1-ba{number}"
        dcp.save(state, checkpoint_id=path, no_dist=True)
        place.publish(path)
    monkeypatch.setenv("TUNDISH_HOME", str(home.parent / "another machine"))
    compare_weights(f"{place.address}/ep1-ba1", str(tiny_model))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight \[400, 64\] instead of \[384, 64\]"):
        compare_weights(f"{place.address}/ep1-ba2", str(tiny_model))
    assert bucket.downloads("kept/ep1-ba1/.metadata") == 1
    assert bucket.downloads("kept/ep1-ba1/__0_0.distcp") == 0 and not place.local.exists()
