"""A checkpoint's `.metadata`: which tensor lies where, read without building anything that it names.

PyTorch unpickles `.metadata` without restriction, so its author can run code. Here only the names that DCP needs are
allowed, and each stands for a record that does nothing (see pickles.py). What comes out is checked piece by piece, also
against the files, and copied into the classes below.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tundish.checkpoints.format.names import member
from tundish.checkpoints.format.pickles import Call, PlainUnpickler, Record, empty_dict, reason, same, shown
from tundish.errors import CheckpointError

METADATA = ".metadata"
LARGEST_METADATA = 512 << 20
"""Bytes; a part of a tensor takes about 150 of them."""
LARGEST_NUMBER = 1 << 63
MOST_DIMENSIONS = 64
DTYPE_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"), 1),
}
"""Bytes of an element by PyTorch's name of its type."""


@dataclass(frozen=True, slots=True)
class Part:
    """The archive of an object, or of a part of a tensor: its place in a file."""

    offsets: tuple[int, ...]
    """Index of its first element in the whole tensor."""
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int
    """Bytes of the archive, its own headers included."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The content of a checkpoint by the names of its flattened state dict. Every part lies within its file."""

    tensors: Mapping[str, tuple[str, tuple[int, ...], tuple[Part, ...]]]
    """PyTorch's name of the element type, shape, and parts that cover the tensor without overlap."""
    objects: Mapping[str, Part]
    paths: Mapping[str, tuple[str | int, ...]]
    """The keys that lead to an entry in the state dict before it was flattened."""


