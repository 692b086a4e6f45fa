"""A checkpoint's `.metadata`: which tensor lies where, read without building anything that it names.

PyTorch unpickles `.metadata` freely, so that whoever made it may run code. Here the names that DCP needs are the only
ones allowed, and each of them stands for a record that does nothing; what comes out is checked piece by piece, against
the files too, and copied into the classes below.
"""

import io
import math
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tundish.errors import CheckpointError, SpecError
from tundish.paths import inside

METADATA = ".metadata"
DTYPE_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"), 1),
}
"""Bytes of an element by PyTorch's name of its type."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where the archive of an object, or of a part of a tensor, lies."""

    offsets: tuple[int, ...]
    """Place in the whole tensor."""
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int
    """Bytes of the archive, its own headers included."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a checkpoint holds, by the names of its flattened state dict. Every part lies within its file."""

    tensors: Mapping[str, tuple[str, tuple[int, ...], tuple[Part, ...]]]
    """PyTorch's name of the element type, shape, and parts that cover the tensor without overlap."""
    objects: Mapping[str, Part]
    paths: Mapping[str, tuple[str | int, ...]]
    """The keys that lead to an entry in the state dict before it was flattened."""


def read_layout(folder: Path) -> Layout:
    """What the checkpoint in `folder` holds.

    Raises:
        CheckpointError: it is incomplete or damaged, names what no checkpoint needs, or leaves its folder.
    """
    root = _load(folder)
    try:
        return _layout(folder, root.state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / METADATA}: not a DCP checkpoint's metadata ({type(error).__name__}: {error}). "
            "Use another checkpoint."
        ) from error


