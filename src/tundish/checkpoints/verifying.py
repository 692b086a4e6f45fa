"""Whether a checkpoint still holds what was written: every byte is read."""

from pathlib import Path

from tundish.checkpoints import read_tensors
from tundish.checkpoints.manifest import Progress, problems, read_manifest
from tundish.errors import CheckpointError


def verify(folder: Path, progress: Progress | None = None) -> list[str]:
    """Everything that is wrong with a checkpoint, a sentence each.

    With a manifest, every file is compared with its SHA-256; a checkpoint of another program has none, and each of its
    tensors is compared with the CRC-32 that PyTorch has written beside it.

    Args:
        folder: an `ep#-ba#` folder.
        progress: is told the number of bytes that were just read.
    """
    try:
        if read_manifest(folder) is not None:
            return problems(folder, progress)
        tensors = read_tensors(folder).values()
    except CheckpointError as error:
        return [error.message]
    found: list[str] = []
    for tensor in tensors:
        try:
            for block in tensor.blocks():
                if progress is not None:
                    progress(block.nbytes)
        except CheckpointError as error:
            found.append(f"{tensor.name}: {error.message}")
    return found
