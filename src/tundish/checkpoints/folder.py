"""A run's folder of checkpoints: their names, their order, and whether each is complete.

A checkpoint is PyTorch's distributed format (DCP): `.metadata` (a pickle that says which tensor lies where) and
`__<rank>_<i>.distcp` files, each a row of `torch.save` archives; tundish adds `manifest.json`. Nothing that a
checkpoint holds is built or run but numbers, texts and tensors, and no name in it leads out of its folder.
"""

import re
from pathlib import Path
from typing import Any

from tundish.checkpoints.format.metadata import METADATA, Layout, read_layout
from tundish.checkpoints.format.tensors import StoredTensor
from tundish.checkpoints.manifest import BytesRead, FileFacts, problems, read_manifest, size_problems
from tundish.errors import CheckpointError

CHECKPOINT_LINK = "latest-sharded-rank0.symlink"
"""A text file beside the checkpoints that holds the newest one's path."""
MODEL_PREFIX = "state.model."
"""Composer's name of the model inside its state dict; all that a weights-only load asks for."""
NAME = re.compile(r"ep(\d+)-ba(\d+)")


def list_checkpoints(save_folder: Path) -> list[Path]:
    """The complete `ep#-ba#` folders, oldest first."""
    if not save_folder.is_dir():
        return []
    return [path for path in in_order(save_folder.iterdir()) if _is_complete(path)]


def in_order(paths: Any) -> list[Any]:
    """Those of `paths` whose last part is a checkpoint's name, oldest first."""
    named = [(match, path) for path in paths if (match := NAME.fullmatch(str(path).rpartition("/")[2]))]
    # By batch, then by epoch: a resumed run may count its epochs anew.
    return [path for _, path in sorted(named, key=lambda item: (int(item[0][2]), int(item[0][1])))]


def _is_complete(folder: Path) -> bool:
    try:
        check_complete(folder)
        return True
    except (CheckpointError, OSError):
        return False


def check_complete(folder: Path) -> None:
    """Check that all files of a checkpoint exist and have their size; reads its manifest or metadata, and no torch.

    Raises:
        CheckpointError: it is incomplete, or its metadata names what no checkpoint needs.
    """
    files = read_manifest(folder)
    if files is None or METADATA not in files:
        read_layout(folder)
    elif differences := size_problems(folder, files):
        raise CheckpointError(f"{differences[0]} The checkpoint is incomplete. Use another one.")


def read_checkpoint(folder: Path) -> Layout:
    """What a checkpoint contains; of tensors, only where they lie is read.

    Raises:
        CheckpointError: it is incomplete, damaged or unsafe.
    """
    files = read_manifest(folder)
    if files is not None:
        check_complete(folder)
        if METADATA in files and FileFacts.of(folder / METADATA) != files[METADATA]:
            raise CheckpointError(
                f"{folder / METADATA}: its content is not what was written (SHA-256 differs). Use another checkpoint."
            )
    return read_layout(folder)


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its name in the state dict; only metadata is loaded.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or unsafe.
    """
    tensors = read_checkpoint(folder).tensors.items()
    return {name: StoredTensor(name, shape, dtype, parts) for name, (dtype, shape, parts) in tensors}


def verify(folder: Path, progress: BytesRead | None = None) -> list[str]:
    """Everything that is wrong with a checkpoint, one sentence each; every byte is read.

    With a manifest, every file is compared with its SHA-256. Checkpoints of other programs have none; each of their
    tensors is compared with the CRC-32 that PyTorch stores beside it.

    Args:
        folder: an `ep#-ba#` folder.
        progress: called with the number of bytes just read.
    """
    try:
        if read_manifest(folder) is not None:
            return problems(folder, progress)
        tensors = read_tensors(folder).values()
    except CheckpointError as error:
        return [error.message]
    damage: list[str] = []
    for tensor in tensors:
        try:
            for block in tensor.blocks():
                if progress is not None:
                    progress(block.nbytes)
        except CheckpointError as error:
            damage.append(f"{tensor.name}: {error.message}")
    return damage
