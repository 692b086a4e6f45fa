"""checkpoints.py: real DCP checkpoints are read, and nothing in them is believed."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish.checkpoints import list_checkpoints, read_tensors
from tundish.errors import CheckpointError

# Of PyTorch's own, on saving: it saves from a single process, which is wanted here, and uses its own old storage class.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]

Change = Callable[[Path, Callable[[Any], None]], None]


class RunsCode:
    """Makes a file when it is unpickled, as an attacker's payload would."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint as PyTorch writes it, in `ep1-ba10`, with three tensors and an entry that is none."""
    import torch
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "checkpoints" / "ep1-ba10"
    state = {
        "state.model.model.embed": torch.arange(24, dtype=torch.float32).reshape(6, 4),
        "state.model.model.norm": torch.tensor([0.5, -2.0, 3.25], dtype=torch.bfloat16),
        "state.optimizers.step": torch.tensor(7.0),
        "state.timestamp": {"batch": 10},
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def change() -> Change:
    """Rewrites a checkpoint's metadata after a change."""

    def apply(folder: Path, how: Callable[[Any], None]) -> None:
        path = folder / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        how(metadata)
        path.write_bytes(pickle.dumps(metadata))

    return apply


def test_tensors_are_read_as_they_were_saved(checkpoint: Path) -> None:
    """An export would hold other weights than were trained."""
    import torch

    tensors = read_tensors(checkpoint)
    assert {"state.model.model.embed", "state.model.model.norm", "state.optimizers.step"} <= set(tensors)
    embed, norm, step = (
        tensors[f"state.{name}"] for name in ("model.model.embed", "model.model.norm", "optimizers.step")
    )
    assert embed.shape == (6, 4) and embed.dtype == "float32"
    assert torch.equal(embed.read(), torch.arange(24, dtype=torch.float32).reshape(6, 4))
    assert norm.read().dtype == torch.bfloat16 and norm.read().tolist() == [0.5, -2.0, 3.25]
    assert step.read().item() == 7.0 and step.shape == ()


def test_tensors_are_read_as_another_dtype_on_request(checkpoint: Path) -> None:
    """A bfloat16 export would keep float32, or values would be reinterpreted instead of rounded."""
    import torch

    read = read_tensors(checkpoint)["state.model.model.embed"].read(torch.bfloat16)
    assert read.dtype == torch.bfloat16 and read[5, 3] == 23


def test_a_tensor_in_two_chunks_is_put_together(tmp_path: Path, change: Change) -> None:
    """A checkpoint of two ranks would come back with its parts in the wrong places."""
    import torch
    import torch.distributed.checkpoint as dcp

    whole = torch.arange(20, dtype=torch.float32).reshape(5, 4)
    folder = tmp_path / "ep1-ba1"
    dcp.save({"upper": whole[:3].clone(), "lower": whole[3:].clone()}, checkpoint_id=folder, no_dist=True)

    def join(metadata: Any) -> None:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

        places = {index.fqn: info for index, info in metadata.storage_data.items()}
        entry = metadata.state_dict_metadata["upper"]
        entry.size = torch.Size([5, 4])
        entry.chunks = [
            ChunkStorageMetadata(offsets=torch.Size([0, 0]), sizes=torch.Size([3, 4])),
            ChunkStorageMetadata(offsets=torch.Size([3, 0]), sizes=torch.Size([2, 4])),
        ]
        metadata.state_dict_metadata = {"joined": entry}
        metadata.storage_data = {
            MetadataIndex("joined", torch.Size([3, 0])): places["lower"],
            MetadataIndex("joined", torch.Size([0, 0])): places["upper"],
        }

    change(folder, join)
    (tensor,) = read_tensors(folder).values()
    assert len(tensor.parts) == 2 and torch.equal(tensor.read(), whole)


@pytest.mark.parametrize("where", ["alone", "inside real metadata"])
def test_code_in_the_metadata_is_refused_and_not_run(
    checkpoint: Path, tmp_path: Path, change: Change, where: str
) -> None:
    """Reading a downloaded checkpoint would run any program."""
    marker = tmp_path / "ran"
    if where == "alone":
        (checkpoint / ".metadata").write_bytes(pickle.dumps(RunsCode(marker)))
    else:
        change(checkpoint, lambda metadata: setattr(metadata, "planner_data", RunsCode(marker)))
    with pytest.raises(CheckpointError, match=r"\.metadata: the metadata names \w+\.system, .* It was not loaded"):
        read_tensors(checkpoint)
    assert not marker.exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert marker.exists(), "the payload does nothing, so the test would show nothing"


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "torch load",
        "torch.serialization load",
        "os system",
        "torch.hub load",
        "pathlib Path",
    ],
)
def test_only_what_dcp_needs_may_be_named_in_the_metadata(checkpoint: Path, name: str) -> None:
    """A function of an allowed module, or one that finds others, would be a way round the guard."""
    module, function = name.split()
    (checkpoint / ".metadata").write_bytes(f"c{module}\n{function}\n.".encode())
    with pytest.raises(CheckpointError, match=f"names {module}.{function}"):
        read_tensors(checkpoint)


