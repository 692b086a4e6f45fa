"""Checkpoints: names, order, completeness, and reading that runs no code.

A checkpoint is PyTorch's distributed format (DCP): `.metadata` (a pickle that says which tensor lies where) and
`__<rank>_<i>.distcp` files, each a row of `torch.save` archives; tundish adds `manifest.json`. Every load goes through
this package: nothing that a checkpoint holds is built or run but numbers, texts and tensors, and no name in it leads
out of its folder.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tundish.checkpoints.format.archive import Bytes, find_bytes
from tundish.checkpoints.format.metadata import METADATA, Layout, Part, read_layout
from tundish.checkpoints.manifest import FileFacts, read_manifest, size_problems
from tundish.errors import CheckpointError

if TYPE_CHECKING:
    import torch

CHECKPOINT_LINK = "latest-sharded-rank0.symlink"
"""A text file beside the checkpoints that holds the newest one's path."""
MODEL_PREFIX = "state.model."
"""Composer's name of the model inside its state dict; all that a weights-only load asks for."""
NAME = re.compile(r"ep(\d+)-ba(\d+)")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint, in one or more parts."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """PyTorch's name of the element type."""
    parts: tuple[Part, ...]

    def read(self, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """The whole tensor on the CPU, as `dtype` or its own.

        Raises:
            CheckpointError: its bytes are damaged.
        """
        import torch

        parts = [part for part in self.parts if math.prod(part.sizes)]
        whole = torch.empty(self.shape, dtype=dtype or getattr(torch, self.dtype))
        for part in parts:
            place = tuple(slice(start, start + size) for start, size in zip(part.offsets, part.sizes, strict=True))
            whole[place] = read_part(part, self.dtype)
        return whole

    def blocks(self, buffer: bytearray | None = None) -> Iterator["torch.Tensor"]:
        """All elements in the tensor's order, flat, as many at a time as `buffer` takes where the parts are rows.

        Each block may lie in the place of the one before.

        Raises:
            CheckpointError: its bytes are damaged; told after the last block of a part.
        """
        if any(part.sizes[1:] != self.shape[1:] for part in self.parts):
            yield self.read().flatten()
            return
        for part in sorted(self.parts, key=lambda part: part.offsets):
            if math.prod(part.sizes):
                yield from _part_blocks(find_bytes(part, self.dtype), self.dtype, buffer)


def read_part(part: Part, dtype: str) -> "torch.Tensor":
    """One part of a tensor on the CPU, with its own type.

    Raises:
        CheckpointError: its bytes are damaged.
    """
    import torch

    found = find_bytes(part, dtype)
    flat = torch.empty(math.prod(part.sizes), dtype=getattr(torch, dtype))
    done = 0
    for block in _part_blocks(found, dtype) if len(flat) else ():
        flat[done : done + len(block)] = block
        done += len(block)
    return flat.view(part.sizes)


def _part_blocks(found: Bytes, dtype: str, buffer: bytearray | None = None) -> Iterator["torch.Tensor"]:
    import torch

    for block in found.blocks(buffer):
        yield torch.frombuffer(block, dtype=getattr(torch, dtype))


def list_checkpoints(save_folder: Path) -> list[Path]:
    """The complete `ep#-ba#` folders, oldest first."""
    if not save_folder.is_dir():
        return []
    return [path for path in in_order(save_folder.iterdir()) if _is_complete(path)]


def in_order(paths: Any) -> list[Any]:
    """Those of `paths` whose last part is a checkpoint's name, oldest first."""
    found = [(match, path) for path in paths if (match := NAME.fullmatch(str(path).rpartition("/")[2]))]
    return [path for _, path in sorted(found, key=lambda item: (int(item[0][2]), int(item[0][1])))]


def _is_complete(folder: Path) -> bool:
    try:
        check_complete(folder)
        return True
    except (CheckpointError, OSError):
        return False


def check_complete(folder: Path) -> None:
    """Look at a checkpoint's files, without torch, and without reading more than its manifest or its metadata.

    Raises:
        CheckpointError: it is incomplete, or its metadata names what no checkpoint needs.
    """
    files = read_manifest(folder)
    if files is None or METADATA not in files:
        read_layout(folder)
    elif problems := size_problems(folder, files):
        raise CheckpointError(f"{problems[0]} The checkpoint is incomplete; use another one.")


def read_checkpoint(folder: Path) -> Layout:
    """What a checkpoint holds; of the tensors, only the places are read.

    Raises:
        CheckpointError: it is incomplete, damaged or unsafe.
    """
    files = read_manifest(folder)
    if files is not None:
        check_complete(folder)
        if METADATA in files and FileFacts.of(folder / METADATA) != files[METADATA]:
            raise CheckpointError(
                f"{folder / METADATA}: its bytes are not those that were written (SHA-256). Use another checkpoint."
            )
    return read_layout(folder)


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its name in the state dict; nothing is loaded but the metadata.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or unsafe.
    """
    tensors = read_checkpoint(folder).tensors.items()
    return {name: StoredTensor(name, shape, dtype, parts) for name, (dtype, shape, parts) in tensors}
