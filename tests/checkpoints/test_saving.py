"""checkpoints/saving.py: a checkpoint is there complete or not at all, whatever happens while it is written."""

import json
import pickle
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoints.processes import start

from tundish.checkpoints.folder import CHECKPOINT_LINK, list_checkpoints, read_tensors
from tundish.checkpoints.manifest import problems, read_manifest
from tundish.checkpoints.save_folder import SaveFolder
from tundish.checkpoints.saving import Staged, clean, write_checkpoint
from tundish.errors import CheckpointError

# Of PyTorch's own: it saves and loads in a single process, which is wanted here, and uses its own old storage class.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
KILLS = 25
ELEMENTS = 5 << 19
"""Of each of a checkpoint's four tensors; so many that a save takes a tenth of a second or more."""


def _state(number: int, elements: int = 1000) -> dict[str, Any]:
    import torch

    model = {f"model.{layer}": torch.full((elements,), number * 10 + layer, dtype=torch.float32) for layer in range(4)}
    return {"state": {"model": model, "timestamp": {"batch": number}}}


def _save(place: SaveFolder, number: int, elements: int = 1000, keep: int = 0) -> Path:
    folder = place.local / f"ep1-ba{number}"
    write_checkpoint(Staged(_state(number, elements), folder, copy=False), place, lambda given: [given], True)
    if keep:
        place.keep_newest(keep)
    return folder


def _numbers(folder: Path) -> list[int]:
    return [int(path.name.partition("-ba")[2]) for path in list_checkpoints(folder)]


def _is_as_saved(checkpoint: Path) -> bool:
    import torch

    number = int(checkpoint.name.partition("-ba")[2])
    tensors = read_tensors(checkpoint)
    values = {name: tensor.read() for name, tensor in tensors.items()}
    return problems(checkpoint) == [] and all(
        torch.equal(values[f"state.model.model.{layer}"], torch.full((len(value),), number * 10.0 + layer))
        for layer, value in enumerate(values.values())
    )


def _latest(folder: Path) -> str:
    return Path((folder / CHECKPOINT_LINK).read_text()).name


def _go_on(folder: Path) -> None:
    """As each attempt of a run does: put in order what was killed, then save one after another."""
    place = SaveFolder(str(folder))
    clean(folder)
    number = max(_numbers(folder), default=0)
    if number:
        place.publish(folder / f"ep1-ba{number}")
    while True:
        number += 1
        _save(place, number, ELEMENTS, keep=3)


def _seconds_of_a_save(folder: Path) -> float:
    process = start(_go_on, folder)
    _wait_for(folder, 1)
    started = time.monotonic()
    _wait_for(folder, 3)
    process.kill()
    process.join()
    return (time.monotonic() - started) / 2


def _wait_for(folder: Path, number: int) -> None:
    for _ in range(60_000):
        if any((folder / f"ep1-ba{at}").exists() for at in range(number, number + 3)):
            return
        time.sleep(0.001)
    pytest.fail(f"checkpoint {number} did not come")


def test_a_kill_at_any_moment_leaves_complete_checkpoints(tmp_path: Path) -> None:
    """A run would go on from half a checkpoint, or from none, after a power cut or the memory killer."""
    folder, dice = tmp_path / "checkpoints", random.Random(7)
    seconds = _seconds_of_a_save(folder)
    assert seconds > 0.05, "a save is too short to be hit"
    hashes: dict[str, Any] = {}
    half = 0
    for kill in range(KILLS):
        before = max(_numbers(folder), default=0)
        process = start(_go_on, folder)
        _wait_for(folder, before + 1)
        # All moments of a save are hit, one part after another: its writing, its end, and the removal of old ones.
        time.sleep(seconds * (kill + dice.random()) / KILLS)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        names = sorted(path.name for path in folder.iterdir())
        found = {path.name: path for path in list_checkpoints(folder)}
        assert {name for name in names if name.startswith("ep")} == set(found), "each that is seen is complete"
        assert max(_numbers(folder)) > before and len(found) >= 3 - (kill == 0)
        assert _latest(folder) in found
        for name, path in found.items():
            manifest = read_manifest(path)
            assert name in hashes or problems(path) == []
            assert hashes.setdefault(name, manifest) == manifest
        half += any(name.startswith(".ep") for name in names)
    assert half > KILLS / 5, "the kills have hit no save"
    assert all(_is_as_saved(path) for path in list_checkpoints(folder)), "earlier ones are untouched"
    clean(folder)
    assert not [path for path in folder.iterdir() if path.name.startswith(".ep")]


def test_a_checkpoint_is_never_written_over(tmp_path: Path) -> None:
    """A run with the number of another one would destroy what it could go back to."""
    place = SaveFolder(str(tmp_path / "checkpoints"))
    folder = _save(place, 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=r"ep1-ba1: exists already, and checkpoints are never overwritten\. Move"):
        _save(place, 1, 500)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    staged = Staged(_state(2), place.local / "ep1-ba2", copy=False)
    _save(place, 2)
    with pytest.raises(CheckpointError, match="ep1-ba2: cannot be written"):
        write_checkpoint(staged, place, lambda given: [given], True)
    assert _is_as_saved(place.local / "ep1-ba2")