def test_code_in_a_shard_is_refused_and_not_run(checkpoint: Path, tmp_path: Path, change: Change) -> None:
    """The guard on the metadata would be worth nothing if a tensor's bytes could run a program."""
    import torch

    marker = tmp_path / "ran"
    shard = checkpoint / "__0_9.distcp"
    torch.save(RunsCode(marker), shard)

    def point(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == "state.model.model.norm":
                info.relative_path, info.offset, info.length = shard.name, 0, shard.stat().st_size

    change(checkpoint, point)
    with pytest.raises(CheckpointError, match=r"not a readable tensor.*damaged or unsafe"):
        read_tensors(checkpoint)["state.model.model.norm"].read()
    assert not marker.exists()


def test_an_entry_of_the_model_that_is_no_tensor_is_refused(checkpoint: Path, change: Change) -> None:
    """PyTorch unpickles such an entry freely when the model's weights are loaded."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    def turn(metadata: Any) -> None:
        metadata.state_dict_metadata["state.model.model.norm"] = BytesStorageMetadata()

    change(checkpoint, turn)
    with pytest.raises(CheckpointError, match=r"state\.model\.model\.norm is no tensor; loading it could run code"):
        read_tensors(checkpoint)


@pytest.mark.parametrize("name", ["../secret.distcp", "/etc/passwd", "a/../../secret.distcp"])
def test_names_that_leave_the_folder_are_refused(checkpoint: Path, change: Change, name: str) -> None:
    """A checkpoint would make the export read any file of the machine."""
    (checkpoint.parent / "secret.distcp").write_bytes(b"x" * 10_000)

    def point(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    change(checkpoint, point)
    with pytest.raises(CheckpointError, match=r"\.metadata: .*leaves"):
        read_tensors(checkpoint)


def test_links_that_leave_the_folder_are_refused(checkpoint: Path) -> None:
    """A link would get round the check of names."""
    shard = checkpoint / "__0_0.distcp"
    shard.rename(checkpoint.parent / "elsewhere.distcp")
    shard.symlink_to(checkpoint.parent / "elsewhere.distcp")
    with pytest.raises(CheckpointError, match="leaves"):
        read_tensors(checkpoint)


def test_a_truncated_shard_is_named(checkpoint: Path) -> None:
    """An export from half a checkpoint would fail late, or write zeros."""
    shard = checkpoint / "__0_0.distcp"
    size = shard.stat().st_size
    with open(shard, "r+b") as file:
        file.truncate(size // 2)
    with pytest.raises(
        CheckpointError, match=rf"__0_0\.distcp: has {size // 2:,} bytes, but .* The checkpoint is incomplete"
    ):
        read_tensors(checkpoint)


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    """The caller would not learn which file is missing."""
    (checkpoint / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: is missing, but .* use another one"):
        read_tensors(checkpoint)


def test_missing_or_damaged_metadata_is_named(checkpoint: Path) -> None:
    """An unfinished checkpoint would end in a traceback of pickle."""
    path = checkpoint / ".metadata"
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"not a pickle", pickle.dumps([1, 2])):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"\.metadata: (cannot be read|not a DCP checkpoint)"):
            read_tensors(checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"there is no \.metadata, so the checkpoint is not complete"):
        read_tensors(checkpoint)


def test_a_shard_with_another_tensor_than_promised_is_refused(checkpoint: Path, change: Change) -> None:
    """Weights of one layer would be read as another's."""

    def swap(metadata: Any) -> None:
        places = {index.fqn: index for index in metadata.storage_data}
        first, second = places["state.model.model.embed"], places["state.model.model.norm"]
        data = metadata.storage_data
        data[first], data[second] = data[second], data[first]

    change(checkpoint, swap)
    with pytest.raises(CheckpointError, match=r"found \(3,\), its metadata says \(6, 4\)"):
        read_tensors(checkpoint)["state.model.model.embed"].read()


def test_a_tensor_whose_chunks_do_not_cover_it_is_refused(checkpoint: Path, change: Change) -> None:
    """What no chunk covers would be exported as whatever was in memory."""
    import torch

    def grow(metadata: Any) -> None:
        metadata.state_dict_metadata["state.model.model.embed"].size = torch.Size([12, 4])

    change(checkpoint, grow)
    with pytest.raises(CheckpointError, match=r"state\.model\.model\.embed"):
        read_tensors(checkpoint)["state.model.model.embed"].read()


def _copies(checkpoint: Path, *names: str) -> Path:
    import shutil

    for name in names:
        if name != checkpoint.name:
            shutil.copytree(checkpoint, checkpoint.with_name(name))
    return checkpoint.parent


def test_checkpoints_are_listed_oldest_first(checkpoint: Path) -> None:
    """Export and resume take the last one: sorted as text, ep1-ba9 would come after ep2-ba100."""
    folder = _copies(checkpoint, "ep1-ba9", "ep2-ba100", "ep10-ba200", "ep1-ba10")
    assert [path.name for path in list_checkpoints(folder)] == ["ep1-ba9", "ep1-ba10", "ep2-ba100", "ep10-ba200"]


def test_what_is_no_checkpoint_is_not_listed(checkpoint: Path) -> None:
    """Links, other folders and files would be taken for checkpoints."""
    folder = _copies(checkpoint, "ep1-ba10", ".ep1-ba11", "ep1-ba12.tmp", "xep1-ba13")
    (folder / "latest-sharded-rank0.symlink").write_text(str(checkpoint))
    (folder / "ep1-ba14").write_text("a file")
    assert [path.name for path in list_checkpoints(folder)] == ["ep1-ba10"]
    assert list_checkpoints(folder / "none") == []


def test_a_checkpoint_without_metadata_is_not_listed(checkpoint: Path) -> None:
    """A checkpoint that a killed run was writing would be exported or resumed from."""
    folder = _copies(checkpoint, "ep1-ba11")
    (folder / "ep1-ba11" / ".metadata").unlink()
    assert list_checkpoints(folder) == [checkpoint]


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_checkpoint_that_lacks_a_file_is_not_listed(checkpoint: Path, damage: str) -> None:
    """Complete means: every file that the metadata names is there and has its size."""
    folder = _copies(checkpoint, "ep1-ba11")
    shard = folder / "ep1-ba11" / "__0_0.distcp"
    if damage == "missing":
        shard.unlink()
    else:
        os.truncate(shard, 100)
    assert list_checkpoints(folder) == [checkpoint]
