"""A JSONL file, plain or compressed."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal, cast

from tundish.data.findings import Location
from tundish.data.samples import MAX_LINE_BYTES, Problem, Rules, Sample
from tundish.data.source import CHUNK_BYTES, Chunk, Source, file_digest, file_version
from tundish.errors import DataError

Compression = Literal["", ".gz", ".zst"]
MAX_EXPANDED_BYTES = 1 << 30
MAX_RATIO = 200
"""Of compressed data that expands to more than MAX_EXPANDED_BYTES; text is compressed to a third, or to a twentieth."""
MAX_PASSED_BYTES = 1 << 30
"""A line that is even longer ends the reading: the file does not consist of lines."""


@dataclass(frozen=True, slots=True)
class Lines:
    """A JSONL file, or a range of one."""

    path: Path
    rules: Rules
    start: int = 0
    """Offset in bytes, at the beginning of a line."""
    end: int | None = None

    @property
    def place(self) -> Location:
        """See Source."""
        return Location(self.path.name, "line")

    @property
    def compression(self) -> Compression:
        """How the file is packed."""
        return self.path.suffix if self.path.suffix in (".gz", ".zst") else ""

    @property
    def size(self) -> int | None:
        """See Source; bytes."""
        return None if self.compression else (self.end or self.path.stat().st_size) - self.start

    def digest(self) -> str:
        """See Source."""
        return file_digest(self.path)

    def state(self) -> object:
        """See Source."""
        return file_version(self.path)

    def chunks(self) -> Iterator[Chunk]:
        """See Source."""
        limit = None if self.end is None else self.end - self.start
        expanded = 0
        try:
            with open_lines(self.path, self.compression) as file:
                if self.start:
                    file.seek(self.start)
                for number, block in enumerate(line_blocks(file, limit)):
                    bare = block.data.removeprefix(b"\xef\xbb\xbf") if number == self.start == 0 else block.data
                    yield replace(block, data=bare)
                    expanded += block.size
                    if self.compression and expanded > MAX_EXPANDED_BYTES:
                        self._check_ratio(expanded)
        except DataError as error:
            raise DataError(f"{self.path.name}, {error.message}") from error
        except (OSError, ValueError) as error:
            if not self.compression:
                raise
            reason = f"the compressed data is damaged or truncated ({error}). Compress or copy it again."
            raise DataError(f"{self.path.name}: {reason}") from error

    def _check_ratio(self, expanded: int) -> None:
        size = self.path.stat().st_size
        if expanded > MAX_RATIO * size:
            raise DataError(
                f"its {size:,} bytes expand to more than {MAX_RATIO} times as many, which text never does. If that is "
                "intended, use the file uncompressed."
            )

    def parts(self, size: int) -> list[Source]:
        """See Source; compressed data is one part."""
        if self.compression:
            return [self]
        borders, total = [0], self.path.stat().st_size
        with open(self.path, "rb") as file:
            while borders[-1] + size < total:
                file.seek(borders[-1] + size)
                while not file.readline(CHUNK_BYTES).endswith(b"\n") and file.tell() < total:
                    pass  # a line longer than this is read piece by piece
                borders.append(file.tell())
        starts = borders if borders[-1] < total or total == 0 else borders[:-1]
        ends = [*starts[1:], total]
        return [replace(self, start=start, end=end) for start, end in zip(starts, ends, strict=True)]


@dataclass(frozen=True, slots=True)
class LineBlock:
    """Whole lines of JSONL."""

    data: bytes
    size: int
    """Bytes that were read for it: all of `data`, and what was passed over of a line that is too long."""

    @property
    def units(self) -> int:
        """Lines."""
        return self.data.count(b"\n") + (not self.data.endswith(b"\n"))

    def samples(self, rules: Rules) -> Iterator[tuple[int, Sample | Problem]]:
        """See Chunk; blank lines hold no sample."""
        for number, line in enumerate(self.data.split(b"\n"), 1):
            if line and not line.isspace():
                yield number, rules.parse(line)


def line_blocks(file: BinaryIO, limit: int | None = None) -> Iterator[LineBlock]:
    """The next `limit` bytes of a file as blocks of whole lines; a line over the limit of a sample comes cut.

    Raises:
        DataError: a line does not end.
    """
    left, lines = limit, 0
    while left is None or left > 0:
        block = file.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left))
        if not block:
            return
        size = len(block)
        if not block.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)
            block, size = block + rest, size + len(rest)
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(CHUNK_BYTES)
                size += len(rest)
                if size > MAX_PASSED_BYTES:
                    reason = f"the line is longer than {MAX_PASSED_BYTES >> 20:,} MiB, so this is not a JSONL file"
                    number = lines + 1 + block.count(b"\n")
                    raise DataError(f"line {number:,}: {reason}. Write one sample per line.")
        lines += block.count(b"\n") + (not block.endswith(b"\n"))  # of a line that is cut, the end is not there
        left = None if left is None else left - size
        yield LineBlock(block, size)


def open_lines(path: Path, compression: Compression) -> BinaryIO:
    """A JSONL file as it was before it was compressed."""
    if not compression:
        return open(path, "rb")
    import pyarrow as pa

    # Unlike Python's own readers of these formats, it distinguishes a truncated stream from a complete one.
    stream = pa.input_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}[compression])
    return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream), CHUNK_BYTES))
