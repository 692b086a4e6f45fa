"""Parts of a source, about a megabyte each: what one worker turns into tokens at a time.

A chunk travels to its worker as bytes; samples are made of it there. The borders of chunks depend on the data alone,
so the same data gives the same chunks on any number of workers.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, cast

from tundish.data.samples import MAX_LINE_BYTES, Problem, Rules, Sample
from tundish.errors import DataError

CHUNK_BYTES = 1 << 20
MAX_PASSED_BYTES = 1 << 30
"""A line that is longer still ends the reading: the file is none of lines."""
MAX_TEXT_BYTES = 1 << 28
"""A larger .txt file is refused: it is held in memory."""
Compression = Literal["", ".gz", ".zst"]
EMPTY = ""
"""The sample of a .txt file that has none."""


class Chunk(Protocol):
    """A part of a source."""

    @property
    def size(self) -> int:
        """How much of its source it is, in the unit of `Source.size`."""
        ...

    @property
    def units(self) -> int:
        """Lines, rows or files, blank ones too."""
        ...

    def samples(self, rules: Rules) -> Iterator[tuple[int, Sample | Problem]]:
        """Every sample, or what is wrong with it, with its number in the chunk, from 1."""
        ...


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
                    found = f"the line is longer than {MAX_PASSED_BYTES >> 20:,} MiB, so the file is no JSONL"
                    number = lines + 1 + block.count(b"\n")
                    raise DataError(f"line {number:,}: {found}. Write one sample a line.")
        lines += block.count(b"\n") + (not block.endswith(b"\n"))  # of a line that is cut, the end is not there
        left = None if left is None else left - size
        yield LineBlock(block, size)


def open_lines(path: Path, compression: Compression) -> BinaryIO:
    """A JSONL file as it was before it was compressed."""
    if not compression:
        return open(path, "rb")
    import pyarrow as pa

    # Unlike Python's own readers of these formats, it tells a stream that is cut off from one that has ended.
    stream = pa.input_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}[compression])
    return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream), CHUNK_BYTES))


@dataclass(frozen=True, slots=True)
class TextFiles:
    """Some .txt files of a folder."""

    root: Path
    names: Sequence[str]
    size: int
    """Bytes."""

    @property
    def units(self) -> int:
        """Files."""
        return len(self.names)

    def samples(self, rules: Rules) -> Iterator[tuple[int, Sample | Problem]]:
        """See Chunk; a file with nothing but whitespace gives EMPTY."""
        for number, name in enumerate(self.names, 1):
            yield number, _read_text(self.root / name)


def _read_text(path: Path) -> str | Problem:
    if path.stat().st_size > MAX_TEXT_BYTES:
        return Problem(
            "too large", f"larger than {MAX_TEXT_BYTES >> 20} MiB. Cut it into several files (split -C 200M)."
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"the byte at offset {error.start} is not UTF-8. Save the file as UTF-8."
        return Problem("not UTF-8", found)
    return EMPTY if text.isspace() else text


@dataclass(frozen=True, slots=True)
class TableRows:
    """Rows of a table, as an Arrow stream."""

    data: bytes
    units: int
    """Rows."""

    @property
    def size(self) -> int:
        """Rows."""
        return self.units

    def samples(self, rules: Rules) -> Iterator[tuple[int, Sample | Problem]]:
        """See Chunk."""
        import pyarrow as pa

        table = pa.ipc.open_stream(self.data).read_all()
        for number in range(table.num_rows):
            try:
                (row,) = table.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                found = f"the byte at offset {error.start} of a text is not UTF-8. Write the text anew."
                yield number + 1, Problem("not UTF-8", found)
            else:
                yield number + 1, rules.check(_without_nulls(row))

    @classmethod
    def of(cls, table: Any) -> "TableRows":
        """From an Arrow table or record batch."""
        import pyarrow as pa

        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write(table)
        return cls(sink.getvalue(), table.num_rows)


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose messages lack the fields that are null, as fields of a struct are where a message has none."""
    messages = row.get("messages")
    if not isinstance(messages, list):
        return row
    kept = [
        {
            name: value
            for name, value in cast(dict[str, Any], message).items()
            if value is not None or name in ("role", "content")
        }
        if isinstance(message, dict)
        else message
        for message in cast(list[Any], messages)
    ]
    return {**row, "messages": kept}
