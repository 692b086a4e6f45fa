"""Export and custom weights refuse what is unsafe or damaged, and leave nothing behind."""

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish.errors import CheckpointError
from tundish.export.safetensors import export
from tundish.model.weights import check_weights, fetch_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
PutEntry = Callable[[Path, str, bytes], None]
NORM = "state.model.model.model.norm.weight"


@pytest.fixture
def model(tiny_model: Path) -> dict[str, Any]:
    """The tiny model's weights by the names that Composer has for them."""
    from safetensors.torch import load_file

    return {f"model.{name}": tensor for name, tensor in load_file(tiny_model / "model.safetensors").items()}


@pytest.fixture
def trained(tmp_path: Path, model: dict[str, Any]) -> Path:
    """A checkpoint of the tiny model."""
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "checkpoints" / "ep1-ba10"
    dcp.save({"state": {"model": model}}, checkpoint_id=folder, no_dist=True)
    return folder


def _flip(path: Path, values: Any) -> None:
    """Change a bit of a tensor's bytes."""
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<3f", *values.flatten()[:3].tolist()))] ^= 1
    path.write_bytes(content)


def test_an_export_runs_no_code(
    trained: Path, tiny_model: Path, tmp_path: Path, runs_code: Any, archived: Any, put_entry: PutEntry
) -> None:
    """Whoever exports a checkpoint of somebody else would run their program."""
    import torch

    export(trained, str(tiny_model), "CONTINUED_PRETRAIN", tmp_path / "honest")
    put_entry(trained, NORM, archived(runs_code))
    with pytest.raises(CheckpointError):
        export(trained, str(tiny_model), "CONTINUED_PRETRAIN", tmp_path / "out")
    assert not runs_code.marker.exists() and not (tmp_path / "out" / "model.safetensors.index.json").exists()
    torch.load(io.BytesIO(archived(runs_code)), weights_only=False)
    assert runs_code.marker.exists(), "the payload does nothing, so the test would show nothing"


def test_an_export_of_a_flipped_bit_is_refused(
    trained: Path, tiny_model: Path, tmp_path: Path, model: dict[str, Any]
) -> None:
    """A damaged disk would be served to users as a model."""
    _flip(trained / "__0_0.distcp", model["model.lm_head.weight"])
    with pytest.raises(CheckpointError, match="its content is not what was written"):
        export(trained, str(tiny_model), "CONTINUED_PRETRAIN", tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_custom_weights_of_a_flipped_bit_are_refused(tiny_model: Path, tmp_path: Path, model: dict[str, Any]) -> None:
    """PyTorch looks at no checksum of a .pt file: a run would start from damaged weights."""
    import torch

    path = tmp_path / "ep1-ba10.pt"
    torch.save({"state": {"model": model}}, path)
    check_weights(fetch_weights(str(path)), str(tiny_model))
    _flip(path, model["model.lm_head.weight"])
    with pytest.raises(CheckpointError, match="its content is not what was written"):
        check_weights(fetch_weights(str(path)), str(tiny_model))
