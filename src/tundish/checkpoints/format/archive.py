"""Reading `torch.save` archives by byte ranges: the form in which DCP stores each object and each part of a tensor.

An archive is a zip file without compression: a pickle that says which bytes make up the tensor, and the bytes. The
pickle is read as data (see contents.py). The bytes are compared with the archive's CRC-32, which PyTorch writes and
ignores. Whatever PyTorch's own reader gets has been checked here first, and both read the same: the directory is at the
end, each entry is there once, and none is compressed.
"""

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tundish.checkpoints.format.contents import Described, describe
from tundish.checkpoints.format.metadata import DTYPE_BYTES, Part
from tundish.checkpoints.format.pickles import reason, shown
from tundish.errors import CheckpointError

BLOCK_BYTES = 1 << 20
"""Read and checked at a time."""
LARGEST_PICKLE = 1 << 20
"""Bytes of the pickle of one tensor; PyTorch's take a few hundred."""
LARGEST_OBJECT = 256 << 20
"""Bytes of an entry that is not a tensor; Composer's take a few thousand."""
LARGEST_DIRECTORY = 16 << 20
"""Bytes; an entry takes about 100 of them."""
_LOCAL_HEADER = struct.Struct("<26xHH")
_END = struct.Struct("<4s8xLLH")
_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4s36xQQ")


@dataclass(frozen=True, slots=True)
class Bytes:
    """The bytes of one part of a tensor, in the order of its elements."""

    file: Path
    start: int
    length: int
    crc: int

    def blocks(self, buffer: bytearray | None = None) -> Iterator[memoryview]:
        """All of them, as many at a time as `buffer` holds; each block replaces the one before.

        Raises:
            CheckpointError: they are not what was written; raised after the last block.
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
            raise damaged(self.file, self.start, "its content is not what was written (CRC-32 differs)")


def find_bytes(part: Part, dtype: str) -> Bytes:
    """Where the bytes of a tensor's part lie; only the archive's directory and its pickle are read.

    Raises:
        CheckpointError: the archive is damaged, or does not hold the tensor that the metadata names.
    """
    with Archive(part) as archive:
        names = archive.names
        tensor = _described(part, archive.content(names.get("data.pkl"), LARGEST_PICKLE))
        if tensor.dtype != dtype or tensor.size != part.sizes or not tensor.is_contiguous:
            raise CheckpointError(
                f"{part.file}, byte {part.start:,}: holds {tensor.dtype} {tensor.size}; the metadata says "
                f"{dtype} {part.sizes}. Do not use this checkpoint."
            )
        if archive.content(names.get("byteorder"), 6, b"little") != b"little":
            raise damaged(part.file, part.start, "its numbers are big-endian; they must be little-endian")
        info = names.get(f"data/{tensor.key}")
        expected = math.prod(part.sizes) * DTYPE_BYTES[dtype]
        if info is None or info.file_size != expected:
            size = "none" if info is None else f"{info.file_size:,}"
            raise damaged(part.file, part.start, f"it must hold {expected:,} bytes of a tensor, and has {size}")
        return Bytes(part.file, archive.position(info), info.file_size, info.CRC)


def _described(part: Part, content: bytes) -> Described:
    try:
        return describe(content)
    except CheckpointError as error:
        raise damaged(part.file, part.start, f"not a readable tensor ({error.message})") from error


def damaged(file: Path, start: int, what: str) -> CheckpointError:
    """The error for bytes of a file that cannot be used."""
    return CheckpointError(f"{file}, byte {start:,}: {what}. The file is damaged or unsafe. Use another checkpoint.")


def _read(descriptor: int, target: memoryview, start: int, file: Path) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], start + done)
        if not count:
            raise damaged(file, start, "the file ends too early")
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

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes. Nothing is allocated beyond the end of the range, or beyond LARGEST_OBJECT."""
        rest = max(0, self.length - self.at)
        count = rest if size < 0 else min(size, rest)
        if count > LARGEST_OBJECT:
            raise ValueError(f"{count:,} bytes at once")
        return super().read(count) or b""

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.length - self.at)]
        count = os.preadv(self.file.fileno(), [view], self.start + self.at) if len(view) else 0
        self.at += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


