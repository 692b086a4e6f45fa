"""checkpoints/loading.py: PyTorch's planner loads, and nothing of a checkpoint runs on the way."""

import os
import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoints.processes import start

from tundish.checkpoints.folder import read_tensors
from tundish.checkpoints.loading import load, read_model_file
from tundish.errors import CheckpointError

# Of PyTorch's own: it saves and loads in a single process, which is wanted here, and uses its own old storage class.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
MakeState = Callable[[], dict[str, Any]]
PutEntry = Callable[[Path, str, bytes], None]
Change = Callable[[Path, Callable[[Any], None]], None]


def _refusal(given: dict[str, Any], path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(given, path)
    assert error.value.message.isprintable() and "Traceback" not in error.value.message
    return error.value.message


def test_a_checkpoint_is_loaded_as_it_was_saved(checkpoint: Path, state: MakeState) -> None:
    """A run would go on with other weights, or from another batch."""
    import torch

    given = state()
    load(given, checkpoint)
    assert given["state"]["model"]["model.embed"].equal(torch.arange(24.0).reshape(6, 4))
    assert given["state"]["model"]["model.norm"].tolist() == [0.5, -2.0, 3.25]
    assert given["state"]["timestamp"] == {"Timestamp": {"batch": 10}} and given["state"]["run_name"] == "ift-1"


@pytest.mark.parametrize("entry", ["state.run_name", "state.timestamp.Timestamp.batch", "state.model.model.embed"])
def test_code_in_an_entry_is_refused_and_not_run(
    checkpoint: Path, state: MakeState, runs_code: Any, archived: Any, put_entry: PutEntry, entry: str
) -> None:
    """PyTorch unpickles entries that are no tensors; whoever made the checkpoint would run any program."""
    import torch

    put_entry(checkpoint, entry, archived(runs_code))
    message = _refusal(state(), checkpoint)
    assert "names posix.system, which no checkpoint needs" in message and ".distcp, byte 0" in message
    assert not runs_code.marker.exists()
    # PyTorch's own loader, as it was until 2.6, unpickles freely.
    shard = max(checkpoint.glob("__9_*"))
    torch.load(shard, weights_only=False)
    assert runs_code.marker.exists(), "the payload does nothing, so the test would show nothing"


def test_code_in_the_metadata_is_refused_and_not_run(
    checkpoint: Path, state: MakeState, runs_code: Any, change: Change
) -> None:
    """PyTorch's own loader runs it before anything is loaded."""
    import torch.distributed.checkpoint as dcp

    change(checkpoint, lambda metadata: setattr(metadata, "planner_data", runs_code))
    assert ".metadata: cannot be read: it names posix.system" in _refusal(state(), checkpoint)
    assert not runs_code.marker.exists()
    with suppress(Exception):  # whatever it says of what the payload returned
        dcp.load(state(), checkpoint_id=checkpoint, no_dist=True)
    assert runs_code.marker.exists(), "the payload does nothing, so the test would show nothing"


@pytest.mark.parametrize("entry", ["state.model.model.embed", "state.run_name"])
def test_an_entry_of_the_other_kind_is_refused(checkpoint: Path, state: MakeState, change: Change, entry: str) -> None:
    """A tensor would be read as an object, or an object as a tensor."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    def turn(metadata: Any) -> None:
        entries = metadata.state_dict_metadata
        if entry == "state.run_name":
            entries[entry] = entries["state.model.model.embed"]
            return
        entries[entry] = BytesStorageMetadata()
        (index,) = [index for index in metadata.storage_data if index.fqn == entry]
        metadata.storage_data[MetadataIndex(entry)] = metadata.storage_data.pop(index)

    change(checkpoint, turn)
    assert entry in _refusal(state(), checkpoint) or entry == "state.run_name"


def test_another_model_s_checkpoint_is_told(checkpoint: Path, state: MakeState) -> None:
    """PyTorch's collection of all ranks' tracebacks would reach the user."""
    import torch

    given = state()
    given["state"]["model"]["model.embed"] = torch.zeros(6, 5)
    assert "Use a checkpoint of the same model" in _refusal(given, checkpoint)
    given = state()
    given["state"]["model"]["model.more"] = torch.zeros(1)
    assert "model.more" in _refusal(given, checkpoint)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "oversized", "missing", "folder missing", "empty folder"])
def test_damaged_files_are_refused(checkpoint: Path, state: MakeState, damage: str) -> None:
    """Training would go on from wrong numbers."""
    shard = checkpoint / "__0_0.distcp"
    content = shard.read_bytes()
    if damage == "flipped":
        at = content.index(struct.pack("<3f", 10, 11, 12))
        shard.write_bytes(content[:at] + b"\1" + content[at + 1 :])
    elif damage == "truncated":
        os.truncate(shard, len(content) - 1)
    elif damage == "oversized":
        os.truncate(shard, len(content) + 1)
    elif damage == "missing":
        shard.unlink()
    else:
        checkpoint.rename(checkpoint.parent / "moved")
        if damage == "empty folder":
            checkpoint.mkdir()
    assert str(checkpoint) in _refusal(state(), checkpoint)


def _file(path: Path, content: Any) -> Path:
    import torch

    torch.save(content, path)
    return path


def test_a_pt_file_gives_its_model(tmp_path: Path, state: MakeState) -> None:
    """`custom_weights_path` with a .pt file would load nothing."""
    import torch

    model = {"model.embed": torch.arange(24.0).reshape(6, 4), "model.norm": torch.ones(3, dtype=torch.bfloat16)}
    path = _file(tmp_path / "x.pt", {"state": {"model": model, "timestamp": {"batch": 3}}, "rng": []})
    given = {"state": {"model": state()["state"]["model"]}}
    load(given, path)
    assert given["state"]["model"]["model.embed"].equal(model["model.embed"])
    assert "Missing key" in _refusal(state(), path), "it is read for its weights only"


@pytest.mark.parametrize(
    "content",
    [[], {}, 5, None, {"state": 5}, {"state": {"model": 5}}, {"state": {"model": ["a"]}}, {"state": []}],
    ids=str,
)
def test_a_pt_file_without_a_model_is_told(tmp_path: Path, content: Any) -> None:
    """A traceback would not say which file is wrong."""
    with pytest.raises(CheckpointError, match=r"x\.pt: not a Composer checkpoint, as it has no 'state' with a 'model'"):
        read_model_file(_file(tmp_path / "x.pt", content))


def test_code_in_a_pt_file_is_refused_and_not_run(tmp_path: Path, runs_code: Any, state: MakeState) -> None:
    """`.pt` is a pickle: to load it freely is to run it."""
    import torch

    path = _file(tmp_path / "x.pt", {"state": {"model": state()["state"]["model"], "callbacks": [runs_code]}})
    assert "x.pt, byte 0: cannot be loaded without running code from it" in _refusal(state(), path)
    path.with_name("y.pt").write_bytes(pickle.dumps(runs_code))
    _refusal(state(), path.with_name("y.pt"))
    assert not runs_code.marker.exists()
    torch.load(path, weights_only=False)
    assert runs_code.marker.exists(), "the payload does nothing, so the test would show nothing"
    assert "not a file" in _refusal(state(), tmp_path / "none.pt")


def _rank(rank: int, world: int, port: int, folder: Path, how: str) -> None:
    """Save a model's state as this rank of `world`, in a process of its own."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from tundish.checkpoints.save_folder import SaveFolder
    from tundish.checkpoints.saving import Staged, write_checkpoint

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    model = _model()
    if how != "plain":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    state = {"state": {"model": get_model_state_dict(model), "timestamp": {"batch": 3}}}
    if how == "ours":
        staged = Staged(state, folder, copy=False)

        def exchange(given: Any) -> list[Any]:
            found: list[Any] = [None] * world
            dist.all_gather_object(found, given)
            return found

        write_checkpoint(staged, SaveFolder(str(folder.parent)), exchange, rank == 0)
    else:
        dcp.save(state, checkpoint_id=folder)
    dist.barrier()
    dist.destroy_process_group()


def _model() -> Any:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.Linear(7, 2, bias=False))
    for number, weight in enumerate(model.parameters()):
        torch.nn.init.constant_(weight, number)
        weight.data.flatten()[::2] = 0.5
    return model


@pytest.mark.parametrize("how", ["plain", "FSDP2", "ours"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_checkpoints_of_any_number_of_ranks_are_loaded(tmp_path: Path, world: int, how: str) -> None:
    """A guard that refuses what is honest would end every run that goes on."""
    import socket

    import torch

    folder = tmp_path / "checkpoints" / "ep1-ba3"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(_rank, rank, world, port, folder, how) for rank in range(world)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * world
    expected = _model().state_dict()
    given = {"state": {"model": {name: torch.zeros_like(t) for name, t in expected.items()}, "timestamp": {"batch": 0}}}
    load(given, folder)
    assert given["state"]["timestamp"]["batch"] == 3
    read = {name: tensor.read() for name, tensor in read_tensors(folder).items()}
    assert len(expected) == 3
    for name, tensor in expected.items():
        assert given["state"]["model"][name].equal(tensor) and read[f"state.model.{name}"].equal(tensor)
    if how != "plain":
        assert len(read_tensors(folder)["state.model.0.weight"].parts) == world
