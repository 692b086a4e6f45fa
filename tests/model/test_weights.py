"""weights.py: all forms of `custom_weights_path`, and weights of another model found before training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish.errors import CheckpointError, SpecError
from tundish.model.weights import check_weights, fetch_weights, find_weights

# Of PyTorch's own, on saving: it saves from a single process, which is wanted here, and uses its own old storage class.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def weights(tiny_model: Path) -> dict[str, Any]:
    """The tiny model's weights by name."""
    from safetensors.torch import load_file

    return load_file(tiny_model / "model.safetensors")


@pytest.fixture(params=["folder", "symlink", "pt"])
def save(request: pytest.FixtureRequest, tmp_path: Path, weights: dict[str, Any]) -> Callable[..., Path]:
    """`save(change)`: the weights, changed, in one of the forms that `custom_weights_path` takes."""

    def make(change: Change = lambda state: None) -> Path:
        import torch
        import torch.distributed.checkpoint as dcp

        state = dict(weights)
        change(state)
        folder = tmp_path / "checkpoints" / "ep1-ba10"
        if request.param == "pt":
            folder.parent.mkdir()
            path = folder.parent / "ep1-ba10.pt"
            model = {f"model.{name}": tensor for name, tensor in state.items()}
            torch.save({"state": {"model": model}, "rng": []}, path)
            return path
        dcp.save({f"state.model.model.{name}": tensor for name, tensor in state.items()}, checkpoint_id=folder)
        if request.param == "folder":
            return folder
        link = folder.parent / "latest-sharded-rank0.symlink"
        link.write_text(str(folder))
        return link

    return make


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A complete `ep#-ba#` folder."""
    import torch
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "checkpoints" / "ep1-ba10"
    dcp.save({"state.model.model.norm": torch.ones(3)}, checkpoint_id=folder, no_dist=True)
    return folder


def test_weights_of_the_model_are_taken(save: Callable[..., Path], tiny_model: Path) -> None:
    """A chain of runs would be refused."""
    check_weights(fetch_weights(str(save())), str(tiny_model))


def test_weights_of_another_model_are_told(save: Callable[..., Path], tiny_model: Path) -> None:
    """Composer would load what fits and train the rest from the base model, or fail after minutes."""
    import torch

    def change(state: dict[str, Any]) -> None:
        del state["model.norm.weight"]
        state["lm_head.weight"] = torch.zeros(400, 64)

    with pytest.raises(CheckpointError) as error:
        check_weights(fetch_weights(str(save(change))), str(tiny_model))
    assert "not a checkpoint of this model: 2 of its 21 weights differ" in error.value.message
    assert "Missing: model.norm.weight." in error.value.message
    assert "lm_head.weight [400, 64] instead of [384, 64]" in error.value.message


def test_a_pt_file_with_code_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    """`.pt` is a pickle: to load it freely is to run it."""
    import os

    import torch

    class RunsCode:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "marker"),)

    torch.save({"state": {"model": RunsCode()}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="cannot be loaded without running code"):
        check_weights(tmp_path / "x.pt", str(tiny_model))
    assert not (tmp_path / "marker").exists()


def test_a_pt_file_that_is_no_checkpoint_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    """A state dict of PyTorch's own has no place for the model."""
    import torch

    torch.save({"model.norm.weight": torch.ones(3)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt: not a Composer checkpoint, as it has no 'state' with a 'model'"):
        check_weights(tmp_path / "x.pt", str(tiny_model))


def test_custom_weights_are_a_folder_or_what_a_symlink_file_names(checkpoint: Path) -> None:
    """`custom_weights_path` would take only one of the forms that the service took."""
    link = checkpoint.parent / "latest-sharded-rank0.symlink"
    assert find_weights(str(checkpoint)) == str(checkpoint)
    for content in (str(checkpoint), "ep1-ba10\n"):
        link.write_text(content)
        assert find_weights(str(link)) == str(checkpoint)
        assert fetch_weights(str(link)) == checkpoint
    plain = checkpoint.parent / "weights.pt"
    plain.write_bytes(b"x")
    assert find_weights(str(plain)) == str(plain)


def test_custom_weights_that_are_none_say_what_is_allowed(checkpoint: Path) -> None:
    """The run would fail after its data was prepared."""
    other = checkpoint.parent / "weights.bin"
    other.write_bytes(b"x")
    with pytest.raises(SpecError, match=r"weights\.bin: is not a checkpoint; it must be an ep…-ba… folder"):
        find_weights(str(other))
    with pytest.raises(SpecError, match="does not exist"):
        find_weights(str(checkpoint.parent / "ep9-ba9"))
    link = checkpoint.parent / "latest-sharded-rank0.symlink"
    with pytest.raises(CheckpointError, match=r"latest-sharded-rank0\.symlink: cannot be read"):
        find_weights(str(link))
    (checkpoint.parent.parent / "secret").mkdir()
    link.write_text(f"{checkpoint.parent.parent}/secret")
    with pytest.raises(SpecError, match="does not exist"):
        find_weights(str(link))
    (checkpoint / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        find_weights(str(checkpoint))