def test_a_copy_is_what_was_staged(tmp_path: Path) -> None:
    """Training goes on while a checkpoint is written: it would hold weights of two batches."""
    state = _state(1)
    place = SaveFolder(str(tmp_path / "checkpoints"))
    staged = Staged(state, place.local / "ep1-ba1", copy=True)
    for tensor in state["state"]["model"].values():
        tensor.fill_(-1)
    write_checkpoint(staged, place, lambda given: [given], True)
    assert _is_as_saved(place.local / "ep1-ba1")


def test_only_complete_checkpoints_are_counted_and_removed(tmp_path: Path) -> None:
    """Half a checkpoint would take the place of the one that a resume needs."""
    place = SaveFolder(str(tmp_path / "checkpoints"))
    for number in range(1, 6):
        _save(place, number)
    (place.local / "ep1-ba5" / "__0_0.distcp").unlink()
    (place.local / "ep1-ba9").mkdir()
    (place.local / ".ep1-ba8.tmp").mkdir()
    shutil.copytree(place.local / "ep1-ba4", place.local / ".ep1-ba7.tmp", dirs_exist_ok=True)
    place.keep_newest(2)
    assert _numbers(place.local) == [3, 4] and all(map(_is_as_saved, list_checkpoints(place.local)))
    place.keep_newest(5)
    assert _numbers(place.local) == [3, 4]
    for count in (0, -1, 1):
        place.keep_newest(count)
        assert _numbers(place.local) == [4], "the newest is what a resume needs"
    clean(place.local)
    names = sorted(path.name for path in place.local.iterdir())
    assert names == ["ep1-ba4", "ep1-ba5.damaged1", CHECKPOINT_LINK], "what was complete once may be mended"
    assert _is_as_saved(_save(place, 5))


def test_checkpoints_of_an_earlier_attempt_are_counted(tmp_path: Path) -> None:
    """Each attempt of a run would keep as many as it may, until the disk is full."""
    place = SaveFolder(str(tmp_path / "checkpoints"))
    for number in (1, 2, 10):
        process = start(_save, place, number)
        process.join(60)
        assert process.exitcode == 0
    _save(place, 11, keep=2)
    assert _numbers(place.local) == [10, 11]


def test_old_checkpoints_go_after_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the two would leave nothing to go on from."""
    place = SaveFolder(str(tmp_path / "checkpoints"))
    _save(place, 1, keep=1)
    with _full_disk(2000), pytest.raises(CheckpointError):
        _save(place, 2, keep=1)
    assert _numbers(place.local) == [1] and _latest(place.local) == "ep1-ba1"


@contextmanager
def _full_disk(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond a size, as it does when a disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("elements", "size"),
    [(1000, 0), (1000, 100), (1000, 18_000), (250_000, 100), (250_000, 900_000), (250_000, 3_900_000)],
)
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, elements: int, size: int) -> None:
    """The checkpoint before would be lost with the one that found no room, or a rest of it fill the disk for good."""
    place = SaveFolder(str(tmp_path / "checkpoints"))
    _save(place, 1)
    with _full_disk(size), pytest.raises(CheckpointError) as error:
        _save(place, 2, elements)
    assert error.value.message.startswith(f"{place.local}/ep1-ba2: cannot be written (File too large); ")
    advice = "Earlier checkpoints are untouched. Free some disk space, then `tundish resume` the run."
    assert advice in error.value.message
    assert sorted(path.name for path in place.local.iterdir()) == ["ep1-ba1", CHECKPOINT_LINK]
    assert _is_as_saved(place.local / "ep1-ba1") and _latest(place.local) == "ep1-ba1"
    assert _is_as_saved(_save(place, 2)), "and there is room again"


def test_a_disk_that_is_full_at_the_end_leaves_what_was_there(tmp_path: Path) -> None:
    """The ranks' files may fit, and the metadata not."""
    place = SaveFolder(str(tmp_path / "checkpoints"))
    _save(place, 1)
    staged = Staged(_state(2), place.local / "ep1-ba2", copy=False)
    share = staged.write()
    with _full_disk(500), pytest.raises(CheckpointError, match="ep1-ba2: cannot be written"):
        staged.complete([share])
    assert sorted(path.name for path in place.local.iterdir()) == ["ep1-ba1", CHECKPOINT_LINK]


