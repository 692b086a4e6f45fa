"""The weights of a checkpoint: where they are, and whether they belong to a model."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tundish.checkpoints.folder import MODEL_PREFIX, check_complete, read_tensors
from tundish.checkpoints.format.metadata import read_shapes
from tundish.checkpoints.format.pickles import shown
from tundish.checkpoints.format.tensors import StoredTensor
from tundish.checkpoints.save_folder import save_folder_of
from tundish.errors import CheckpointError, FailureCause, SpecError
from tundish.model.architecture import Shapes, architecture_of, hollow

WEIGHT_PREFIX = f"{MODEL_PREFIX}model."
"""Composer's name of the Hugging Face model inside its state dict."""
SHOWN = 5
LINKED = re.compile(r"[\w-][\w.=+-]{0,250}")
"""What a `.symlink` file may name."""


def find_weights(address: str) -> str:
    """Check that there are weights at an address, or at the one that a `.symlink` names; returns where they are.

    Loads neither torch nor weights; `check_weights` reads them.

    Args:
        address: path or URI of an `ep#-ba#` folder, a `.symlink` or a `.pt` file.

    Raises:
        SpecError: there are none.
        CheckpointError: the folder is incomplete, its metadata names what no checkpoint needs, or its store does not
            answer.
    """
    place, name = save_folder_of(address)
    if name.endswith(".symlink"):
        # The checkpoint lies beside the link, wherever both were moved.
        name = place.read_link(name).rstrip("/").rpartition("/")[2]
        if not LINKED.fullmatch(name):
            raise CheckpointError(f"{address}: names {shown(name)!r}, which is not a checkpoint. Use another path.")
    if place.is_remote:
        exists = place.holds(name)
    else:
        path = Path(address).with_name(name)
        exists = path.is_dir() or (path.suffix == ".pt" and path.is_file())
        if path.is_dir():
            check_complete(path)
    if not exists:
        other = not place.is_remote and Path(address).with_name(name).exists()
        raise SpecError(
            f"{address}: {'is not a checkpoint' if other else 'does not exist'}; it must be an ep…-ba… folder, a "
            ".symlink or a .pt file. Copy the path from get_checkpoints()."
        )
    return f"{place.address}/{name}"


def fetch_weights(address: str) -> Path:
    """The weights that `find_weights` finds, on this machine.

    Raises:
        SpecError: there are none.
        CheckpointError: they are damaged, or cannot be downloaded.
    """
    place, name = save_folder_of(find_weights(address))
    return place.fetch(name)


def compare_weights(address: str, model: str) -> None:
    """Compare names and shapes of the weights at an address with the model's; of a checkpoint in a store, by metadata.

    Raises:
        SpecError: there are none.
        CheckpointError: they are damaged or unsafe, cannot be downloaded, or belong to another model.
    """
    place, name = save_folder_of(find_weights(address))
    if not place.is_remote:
        return check_weights(place.local / name, model)
    if name.endswith(".pt"):
        return None  # it would have to be downloaded whole; the run checks it
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        place.fetch_metadata(name, folder)
        shapes = read_shapes(folder).items()
    stored = {_plain(key): shape for key, shape in shapes if key.startswith(WEIGHT_PREFIX)}
    return check_shapes(address, stored, architecture_of(model).shapes)


def check_weights(path: Path, model: str) -> None:
    """Check that loading `path` (from `fetch_weights`) runs no code and gives all weights of `model`.

    Raises:
        CheckpointError: it is damaged or unsafe, or belongs to another model.
    """
    stored = {name: tensor.shape for name, tensor in read_weights(path).items()} if path.is_dir() else _pt_shapes(path)
    check_shapes(path, stored, architecture_of(model).shapes)


def read_weights(checkpoint: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint's model, by their Hugging Face names.

    Raises:
        CheckpointError: it is damaged or unsafe.
    """
    tensors = read_tensors(checkpoint).items()
    return {_plain(name): tensor for name, tensor in tensors if name.startswith(WEIGHT_PREFIX)}


def fit_vocabulary(config: Any, weights: Mapping[str, StoredTensor], tokens: int, checkpoint: Path) -> None:
    """Set the vocabulary of `config` to the checkpoint's, as tokens may have been added before training.

    Raises:
        CheckpointError: the tokenizer has more tokens than the checkpoint's embedding.
    """
    model = hollow(config)
    embedding = model.get_input_embeddings().weight
    name = next(name for name, tensor in model.named_parameters() if tensor is embedding)
    stored = weights.get(name)
    if stored is None or len(stored.shape) != 2 or stored.shape[0] == config.vocab_size:
        return  # a missing embedding is reported with all other missing weights
    if tokens > stored.shape[0]:
        raise CheckpointError(
            f"{checkpoint}: its vocabulary has {stored.shape[0]:,} tokens, the model's tokenizer {tokens:,}. "
            "Use the model that the run started from.",
            failure=FailureCause.MODEL_MISMATCH,
        )
    config.vocab_size = stored.shape[0]


def check_shapes(checkpoint: Path | str, stored: Shapes, expected: Shapes) -> None:
    """Compare the weights of a checkpoint with those that a model needs.

    Raises:
        CheckpointError: a weight is missing or has another shape.
    """
    missing = [name for name in expected if name not in stored]
    other = [
        f"{name} {list(stored[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    if missing or other:
        raise CheckpointError(
            f"{checkpoint}: not a checkpoint of this model: {len(missing) + len(other)} of its {len(expected)} weights "
            f"differ. Missing: {_some(missing)}. Of another shape: {_some(other)}. Use a checkpoint of the same model.",
            failure=FailureCause.MODEL_MISMATCH,
        )


def _pt_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from tundish.checkpoints.format.objects import verify_file
    from tundish.checkpoints.loading import read_model_file

    verify_file(path)
    return {_plain(name): tuple(tensor.shape) for name, tensor in read_model_file(path).items()}


def _plain(name: str) -> str:
    # Activation checkpointing wraps layers and may insert its name into theirs.
    return name.removeprefix(WEIGHT_PREFIX).replace("_checkpoint_wrapped_module.", "")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "none"
