"""The tensors of a checkpoint, read part by part and compared with their CRC-32."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tundish.checkpoints.format.archive import Bytes, find_bytes
from tundish.checkpoints.format.metadata import Part

if TYPE_CHECKING:
    import torch


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
            region = tuple(slice(start, start + size) for start, size in zip(part.offsets, part.sizes, strict=True))
            whole[region] = read_part(part, self.dtype)
        return whole

    def blocks(self, buffer: bytearray | None = None) -> Iterator["torch.Tensor"]:
        """All elements in their order, flat; at most as many at a time as `buffer` holds if the parts are whole rows.

        A block may replace the one before.

        Raises:
            CheckpointError: its bytes are damaged; raised after the last block of a part.
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

    content = find_bytes(part, dtype)
    flat = torch.empty(math.prod(part.sizes), dtype=getattr(torch, dtype))
    done = 0
    for block in _part_blocks(content, dtype) if len(flat) else ():
        flat[done : done + len(block)] = block
        done += len(block)
    return flat.view(part.sizes)


def _part_blocks(content: Bytes, dtype: str, buffer: bytearray | None = None) -> Iterator["torch.Tensor"]:
    import torch

    for block in content.blocks(buffer):
        yield torch.frombuffer(block, dtype=getattr(torch, dtype))
