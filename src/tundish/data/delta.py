"""A snapshot of a Delta table, read row batch by row batch."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from tundish.base.objects.settings import delta_location
from tundish.base.text import printable
from tundish.base.workers import limited
from tundish.data.findings import Location
from tundish.data.rows import batch_rows, bounded, sample_columns
from tundish.data.samples import Rules
from tundish.data.source import Chunk, Source, groups
from tundish.errors import DataError, SpecError, StoreError

READABLE = {"deletionVectors", "timestampNtz", "v2Checkpoint", "vacuumProtocolCheck", "domainMetadata"}
"""Delta reader features that change nothing of what is read here, and deletion vectors, which are applied."""


@dataclass(frozen=True, slots=True)
class DeltaRows:
    """The rows of one version of a Delta table, or of some of its files; deleted ones are left out."""

    uri: str
    version: int
    name: str
    """As the caller gave it."""
    rules: Rules
    columns: tuple[str, ...]
    files: tuple[tuple[str, int], ...]
    """Names below `uri`, sorted, and their sizes in bytes."""
    size: int | None
    """Rows, before deletion vectors; None where the table does not count them."""
    snapshot: str
    """SHA-256 over the table's id and the files of the version, which never change."""

    @classmethod
    def open(cls, uri: str, given: str, rules: Rules) -> "DeltaRows":
        """The newest version of the table at a path or URI.

        Raises:
            SpecError: there is no table, it lacks the columns, or it uses a feature that cannot be read.
        """
        from deltalake.exceptions import DeltaError

        try:
            with limited(f"{given}: the reader of the table's log"):
                table = _delta_table(uri)
            _check_protocol(table, given)
            columns = sample_columns([field.name for field in table.schema().fields], rules, given)
            actions = table.get_add_actions()
            columns_of_files = (actions[name].to_pylist() for name in ("path", "size_bytes", "num_records"))
            files = sorted(zip(*columns_of_files, strict=True))
        except StoreError as error:
            raise SpecError(error.message) from error
        except (DeltaError, OSError) as error:
            reason = f"there is no Delta table to read at {uri} ({_reason(error)})"
            raise SpecError(f"{given}: {reason}. Check the name.") from error
        if partitioned := set(columns) & set(table.metadata().partition_columns):
            reason = f"the table is partitioned by {', '.join(sorted(partitioned))}, which is part of a sample"
            raise SpecError(f"{given}: {reason}. Copy the rows into a table without partitions.")
        named = tuple((_checked_name(uri, path, given), size) for path, size, _ in files)
        facts = json.dumps([str(table.metadata().id), [[path, size] for path, size, _ in files], table.version()])
        counts = [count for _, _, count in files]
        rows = None if None in counts else sum(counts)
        digest = hashlib.sha256(facts.encode()).hexdigest()
        return cls(uri, table.version(), given, rules, tuple(columns), named, rows, digest)

    @property
    def place(self) -> Location:
        """See Source."""
        return Location(f"{self.name} (version {self.version})", "row")

    def digest(self) -> str:
        """See Source."""
        return self.snapshot

    def state(self) -> object:
        """See Source; a version never changes."""
        return self.version

    def chunks(self) -> Iterator[Chunk]:
        """See Source."""
        try:
            yield from bounded(self.place, self._batches())
        except DataError:
            raise
        except (OSError, ValueError) as error:
            reason = f"a file of the table cannot be read ({' '.join(str(error).split())[:300]})"
            raise DataError(f"{self.name}: {printable(reason)}. Restore the table, or copy it again.") from error

    def _batches(self) -> Iterator[Any]:
        import pyarrow.parquet as pq

        table = _delta_table(self.uri, self.version)
        files = _filesystem(table)
        deleted = _deletions(table)
        if unknown := sorted(set(deleted) - {name for name, _ in _named(table)}):
            raise ValueError(f"rows are deleted from {unknown[0]}, which is not one of its files")
        for name, _ in self.files:
            with files.open_input_file(name) as file:
                kept, first = deleted.get(name), 0
                opened = pq.ParquetFile(file)
                for batch in opened.iter_batches(batch_rows(opened.metadata), columns=list(self.columns)):
                    yield batch if kept is None else batch.filter(_part(kept, first, batch.num_rows))
                    first += batch.num_rows

    def parts(self, size: int) -> list[Source]:
        """See Source; whole files."""
        return [replace(self, files=group) for group in groups(self.files, size)] or [self]


