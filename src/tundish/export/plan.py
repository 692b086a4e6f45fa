"""Which tensor goes to which file of an export, and where in it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tundish.checkpoints.format.metadata import DTYPE_BYTES
from tundish.checkpoints.format.tensors import StoredTensor

ExportDtype = Literal["bfloat16", "float32"]
_SAFETENSORS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor and where it goes in an output file."""

    name: str
    """The Hugging Face name."""
    source: StoredTensor
    dtype: str
    start: int
    """First byte in the file's data, which follows the header."""

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.source.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file and its tensors."""

    name: str
    targets: tuple[Target, ...]

    @property
    def header(self) -> bytes:
        """What the file starts with: the length of the description in eight bytes, and the description as JSON."""
        content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for target in self.targets:
            offsets = [target.start, target.start + target.size]
            entry = {"dtype": _SAFETENSORS[target.dtype], "shape": target.source.shape, "data_offsets": offsets}
            content[target.name] = entry
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def plan(weights: Mapping[str, StoredTensor], dtype: ExportDtype, limit: int) -> list[Shard]:
    """Tensors in their order, in shards of at most `limit` bytes; a larger tensor gets a shard of its own."""
    groups: list[list[Target]] = []
    filled = 0
    for name, source in weights.items():
        kept = dtype if "float" in source.dtype else source.dtype
        size = math.prod(source.shape) * DTYPE_BYTES[kept]
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(Target(name, source, kept, filled))
        filled += size
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return [Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]