def read_layout(folder: Path) -> Layout:
    """The content of the checkpoint in `folder`.

    Raises:
        CheckpointError: it is incomplete or damaged, names what no checkpoint needs, or leaves its folder.
    """
    root = _load(folder)
    try:
        return _layout(folder, root.state)
    except CheckpointError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / METADATA}: not the metadata of a DCP checkpoint ({reason(error)}). Use another checkpoint."
        ) from error


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by its name in the state dict; needs no file of the checkpoint but its metadata.

    Raises:
        CheckpointError: it is damaged or unsafe.
    """
    root = _load(folder)
    try:
        entries = root.state["state_dict_metadata"].items()
        tensors = {_text(name): e.state for name, e in entries if isinstance(e.state, dict) and "chunks" in e.state}
        return {name: numbers(state["size"]) for name, state in tensors.items()}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / METADATA}: not the metadata of a DCP checkpoint ({reason(error)}). Use another checkpoint."
        ) from error


_DCP = "torch.distributed.checkpoint"
_RECORD = Call(Record)
_TENSOR_PROPERTIES = ("TensorProperties", "_MEM_FORMAT_ENCODING", "MEM_FORMAT_ENCODING")
_NAMES: Mapping[str, Any] = {
    **{
        f"{_DCP}.metadata.{name}": _RECORD
        for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", *_TENSOR_PROPERTIES)
    },
    **{f"{_DCP}.metadata.{name}": _RECORD for name in ("ChunkStorageMetadata", "MetadataIndex", "StorageMeta")},
    # Their home in PyTorch 2.2 and older.
    **{f"torch.distributed._shard.sharded_tensor.metadata.{name}": _RECORD for name in _TENSOR_PROPERTIES},
    f"{_DCP}.filesystem._StorageInfo": _RECORD,
    "torch.serialization._get_layout": _RECORD,
    "pathlib.PosixPath": _RECORD,
    "torch.Size": Call(same),
    **{f"torch.{name}": name for name in DTYPE_BYTES},
    "collections.OrderedDict": Call(empty_dict),
}


def _load(folder: Path) -> Any:
    path = member(folder, METADATA)
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {METADATA}, so the checkpoint is incomplete. Use another one.")
    if (size := path.stat().st_size) > LARGEST_METADATA:
        raise CheckpointError(
            f"{path}: has {size:,} bytes, and may have at most {LARGEST_METADATA:,}. Use another checkpoint."
        )
    try:
        return PlainUnpickler(path.read_bytes(), _NAMES).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.message}. Do not use this checkpoint.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}). Use another checkpoint.") from error


def _layout(folder: Path, state: Mapping[str, Any]) -> Layout:
    places = {
        (_text(index.state["fqn"]), _offsets(index.state.get("offset"))): info.state
        for index, info in state["storage_data"].items()
    }
    files = _Files(folder, places.values())
    tensors: dict[str, tuple[str, tuple[int, ...], tuple[Part, ...]]] = {}
    objects: dict[str, Part] = {}
    for given, entry in state["state_dict_metadata"].items():
        name = _text(given)
        if not isinstance(entry.state, dict) or "chunks" not in entry.state:
            objects[name] = files.part(places[name, None])
            continue
        chunks = [(numbers(chunk.state["offsets"]), numbers(chunk.state["sizes"])) for chunk in entry.state["chunks"]]
        parts = tuple(
            files.part(places.get((name, offsets)) or places[name, None], offsets, sizes) for offsets, sizes in chunks
        )
        dtype, shape = _dtype(entry.state["properties"].state[0]), numbers(entry.state["size"])
        _check_parts(folder, name, dtype, shape, parts)
        tensors[name] = dtype, shape, parts
    _check_places(folder, [part for _, _, parts in tensors.values() for part in parts])
    return Layout(tensors, objects, dict(_paths(state.get("planner_data") or {})))


class _Files:
    """The files of a checkpoint; each is checked once."""

    def __init__(self, folder: Path, infos: Iterable[Mapping[str, Any]]) -> None:
        self.paths: dict[str, Path] = {}
        ends: dict[str, int] = {}
        for info in infos:
            name = _text(info["relative_path"])
            start, length = numbers((info["offset"], info["length"]))
            ends[name] = max(ends.get(name, 0), start + length)
            if info.get("transform_descriptors"):
                raise CheckpointError(
                    f"{folder / METADATA}: {name} is compressed, which is not supported. Use another checkpoint."
                )
        for name, end in ends.items():
            self.paths[name] = _checked(folder, name, end)

    def part(self, info: Mapping[str, Any], offsets: tuple[int, ...] = (), sizes: tuple[int, ...] = ()) -> Part:
        return Part(offsets, sizes, self.paths[info["relative_path"]], info["offset"], info["length"])


def _checked(folder: Path, name: str, end: int) -> Path:
    """A file of the folder that exists and ends where its last entry does."""
    file = member(folder, name)
    size = file.stat().st_size if file.is_file() else -1
    if size != end:
        state = f"has {size:,} bytes" if size >= 0 else "is missing"
        what = "incomplete" if size < end else "damaged"
        raise CheckpointError(
            f"{file}: {state}, but its last entry ends at byte {end:,}. The checkpoint is {what}. Use another one."
        )
    return file


def _check_parts(folder: Path, name: str, dtype: str, shape: tuple[int, ...], parts: tuple[Part, ...]) -> None:
    """Check that the parts cover each element of the tensor once, and that their files have enough bytes.

    Raises:
        CheckpointError: they do not; nothing was allocated.
    """
    where = f"{folder / METADATA}: {name}"
    if any(part.length < math.prod(part.sizes) * DTYPE_BYTES[dtype] for part in parts):
        raise CheckpointError(f"{where}: is larger than its bytes in the file. Do not use this checkpoint.")
    same_dims = all(len(part.offsets) == len(part.sizes) == len(shape) for part in parts)
    addressable = math.prod(max(1, size) for size in shape) * DTYPE_BYTES[dtype] < LARGEST_NUMBER
    if not same_dims or not addressable or not _covers(shape, [part for part in parts if math.prod(part.sizes)]):
        raise CheckpointError(
            f"{where}: its parts do not make up its shape {shape}. The checkpoint is incomplete. Use another one."
        )


def _covers(shape: tuple[int, ...], parts: Sequence[Part], dim: int = 0) -> bool:
    """Whether the parts tile the shape as a grid, like sharded tensors; rows may be divided differently."""
    if not parts:
        return not math.prod(shape)
    if dim == len(shape):
        return len(parts) == 1
    rows: dict[tuple[int, int], list[Part]] = {}
    for part in parts:
        rows.setdefault((part.offsets[dim], part.sizes[dim]), []).append(part)
    end = 0
    for (start, size), row in sorted(rows.items(), key=lambda item: item[0]):
        if start != end or not _covers(shape, row, dim + 1):
            return False
        end += size
    return end == shape[dim]


def _check_places(folder: Path, parts: Sequence[Part]) -> None:
    """Check that no byte belongs to two parts.

    Raises:
        CheckpointError: one does.
    """
    # Otherwise a small file could describe tensors of any size, though sizes are compared with files before allocation.
    ranges = sorted((str(part.file), part.start, part.start + part.length) for part in parts)
    for (file, _, end), (other, start, _) in pairwise(ranges):
        if file == other and start < end:
            raise CheckpointError(
                f"{folder / METADATA}: assigns byte {start:,} of {file} to two tensors. Do not use this checkpoint."
            )


def _paths(given: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    for name, path in given.items():
        if not path or not all(type(key) in (str, int) for key in path):
            raise TypeError("the path of an entry has a key that is neither text nor a number")
        yield _text(name), tuple(path)


def _text(given: Any) -> str:
    if type(given) is not str or not given.isprintable():
        raise TypeError(f"a name is {shown(given) if type(given) is str else f'a {type(given).__name__}'}")
    return given


def _dtype(given: Any) -> str:
    if type(given) is not str or given not in DTYPE_BYTES:
        raise TypeError("the elements of a tensor are not numbers")
    return given


def _offsets(given: Any) -> tuple[int, ...] | None:
    return None if given is None else numbers(given)


def numbers(given: Any) -> tuple[int, ...]:
    """Check sizes, offsets or lengths of a checkpoint.

    Raises:
        ValueError: they are not whole numbers in a tuple or list.
    """
    if type(given) not in (tuple, list) or len(given) > MOST_DIMENSIONS:
        raise ValueError("sizes are not a tuple of numbers")
    if not all(type(number) is int and 0 <= number < LARGEST_NUMBER for number in given):
        raise ValueError("a size is not a number from 0 to 2**63")
    return tuple(given)