def has_table(uri: str) -> bool:
    """Whether there is a Delta table at a path or URI; also True where that cannot be asked, which `open` reports."""
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    try:
        location, options = delta_location(uri)
        return DeltaTable.is_deltatable(location, options or None)
    except (DeltaError, StoreError, OSError):
        return True


def _delta_table(uri: str, version: int | None = None) -> Any:
    from deltalake import DeltaTable

    location, options = delta_location(uri)
    return DeltaTable(location, version=version, storage_options=options or None)


def _reason(error: Exception) -> str:
    """The first and the last cause that an error names; a store's is an XML document in colors."""
    text = str(error).strip() or repr(error)
    causes = re.split(r"\s*\x1b\[31m↳\x1b\[0m\s*", text)
    code = re.search(r"<Code>(\w+)</Code>", causes[-1])
    last = causes[-1] if code is None else code[1]
    return printable(": ".join(dict.fromkeys(one.splitlines()[0][:200] for one in (causes[0], last))))


def _check_protocol(table: Any, given: str) -> None:
    unknown = sorted(set[str](table.protocol().reader_features or ()) - READABLE)
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        unknown = sorted({*unknown, "columnMapping"})
    if unknown:
        reason = f"the table uses {', '.join(unknown)}; only {', '.join(sorted(READABLE))} can be read"
        raise SpecError(f"{given}: {reason}. Copy the rows into a plain table: CREATE TABLE … AS SELECT.")


def _named(table: Any) -> list[tuple[str, int]]:
    actions = table.get_add_actions()
    sizes = actions["size_bytes"].to_pylist()
    return [(unquote(path), size) for path, size in zip(actions["path"].to_pylist(), sizes, strict=True)]


def _checked_name(uri: str, path: str, given: str) -> str:
    """A data file's name below the table; the log of a table can name any file of the machine, or a link to one."""
    name = unquote(path)
    outside = ":" in name.split("/")[0] or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
    if "://" not in uri and not outside:
        outside = not (Path(uri) / name).resolve().is_relative_to(Path(uri).resolve())
    if outside:
        raise SpecError(f"{given}: its log names {name!r}, outside the table. Copy the rows into a new table.")
    return name


def _filesystem(table: Any) -> Any:
    import pyarrow.fs as pa_fs
    from deltalake.fs import DeltaStorageHandler

    return pa_fs.PyFileSystem(DeltaStorageHandler.from_table(table._table))


def _part(kept: Any, first: int, count: int) -> Any:
    """`count` of the marks from `first` on; rows after the last mark are kept."""
    import pyarrow as pa

    marks = kept.slice(first, count).to_pylist()
    return pa.array(marks + [True] * (count - len(marks)))


def _deletions(table: Any) -> Mapping[str, Any]:
    """For each file with deleted rows, an Arrow array that says of each row whether it is kept."""
    import pyarrow as pa

    if "deletionVectors" not in (table.protocol().reader_features or ()):
        return {}
    kept_rows: dict[str, Any] = {}
    root = table.table_uri.rstrip("/") + "/"
    for batch in table.deletion_vectors():
        rows = pa.record_batch(batch)
        for path, kept in zip(rows["filepath"].to_pylist(), rows["selection_vector"], strict=True):
            plain = path.removeprefix("file://") if not root.startswith("file://") else path
            kept_rows[unquote(plain.removeprefix(root))] = kept.values
    return kept_rows
