"""Checkpoints: names, order, completeness, and reading that runs no code.

A checkpoint is PyTorch's distributed format (DCP): `.metadata` (a pickle that says which tensor lies where) and
`__<rank>_<i>.distcp` files, each a row of `torch.save` archives. PyTorch unpickles `.metadata` freely; here only the
classes that DCP needs may be named in it, every entry is read with `weights_only`, and no name leaves the folder.
"""

import io
import math
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tundish.errors import CheckpointError, SpecError
from tundish.paths import inside

if TYPE_CHECKING:
    import torch

METADATA = ".metadata"
MODEL_PREFIX = "state.model."
"""Composer's name of the model inside its state dict; all that a weights-only load asks for."""
NAME = re.compile(r"ep(\d+)-ba(\d+)")

_ALLOWED_GLOBALS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "pathlib": {"PosixPath"},
    "collections": {"OrderedDict"},
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED_GLOBALS.get(module, ()):
            raise CheckpointError(
                f"the metadata names {module}.{name}, which no checkpoint needs; it may hold code. "
                "It was not loaded. Do not use this checkpoint."
            )
        return super().find_class(module, name)


class _Stub:
    """Stands for any object of the metadata; keeps its state and nothing else."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _StubUnpickler(_RestrictedUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = module.startswith("torch") and name in _ALLOWED_GLOBALS.get(module, ())
        return _Stub if allowed else super().find_class(module, name)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor, and where its bytes lie."""

    offsets: tuple[int, ...]
    """Place in the whole tensor."""
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int
    """Bytes of the archive, header included."""

    def read(self) -> "torch.Tensor":
        """The part, with its own dtype, on the CPU."""
        import torch

        with open(self.file, "rb") as file:
            file.seek(self.start)
            archive = io.BytesIO(file.read(self.length))
        try:
            tensor = torch.load(archive, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{self.file}, byte {self.start:,}: not a readable tensor ({type(error).__name__}). "
                "The file is damaged or unsafe; use another checkpoint."
            ) from error
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != self.sizes:
            found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise CheckpointError(f"{self.file}, byte {self.start:,}: found {found}, its metadata says {self.sizes}.")
        return tensor


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint, in one or more chunks."""

    name: str
    shape: tuple[int, ...]
    dtype: "torch.dtype"
    chunks: tuple[Chunk, ...]

    def read(self, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """The whole tensor on the CPU, as `dtype` or its own."""
        import torch

        whole = torch.empty(self.shape, dtype=dtype or self.dtype)
        for chunk in self.chunks:
            place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[place] = chunk.read()
        return whole


def list_checkpoints(save_folder: Path) -> list[Path]:
    """The complete `ep#-ba#` folders, oldest first."""
    if not save_folder.is_dir():
        return []
    found = [(match, path) for path in save_folder.iterdir() if (match := NAME.fullmatch(path.name))]
    ordered = sorted(found, key=lambda item: (int(item[0][2]), int(item[0][1])))
    return [path for _, path in ordered if _is_complete(path)]


def _is_complete(folder: Path) -> bool:
    """Whether every file that the metadata names is there and long enough; without torch."""
    try:
        metadata = _read_metadata(folder, _StubUnpickler)
        return all(
            (folder / info.relative_path).stat().st_size >= info.offset + info.length
            for info in metadata.storage_data.values()
        )
    except (CheckpointError, OSError, AttributeError, TypeError):
        return False


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its name in the state dict; nothing is loaded but the metadata.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or unsafe.
    """
    metadata = _read_metadata(folder)
    try:
        return {tensor.name: tensor for tensor in _stored(folder, metadata)}
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / METADATA}: not a DCP checkpoint's metadata ({error}).") from error


def check_complete(folder: Path) -> None:
    """Look at a checkpoint without torch.

    Raises:
        CheckpointError: it is incomplete, or its metadata names what no checkpoint needs.
    """
    _read_metadata(folder, _StubUnpickler)
    if not _is_complete(folder):
        raise CheckpointError(f"{folder}: a file that its metadata names is missing or too short. Use another one.")


def _read_metadata(folder: Path, unpickler: type[pickle.Unpickler] = _RestrictedUnpickler) -> Any:
    path = folder / METADATA
    if not path.is_file():
        raise CheckpointError(f"{folder}: there is no {METADATA}, so the checkpoint is not complete. Use another one.")
    try:
        return unpickler(io.BytesIO(path.read_bytes())).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}") from error
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error}). Use another checkpoint."
        ) from error


def _stored(folder: Path, metadata: Any) -> Iterator[StoredTensor]:
    places: dict[tuple[str, tuple[int, ...] | None], Any] = {}
    for index, info in metadata.storage_data.items():
        places[index.fqn, None if index.offset is None else tuple(index.offset)] = info
    for name, entry in metadata.state_dict_metadata.items():
        if not hasattr(entry, "chunks"):
            if name.startswith(MODEL_PREFIX):
                raise CheckpointError(
                    f"{folder / METADATA}: {name} is no tensor; loading it could run code. Do not use this checkpoint."
                )
            continue
        chunks: list[Chunk] = []
        for part in entry.chunks:
            offsets, sizes = tuple(part.offsets), tuple(part.sizes)
            info = places.get((name, offsets)) or places[name, None]
            chunks.append(_chunk(folder, name, offsets, sizes, info))
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(entry.size):
            raise CheckpointError(
                f"{folder / METADATA}: the parts of {name} do not make up its shape {tuple(entry.size)}. "
                "The checkpoint is incomplete; use another one."
            )
        yield StoredTensor(name, tuple(entry.size), entry.properties.dtype, tuple(chunks))


def _chunk(folder: Path, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], info: Any) -> Chunk:
    try:
        file = inside(folder, str(info.relative_path))
    except SpecError as error:
        raise CheckpointError(f"{folder / METADATA}: {error.message}") from error
    size = file.stat().st_size if file.is_file() else -1
    if not 0 <= info.offset <= info.offset + info.length <= size:
        found = f"has {size:,} bytes" if size >= 0 else "is missing"
        raise CheckpointError(
            f"{file}: {found}, but {name} should end at byte {info.offset + info.length:,}. "
            "The checkpoint is incomplete; use another one."
        )
    return Chunk(offsets, sizes, file, info.offset, info.length)