def test_a_rank_s_failure_is_told_to_all(tmp_path: Path) -> None:
    """The others would wait for two hours, or say that all is well."""
    from tundish.checkpoints.saving import Share

    place = SaveFolder(str(tmp_path / "checkpoints"))
    told: list[Any] = []

    def exchange(given: Any) -> list[Any]:
        told.append(given)
        return [given, Share(error="rank 1: no room.")] if isinstance(given, Share) else [given, None]

    with pytest.raises(CheckpointError, match=r"rank 1: no room\."):
        write_checkpoint(Staged(_state(1), place.local / "ep1-ba1", copy=False), place, exchange, True)
    assert told[-1] == "rank 1: no room." and list(place.local.iterdir()) == []
    with pytest.raises(CheckpointError, match="Checkpoints must go to a disk that all nodes share"):
        staged = Staged(_state(1), place.local / "ep1-ba1", copy=False)
        share = staged.write()
        shutil.rmtree(staged.hidden)
        staged.complete([share])


def test_a_link_that_cannot_be_moved_is_told_to_all(tmp_path: Path) -> None:
    """The first rank would end with a traceback and the others wait for two hours."""
    place, told = SaveFolder(str(tmp_path / "checkpoints")), []
    (place.local / CHECKPOINT_LINK).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"ep1-ba1: cannot be written \(Is a directory\)"):
        write_checkpoint(
            Staged(_state(1), place.local / "ep1-ba1", copy=False),
            place,
            lambda given: told.append(given) or [given],
            True,
        )
    assert len(told) == 2 and _is_as_saved(place.local / "ep1-ba1")


def test_the_rest_of_a_removal_is_no_obstacle(tmp_path: Path) -> None:
    """A removal that was interrupted once would end each run that comes to the same checkpoint."""
    place = SaveFolder(str(tmp_path / "checkpoints"))
    for number in (1, 2):
        shutil.copytree(_save(place, number), place.local / f".ep1-ba{number}.tmp")
    place.keep_newest(1)
    assert sorted(path.name for path in place.local.iterdir()) == [".ep1-ba2.tmp", "ep1-ba2", CHECKPOINT_LINK]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    """A traceback would reach the user."""
    (tmp_path / "file").write_text("x")
    place = SaveFolder(str(tmp_path / "file" / "checkpoints"))
    with pytest.raises(CheckpointError, match="cannot be written"):
        _save(place, 1)


def test_readers_never_see_half_a_checkpoint(tmp_path: Path) -> None:
    """An export or `get_checkpoints()` at the wrong moment would take one that is being written or removed."""
    place = SaveFolder(str(tmp_path / "checkpoints"))
    seen: list[int] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                for path in list_checkpoints(place.local)[-1:]:
                    assert problems(path) == [] and read_tensors(path)
                    seen.append(int(path.name.partition("-ba")[2]))
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    _save(place, 1)
    for reader in readers:
        reader.start()
    for number in range(2, 40):
        _save(place, number, 20_000, keep=3)
    done.set()
    for reader in readers:
        reader.join()
    assert errors == [] and len(set(seen)) > 3


def test_what_is_no_half_checkpoint_is_not_removed(tmp_path: Path) -> None:
    """Somebody's own files beside the checkpoints would be gone after a resume."""
    place = SaveFolder(str(tmp_path / "checkpoints"))
    _save(place, 1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "note").write_text("mine")
    (place.local / "ep1-ba2").symlink_to(tmp_path / "elsewhere")
    (place.local / ".ep1-ba3.tmp").symlink_to(tmp_path / "elsewhere")
    (place.local / "ep1-ba4").write_text("a file")
    for name in ("notes", ".notes.tmp", "ep1-ba1 copy", ".ep1-ba3"):
        (place.local / name).mkdir()
    clean(place.local)
    assert (tmp_path / "elsewhere" / "note").read_text() == "mine"
    assert {"notes", ".notes.tmp", "ep1-ba1 copy", ".ep1-ba3", "ep1-ba1"} <= {p.name for p in place.local.iterdir()}
    clean(tmp_path / "none")


def test_what_pytorch_reads_itself_is_what_was_saved(tmp_path: Path) -> None:
    """Our checkpoints would be of no use to other programs."""
    import torch
    import torch.distributed.checkpoint as dcp

    folder = _save(SaveFolder(str(tmp_path / "checkpoints")), 3)
    given = _state(0)
    dcp.load(given, checkpoint_id=folder, no_dist=True)
    assert given["state"]["model"]["model.2"].equal(torch.full((1000,), 32.0))
    assert given["state"]["timestamp"]["batch"] == 3
    assert json.loads((folder / "manifest.json").read_text())["files"].keys() == {".metadata", "__0_0.distcp"}
    assert pickle.loads((folder / ".metadata").read_bytes()).storage_data


def test_a_half_written_name_of_the_newest_is_removed(tmp_path: Path) -> None:
    """Each kill in that moment would leave a file that nobody knows."""
    left = tmp_path / f".{CHECKPOINT_LINK}.4242.tmp"
    left.write_text("ep1-b")
    (tmp_path / CHECKPOINT_LINK).write_text("ep1-ba1")
    clean(tmp_path)
    assert not left.exists() and (tmp_path / CHECKPOINT_LINK).read_text() == "ep1-ba1"