class _Record:
    """Stands for any object of the metadata; keeps its arguments and its state, and does nothing."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        # Always there, so that unpickling sets no attribute of its own choice.
        self.state = state


_DCP = "torch.distributed.checkpoint"
_TENSOR_PROPERTIES = ("TensorProperties", "_MEM_FORMAT_ENCODING", "MEM_FORMAT_ENCODING")
_STAND_INS: Mapping[str, Mapping[str, Any]] = {
    f"{_DCP}.metadata": {
        **dict.fromkeys(("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", *_TENSOR_PROPERTIES), _Record),
        **dict.fromkeys(("ChunkStorageMetadata", "MetadataIndex", "StorageMeta"), _Record),
    },
    # Where PyTorch 2.2 and older have them.
    "torch.distributed._shard.sharded_tensor.metadata": dict.fromkeys(_TENSOR_PROPERTIES, _Record),
    f"{_DCP}.filesystem": {"_StorageInfo": _Record},
    "torch.serialization": {"_get_layout": _Record},
    "pathlib": {"PosixPath": _Record},
    "torch": {"Size": tuple, **{name: name for name in DTYPE_BYTES}},
    "collections": {"OrderedDict": dict},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _STAND_INS.get(module, {}).get(name)
        if found is None:
            raise CheckpointError(
                f"the metadata names {module}.{name}, which no checkpoint needs; it may hold code. "
                "It was not loaded. Do not use this checkpoint."
            )
        return found


def _load(folder: Path) -> Any:
    path = folder / METADATA
    if not path.is_file():
        raise CheckpointError(f"{folder}: there is no {METADATA}, so the checkpoint is not complete. Use another one.")
    try:
        return _Unpickler(io.BytesIO(path.read_bytes())).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}") from error
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error}). Use another checkpoint."
        ) from error


def _layout(folder: Path, state: Mapping[str, Any]) -> Layout:
    places = {
        (_text(index.state["fqn"]), _numbers(index.state.get("offset"))): info.state
        for index, info in state["storage_data"].items()
    }
    files = _Files(folder, places.values())
    tensors: dict[str, tuple[str, tuple[int, ...], tuple[Part, ...]]] = {}
    objects: dict[str, Part] = {}
    for name, entry in state["state_dict_metadata"].items():
        if not isinstance(entry.state, dict) or "chunks" not in entry.state:
            objects[_text(name)] = files.part(places[name, None])
            continue
        chunks = [(_sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"])) for chunk in entry.state["chunks"]]
        parts = tuple(
            files.part(places.get((name, offsets)) or places[name, None], offsets, sizes) for offsets, sizes in chunks
        )
        dtype, shape = entry.state["properties"].state[0], _sizes(entry.state["size"])
        _check_parts(folder, name, dtype, shape, parts)
        tensors[_text(name)] = dtype, shape, parts
    return Layout(tensors, objects, dict(_paths(state.get("planner_data") or {})))


class _Files:
    """The files of a checkpoint, looked at once each."""

    def __init__(self, folder: Path, infos: Iterable[Mapping[str, Any]]) -> None:
        self.folder = folder
        self.paths: dict[str, Path] = {}
        ends: dict[str, int] = {}
        for info in infos:
            name = _text(info["relative_path"])
            start, length = _sizes((info["offset"], info["length"]))
            ends[name] = max(ends.get(name, 0), start + length)
            if info.get("transform_descriptors"):
                raise CheckpointError(f"{folder / METADATA}: {name} is compressed; allowed are plain files.")
        for name, end in ends.items():
            self.paths[name] = self._checked(name, end)

    def _checked(self, name: str, end: int) -> Path:
        try:
            file = inside(self.folder, name)
        except SpecError as error:
            raise CheckpointError(f"{self.folder / METADATA}: {error.message}") from error
        size = file.stat().st_size if file.is_file() else -1
        if size != end:
            found = f"has {size:,} bytes" if size >= 0 else "is missing"
            what = "incomplete" if size < end else "damaged"
            raise CheckpointError(
                f"{file}: {found}, but its last entry ends at byte {end:,}. The checkpoint is {what}; use another one."
            )
        return file

    def part(self, info: Mapping[str, Any], offsets: tuple[int, ...] = (), sizes: tuple[int, ...] = ()) -> Part:
        return Part(offsets, sizes, self.paths[info["relative_path"]], info["offset"], info["length"])


def _check_parts(folder: Path, name: str, dtype: str, shape: tuple[int, ...], parts: tuple[Part, ...]) -> None:
    """Make sure that the parts cover the tensor, each element once, and that their files hold so many bytes.

    Raises:
        CheckpointError: they do not; nothing has been allocated.
    """
    where = f"{folder / METADATA}: {name}"
    if any(part.length < math.prod(part.sizes) * DTYPE_BYTES[dtype] for part in parts):
        raise CheckpointError(f"{where} is larger than the bytes that its file has for it. Do not use this checkpoint.")
    if not _covers(shape, parts):
        raise CheckpointError(
            f"{where}: its parts do not make up its shape {shape}. The checkpoint is incomplete; use another one."
        )


def _covers(shape: tuple[int, ...], parts: tuple[Part, ...]) -> bool:
    filled = sorted((part for part in parts if math.prod(part.sizes)), key=lambda part: part.offsets)
    if sum(math.prod(part.sizes) for part in filled) != math.prod(shape):
        return False
    for number, part in enumerate(filled):
        if len(part.offsets) != len(shape) or len(part.sizes) != len(shape):
            return False
        if any(start + size > whole for start, size, whole in zip(part.offsets, part.sizes, shape, strict=True)):
            return False
        # Shards along the first dimension end before the next one begins; only others are compared with all.
        if any(_overlap(part, other) for other in _until_behind(filled[number + 1 :], part)):
            return False
    return True


def _until_behind(following: list[Part], part: Part) -> Iterator[Part]:
    for other in following:
        if part.offsets and other.offsets[0] >= part.offsets[0] + part.sizes[0]:
            return
        yield other


def _overlap(one: Part, other: Part) -> bool:
    pairs = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + size_b and b < a + size_a for a, size_a, b, size_b in pairs)


def _paths(given: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    for name, path in given.items():
        if not all(type(key) in (str, int) for key in path):
            raise TypeError(f"{name} has a key that is neither text nor a number")
        yield _text(name), tuple(path)


def _text(given: Any) -> str:
    if type(given) is not str:
        raise TypeError(f"a name is a {type(given).__name__}")
    return given


def _numbers(given: Any) -> tuple[int, ...] | None:
    return None if given is None else _sizes(given)


def _sizes(given: Any) -> tuple[int, ...]:
    if not all(type(number) is int and number >= 0 for number in given):
        raise ValueError(f"{given!r} are no sizes")
    return tuple(given)
