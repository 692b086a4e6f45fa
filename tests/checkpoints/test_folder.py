"""checkpoints/folder.py: real DCP checkpoints are read and listed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish.checkpoints.folder import list_checkpoints, read_tensors
from tundish.errors import CheckpointError

# Of PyTorch's own, on saving: it saves from a single process, which is wanted here, and uses its own old storage class.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]

Change = Callable[[Path, Callable[[Any], None]], None]


def test_tensors_are_read_as_they_were_saved(checkpoint: Path) -> None:
    """An export would hold other weights than were trained."""
    import torch

    tensors = read_tensors(checkpoint)
    assert set(tensors) == {"state.model.model.embed", "state.model.model.norm", "state.optimizers.step"}
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


def test_a_shard_with_another_tensor_than_promised_is_refused(checkpoint: Path, change: Change) -> None:
    """Weights of one layer would be read as another's."""

    def swap(metadata: Any) -> None:
        places = {index.fqn: index for index in metadata.storage_data}
        first, second = places["state.model.model.embed"], places["state.model.model.norm"]
        data = metadata.storage_data
        data[first], data[second] = data[second], data[first]

    change(checkpoint, swap)
    with pytest.raises(CheckpointError, match=r"holds bfloat16 \(3,\); the metadata says float32 \(6, 4\)"):
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