class Archive:
    """The archive of a part; a context manager that holds its file open.

    Raises:
        CheckpointError: it is not an archive, or readers could disagree about what is in it.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        try:
            self.window = _Window(part)
        except OSError as error:
            raise damaged(part.file, part.start, f"cannot be read ({error.strerror})") from error
        try:
            _check_end(self.window)
            with zipfile.ZipFile(self.window) as archive:
                self.entries = archive.infolist()
            self.names = {entry.filename.partition("/")[2]: entry for entry in self.entries}
            self._check_entries()
        except CheckpointError:
            self.window.close()
            raise
        except Exception as error:
            self.window.close()
            raise damaged(part.file, part.start, f"not a readable tensor ({reason(error)})") from error

    def _check_entries(self) -> None:
        """Check that all readers see the same entries, and that no byte belongs to two of them."""
        # PyTorch's reader ignores the case of names.
        if len({name.lower() for name in self.names}) < len(self.entries):
            raise ValueError("two entries have the same name")
        end = 0
        for entry in sorted(self.entries, key=lambda entry: entry.header_offset):
            if entry.header_offset < end:
                raise ValueError("two entries overlap")
            end = self.position(entry) + entry.file_size - self.part.start

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self.window.close()

    def position(self, info: zipfile.ZipInfo) -> int:
        """Where an entry's bytes start in the file. They are uncompressed and end within the part."""
        header = bytearray(30)
        self.window.seek(info.header_offset)
        short = self.window.readinto(header) < len(header) or not header.startswith(b"PK\x03\x04")
        start = info.header_offset + 30 + sum(_LOCAL_HEADER.unpack(header))
        plain = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
        if short or not plain or start + info.file_size > self.part.length:
            raise damaged(self.part.file, self.part.start, f"{shown(info.filename)} is compressed or cut off")
        return self.part.start + start

    def content(self, info: zipfile.ZipInfo | None, limit: int, default: bytes = b"") -> bytes:
        """The bytes of a small entry, or `default` where there is no such entry."""
        if info is None:
            return default
        if info.file_size > limit:
            raise damaged(self.part.file, self.part.start, f"{shown(info.filename)} has {info.file_size:,} bytes")
        content = Bytes(self.part.file, self.position(info), info.file_size, info.CRC)
        return b"".join(bytes(block) for block in content.blocks())

    def verify(self) -> None:
        """Compare the bytes of every entry with its CRC-32."""
        for info in self.entries:
            for _ in Bytes(self.part.file, self.position(info), info.file_size, info.CRC).blocks():
                pass


def _check_end(window: _Window) -> None:
    """Check that the directory is where every reader looks for it, as PyTorch writes it."""
    # Python's reader expects the directory right before the end record, PyTorch's where that record points. An archive
    # with two directories would be checked by one and loaded from the other.
    window.seek(0)
    if window.read(4) != b"PK\x03\x04":
        raise ValueError("it does not start like a file of torch.save")
    window.seek(-98, os.SEEK_END)
    tail = window.read(98).rjust(98, b"\0")
    mark, size, offset, comment = _END.unpack(tail[-22:])
    end = window.length - 22
    locator, _, record, _ = _LOCATOR.unpack(tail[-42:-22])
    if locator == b"PK\x06\x07":
        end = window.length - 98
        mark_64, size, offset = _END_64.unpack(tail[:56])
        if record != end or mark_64 != b"PK\x06\x06":
            raise ValueError("its end record is not where its locator points")
    if mark != b"PK\x05\x06" or comment or offset + size != end or size > LARGEST_DIRECTORY:
        raise ValueError("its directory is not at its end")
    window.seek(0)
