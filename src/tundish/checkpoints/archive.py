"""Reading `torch.save` archives by byte ranges: what DCP keeps of each object and each part of a tensor.

An archive is a zip file without compression: a pickle that says which bytes make up the tensor, and the bytes. The
pickle is read with stand-ins that only note what they are told; the bytes are compared with the archive's CRC-32,
which PyTorch writes and does not look at.
"""

import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from tundish.checkpoints.metadata import DTYPE_BYTES, Part
from tundish.errors import CheckpointError

if TYPE_CHECKING:
    pass

BLOCK_BYTES = 1 << 20
"""Read, checked and handed on at a time."""
LARGEST_PICKLE = 1 << 20
"""Bytes of the pickle of one tensor; PyTorch's take some hundred."""
_LOCAL_HEADER = struct.Struct("<26xHH")
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
}


@dataclass(frozen=True, slots=True)
class Bytes:
    """The bytes of one part of a tensor, in the order of its elements."""

    file: Path
    start: int
    length: int
    crc: int

    def blocks(self, buffer: bytearray | None = None) -> Iterator[memoryview]:
        """All of them, as many at a time as `buffer` takes, each in the place of the one before.

        Raises:
            CheckpointError: they are not those that were written; told after the last block.
        """
        crc, place = 0, memoryview(bytearray(min(BLOCK_BYTES, self.length)) if buffer is None else buffer)
        with open(self.file, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), self.start, self.length, os.POSIX_FADV_WILLNEED)
            for start in range(0, self.length, max(1, len(place))):
                block = place[: self.length - start]
                _read(file.fileno(), block, self.start + start, self.file)
                crc = zlib.crc32(block, crc)
                yield block
        if crc != self.crc:
            raise _damaged(self.file, self.start, "its bytes are not those that were written (CRC-32)")


def find_bytes(part: Part, dtype: str) -> Bytes:
    """Where the bytes of a tensor's part lie; only the archive's directory and its pickle are read.

    Raises:
        CheckpointError: the archive is damaged, holds what is no tensor, or another one than the metadata says.
    """
    with _opened(part) as archive:
        names = {name.partition("/")[2]: info for name, info in archive.infos.items()}
        found = _described(part, archive.content(names.get("data.pkl"), LARGEST_PICKLE))
        if found.dtype != dtype or found.size != part.sizes or not found.is_contiguous:
            raise CheckpointError(
                f"{part.file}, byte {part.start:,}: found {found.dtype} {found.size}, its metadata says "
                f"{dtype} {part.sizes}. Do not use this checkpoint."
            )
        if archive.content(names.get("byteorder"), 6, b"little") != b"little":
            raise _damaged(part.file, part.start, "its numbers are big-endian; allowed is little")
        info = names.get(f"data/{found.key}")
        wanted = math.prod(part.sizes) * DTYPE_BYTES[dtype]
        if info is None or info.file_size != wanted:
            size = "none" if info is None else f"{info.file_size:,}"
            raise _damaged(part.file, part.start, f"it should hold {wanted:,} bytes of a tensor and has {size}")
        return Bytes(part.file, archive.position(info), info.file_size, info.CRC)


def read_object(part: Part) -> Any:
    """An object that is no tensor; classes that Composer's state does not need are refused.

    Raises:
        CheckpointError: it is damaged or unsafe.
    """
    import torch

    with _opened(part) as archive:
        for info in archive.infos.values():
            archive.content(info, part.length)
        archive.window.seek(0)
        with torch.serialization.safe_globals(_harmless()):
            return _refusing(
                part, lambda: torch.load(cast(BinaryIO, archive.window), map_location="cpu", weights_only=True)
            )


