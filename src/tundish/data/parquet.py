"""Parquet files of samples: one file, or all files of a folder, read row group by row group."""

import os
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

from tundish.base.text import printable
from tundish.base.workers import limited
from tundish.data.findings import Location
from tundish.data.rows import BATCH_BYTES, batch_rows, bounded, check_types, sample_columns
from tundish.data.samples import Rules
from tundish.data.source import Chunk, Source, file_digest, file_version, files_below, files_digest, groups
from tundish.errors import DataError, SpecError

SUFFIX = ".parquet"
BUFFER_BYTES = 1 << 20
"""Read from a column at a time. Without a buffer, Arrow holds whole columns of a row group: of one with 306 MiB, the
process took 390 MiB instead of 86."""


class RowGroup(NamedTuple):
    """A row group of a file."""

    file: str
    """Name below the source's path; empty where that is the file itself."""
    number: int
    first: int
    """Rows of the file that come before it."""
    rows: int
    size: int
    """Bytes, compressed."""


@dataclass(frozen=True, slots=True)
class ParquetRows:
    """The rows of a Parquet file or of the Parquet files of a folder, or some of their row groups."""

    path: Path
    name: str
    """For messages; the copy of an object has another name than the object."""
    rules: Rules
    files: tuple[str, ...]
    """Names below `path`, sorted; one empty name where that is the file itself."""
    groups: tuple[RowGroup, ...]

    @classmethod
    def open(cls, path: Path, given: str, rules: Rules) -> "ParquetRows":
        """The file, or all Parquet files below a folder.

        Raises:
            SpecError: with the problems of all files: one is not readable as Parquet, or lacks the columns.
            OSError: a folder cannot be read.
        """
        # Files that begin with '_' or '.' are what Spark, Databricks and Hadoop leave beside the data.
        files = ("",) if path.is_file() else files_below(path, SUFFIX, hidden=False)
        groups, problems = list[RowGroup](), list[str]()
        for file in files:
            name = given if not file else f"{given.rstrip('/')}/{printable(file)}"
            try:
                with limited(f"{name}: the reader of Parquet files", memory=BATCH_BYTES):
                    groups.extend(_row_groups(path / file, file, name, rules))
            except MemoryError:
                problems.append(
                    f"{name}: its metadata takes more than {BATCH_BYTES >> 20:,} MiB. Write the file again."
                )
            except SpecError as error:
                problems.extend(error.problems)
        if problems:
            shown = [*problems[:20], f"{given}: {len(problems):,} of {len(files):,} files have problems."]
            raise SpecError(problems if len(problems) <= 20 else shown)
        return cls(path, Path(given).name or path.name, rules, files, tuple(groups))

    @property
    def place(self) -> Location:
        """See Source."""
        is_whole_file = self.files == ("",) and not (self.groups and self.groups[0].first)
        return Location(self.name, "row", None if is_whole_file else self._name_of)

    def _name_of(self, number: int) -> str:
        starts = [0, *accumulate(group.rows for group in self.groups)]
        # A number after the last row is asked for, too, by a reader that does not know yet that it was the last.
        index = min(bisect(starts, number - 1), len(self.groups)) - 1
        group = self.groups[index]
        return f"{printable(group.file or self.name)}, row {group.first + number - starts[index]:,}"

    @property
    def size(self) -> int:
        """See Source; rows."""
        return sum(group.rows for group in self.groups)

    def digest(self) -> str:
        """See Source; that of one file does not depend on its name."""
        if self.files == ("",):
            return file_digest(self.path)
        return files_digest(self.path, self.files)

    def state(self) -> object:
        """See Source."""
        return [file_version(self.path / name) for name in self.files]

    def chunks(self) -> Iterator[Chunk]:
        """See Source."""
        import pyarrow as pa

        for file, same in groupby(self.groups, lambda group: group.file):
            part = replace(self, groups=tuple(same))
            try:
                yield from bounded(part.place, part._batches(file))
            except DataError:
                raise
            except (pa.ArrowException, OSError, ValueError) as error:
                name = printable(file or self.name)
                reason = printable(" ".join(str(error).split())[:300])
                raise DataError(
                    f"{name}: the file is damaged or cannot be read ({reason}). Copy it or write it again."
                ) from error

    def _batches(self, file: str) -> Iterator[Any]:
        import pyarrow.parquet as pq

        # Writers may have left checksums of their pages; a disk's error would otherwise be trained as text.
        settings: dict[str, Any] = {"buffer_size": BUFFER_BYTES, "page_checksum_verification": True}
        with pq.ParquetFile(self.path / file, **settings) as opened:
            columns = sample_columns(opened.schema_arrow.names, self.rules, file)
            numbers = [group.number for group in self.groups]
            size, rows = batch_rows(opened.metadata), 0
            for batch in opened.iter_batches(size, row_groups=numbers, columns=columns, use_threads=False):
                rows += batch.num_rows
                yield batch
        if rows != self.size:
            raise ValueError(f"it has {rows:,} rows where its metadata promises {self.size:,}")

    def parts(self, size: int) -> list[Source]:
        """See Source; whole row groups."""
        sized = ((group, group.size) for group in self.groups)
        return [replace(self, groups=tuple(group for group, _ in some)) for some in groups(sized, size)] or [self]


def _row_groups(path: Path, file: str, name: str, rules: Rules) -> Iterator[RowGroup]:
    """The row groups of a file, whose schema has been checked.

    Raises:
        SpecError: it is not readable as Parquet, or lacks the columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    _check_magic(path, name)
    try:
        with pq.ParquetFile(path) as opened:
            schema, metadata = opened.schema_arrow, opened.metadata
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = printable(" ".join(str(error).split())[:300])
        raise SpecError(f"{name}: its metadata cannot be read ({reason}). Copy it or write it again.") from error
    columns = sample_columns(schema.names, rules, name)
    check_types([schema.field(column) for column in columns], rules, name)
    first = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size = sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        yield RowGroup(file, number, first, group.num_rows, size)
        first += group.num_rows


def _check_magic(path: Path, name: str) -> None:
    """Refuse what is no Parquet file by its first and last bytes: Arrow's own errors do not say what to do."""
    with open(path, "rb") as opened:
        first, last = opened.read(4), b""
        if opened.seek(0, os.SEEK_END) >= 12:
            opened.seek(-4, os.SEEK_END)
            last = opened.read(4)
    if b"PARE" in (first, last):
        raise SpecError(f"{name}: is encrypted. Write it without encryption.")
    if first != b"PAR1":
        raise SpecError(
            f"{name}: is not a Parquet file, whatever its name. Write it as Parquet, or, if it holds JSON lines, name "
            "it .jsonl."
        )
    if last != b"PAR1":
        raise SpecError(f"{name}: ends too early to be a whole Parquet file. Copy it or write it again.")