def load_file(path: Path) -> Any:
    """The content of a `.pt` file, its tensors left on the disk until they are used.

    Raises:
        CheckpointError: it is damaged or unsafe.
    """
    import torch

    part = Part((), (), path, 0, path.stat().st_size)
    with _opened(part) as archive:
        # Tensors stay on the disk: a size that is not there would be found by a crash.
        for info in archive.infos.values():
            archive.position(info)
    with torch.serialization.safe_globals(_harmless()):
        return _refusing(part, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def _harmless() -> list[Any]:
    """What Composer's timestamps, versions and NumPy's random state need beyond what `weights_only` lets in."""
    import datetime

    import numpy as np
    from torch.torch_version import TorchVersion

    rebuild = np.empty(0).__reduce__()[0]  # its module's name depends on NumPy's version
    return [
        datetime.timedelta,
        TorchVersion,
        np.ndarray,
        np.dtype,
        np.dtypes.UInt32DType,
        (rebuild, "numpy.core.multiarray._reconstruct"),
        (rebuild, "numpy._core.multiarray._reconstruct"),
    ]


def _refusing(part: Part, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{part.file}, byte {part.start:,}: cannot be loaded without running code from it ({reason}). "
            "It is damaged or unsafe; use another checkpoint."
        ) from error


def _damaged(file: Path, start: int, what: str) -> CheckpointError:
    return CheckpointError(f"{file}, byte {start:,}: {what}. The file is damaged or unsafe; use another checkpoint.")


def _read(descriptor: int, target: memoryview, start: int, file: Path) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], start + done)
        if not count:
            raise _damaged(file, start, "it ends too early")
        done += count


class _Window(io.RawIOBase):
    """A range of a file as a file."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.file = open(part.file, "rb", buffering=0)
        self.start, self.length, self.at = part.start, part.length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.length - self.at)]
        count = os.preadv(self.file.fileno(), [view], self.start + self.at) if len(view) else 0
        self.at += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


class _opened:
    """The archive of a part: a context manager around its directory."""

    def __init__(self, part: Part) -> None:
        self.part, self.window = part, _Window(part)
        try:
            with zipfile.ZipFile(self.window) as archive:
                self.infos = {info.filename: info for info in archive.infolist()}
        except Exception as error:
            self.window.close()
            raise _damaged(part.file, part.start, f"not a readable tensor ({error})") from error

    def __enter__(self) -> "_opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.window.close()

    def position(self, info: zipfile.ZipInfo) -> int:
        """Where an entry's bytes begin in the file; they are all there, and as large as they say."""
        header = bytearray(30)
        self.window.seek(info.header_offset)
        short = self.window.readinto(header) < len(header) or header[:4] != b"PK\x03\x04"
        start = info.header_offset + 30 + sum(_LOCAL_HEADER.unpack(header))
        plain = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
        if short or not plain or start + info.file_size > self.part.length:
            raise _damaged(self.part.file, self.part.start, f"{info.filename} is compressed or cut off")
        return self.part.start + start

    def content(self, info: zipfile.ZipInfo | None, limit: int, default: bytes = b"") -> bytes:
        """The bytes of a small entry, or `default` where there is no such entry."""
        if info is None:
            return default
        if info.file_size > limit:
            raise _damaged(self.part.file, self.part.start, f"{info.filename} has {info.file_size:,} bytes")
        found = Bytes(self.part.file, self.position(info), info.file_size, info.CRC)
        return b"".join(bytes(block) for block in found.blocks())


@dataclass(frozen=True, slots=True)
class _Described:
    """What the pickle of a tensor says of it."""

    dtype: str
    key: str
    numel: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.size), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return not self.numel or (self.offset == 0 and self.numel == math.prod(self.size))


class _Note:
    """Stands for the function that would build a tensor; keeps its arguments."""

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __setstate__(self, state: Any) -> None:
        pass


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Note
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise CheckpointError(f"it names {module}.{name}, which no tensor needs; it may hold code and was not loaded")

    def persistent_load(self, pid: Any) -> tuple[str, str, int]:
        kind, dtype, key, _location, numel = pid
        if kind != "storage" or type(dtype) is not str or type(key) is not str or type(numel) is not int:
            raise CheckpointError("it names a storage in another way than PyTorch does")
        return dtype, key, numel


def _described(part: Part, content: bytes) -> _Described:
    try:
        (dtype, key, numel), offset, size, stride, *_ = _TensorUnpickler(io.BytesIO(content)).load().given
        return _Described(dtype, key, numel, int(offset), tuple(map(int, size)), tuple(map(int, stride)))
    except CheckpointError as error:
        raise _damaged(part.file, part.start, f"not a readable tensor ({error.message})") from error
    except Exception as error:
        raise _damaged(part.file, part.start, f"not a readable tensor ({type(error).__name__}: {error})") from error
