"""Tables: a snapshot of a Delta table, and a split of a Hugging Face dataset, read row batch by row batch.

Only the columns of a sample are read; others are dropped, as the managed service did.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast
from urllib.parse import unquote

from tundish.data.chunks import Chunk, TableRows
from tundish.data.findings import Place, printable
from tundish.data.records import Rules
from tundish.data.sources import Source, groups
from tundish.errors import DataError, SpecError
from tundish.paths import resolve

BATCH_ROWS = 256
READABLE = {"deletionVectors", "timestampNtz", "v2Checkpoint", "vacuumProtocolCheck", "domainMetadata"}
"""Delta reader features that change nothing of what is read here, and deletion vectors, which are applied."""


def sample_columns(columns: Sequence[str], rules: Rules, given: str) -> list[str]:
    """The columns of a table that make a sample.

    Raises:
        SpecError: they are not there.
    """
    if rules.task_type == "CHAT_COMPLETION":
        needed, found = "messages", ["messages"]
    else:
        responses = [name for name in ("response", "completion") if name in columns]
        needed, found = "prompt and response (or completion, not both)", ["prompt", *responses]
        if len(responses) != 1:
            found = []
    if not found or not set(found) <= set(columns):
        text = f"found the columns {', '.join(columns) or 'none'}; {rules.task_type} needs {needed}."
        raise SpecError(f"{given}: {text} Rename the columns, or choose another task_type.")
    return found


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
            SpecError: there is no table, it lacks the columns, or it uses what cannot be read.
        """
        from deltalake.exceptions import DeltaError

        try:
            table = _delta_table(uri)
            _check_protocol(table, given)
            columns = sample_columns([field.name for field in table.schema().fields], rules, given)
            actions = table.get_add_actions()
            columns_of_files = (actions[name].to_pylist() for name in ("path", "size_bytes", "num_records"))
            files = sorted(zip(*columns_of_files, strict=True))
        except (DeltaError, OSError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise SpecError(f"{given}: there is no Delta table to read at {uri} ({reason}). Check the name.") from error
        if partitioned := set(columns) & set(table.metadata().partition_columns):
            found = f"the table is partitioned by {', '.join(sorted(partitioned))}, which is part of a sample"
            raise SpecError(f"{given}: {found}. Copy the rows into a table without partitions.")
        named = tuple((_checked_name(uri, path, given), size) for path, size, _ in files)
        facts = json.dumps([str(table.metadata().id), [[path, size] for path, size, _ in files], table.version()])
        counts = [count for _, _, count in files]
        rows = None if None in counts else sum(counts)
        digest = hashlib.sha256(facts.encode()).hexdigest()
        return cls(uri, table.version(), given, rules, tuple(columns), named, rows, digest)

    @property
    def place(self) -> Place:
        """See Source."""
        return Place(f"{self.name} (version {self.version})", "row")

    def digest(self) -> str:
        """See Source."""
        return self.snapshot

    def state(self) -> object:
        """See Source; a version never changes."""
        return self.version

    def chunks(self) -> Iterator[Chunk]:
        """See Source."""
        try:
            yield from self._rows()
        except (OSError, ValueError) as error:
            found = f"a file of the table cannot be read ({' '.join(str(error).split())[:300]})"
            raise DataError(f"{self.name}: {printable(found)}. Restore the table, or copy it again.") from error

    def _rows(self) -> Iterator[Chunk]:
        import pyarrow.parquet as pq

        table = _delta_table(self.uri, self.version)
        files = _filesystem(table)
        deleted = _deletions(table)
        if unknown := sorted(set(deleted) - {name for name, _ in _named(table)}):
            raise ValueError(f"rows are deleted from {unknown[0]}, which is none of its files")
        for name, _ in self.files:
            with files.open_input_file(name) as file:
                kept, first = deleted.get(name), 0
                for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=list(self.columns)):
                    wanted = batch if kept is None else batch.filter(_part(kept, first, batch.num_rows))
                    first += batch.num_rows
                    if wanted.num_rows:
                        yield TableRows.of(wanted)

    def parts(self, size: int) -> list[Source]:
        """See Source; whole files."""
        return [replace(self, files=group) for group in groups(self.files, size)] or [self]


def _delta_table(uri: str, version: int | None = None) -> Any:
    from deltalake import DeltaTable

    endpoint = os.environ.get("S3_ENDPOINT_URL")
    options = None
    if endpoint and uri.startswith("s3://"):
        options = {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": str(endpoint.startswith("http:")).lower()}
    return DeltaTable(uri, version=version, storage_options=options)


def _check_protocol(table: Any, given: str) -> None:
    unknown = sorted(set[str](table.protocol().reader_features or ()) - READABLE)
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        unknown = sorted({*unknown, "columnMapping"})
    if unknown:
        found = f"the table uses {', '.join(unknown)}; readable are {', '.join(sorted(READABLE))}"
        raise SpecError(f"{given}: {found}. Copy the rows into a plain table: CREATE TABLE … AS SELECT.")


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
        raise SpecError(f"{given}: its log names {name!r}, outside the table. Copy the rows into a table of its own.")
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
    found: dict[str, Any] = {}
    root = table.table_uri.rstrip("/") + "/"
    for batch in table.deletion_vectors():
        rows = pa.record_batch(batch)
        for path, kept in zip(rows["filepath"].to_pylist(), rows["selection_vector"], strict=True):
            plain = path.removeprefix("file://") if not root.startswith("file://") else path
            found[unquote(plain.removeprefix(root))] = kept.values
    return found


@dataclass(frozen=True, slots=True)
class DatasetRows:
    """One split of a Hugging Face dataset, from the hub, its local cache or a local folder."""

    name: str
    """As the caller gave it."""
    rules: Rules
    dataset: Any
    """A `datasets.Dataset` with only the columns of a sample."""

    @property
    def place(self) -> Place:
        """See Source."""
        return Place(self.name, "row")

    @property
    def size(self) -> int:
        """See Source; rows."""
        return len(self.dataset)

    def digest(self) -> str:
        """See Source."""
        total = hashlib.sha256()
        for chunk in self.chunks():
            total.update(cast(TableRows, chunk).data)
        return total.hexdigest()

    def state(self) -> object:
        """See Source; what is loaded never changes."""
        return self.name

    def chunks(self) -> Iterator[Chunk]:
        """See Source."""
        batches = self.dataset.with_format("arrow").iter(BATCH_ROWS)
        return (TableRows.of(batch.combine_chunks()) for batch in batches)

    def parts(self, size: int) -> list[Source]:
        """See Source; Spark reads Delta tables, JSONL and .txt files."""
        raise DataError(
            f"{self.name}: a Spark cluster prepares Delta tables, JSONL and .txt files. Leave data_prep_cluster_id "
            "out: this machine prepares a Hugging Face dataset."
        )


def open_dataset(given: str, rules: Rules) -> DatasetRows:
    """A Hugging Face dataset named `org/dataset/split`, `dataset/split` or `folder/split`.

    Raises:
        SpecError: there is no such dataset or split, it lacks the columns, or it would run code.
    """
    dataset = _load_dataset(given)
    columns = sample_columns(dataset.column_names, rules, given)
    return DatasetRows(given, rules, dataset.select_columns(columns))


def _load_dataset(given: str) -> Any:
    from datasets import disable_progress_bars, load_dataset, load_dataset_builder, load_from_disk
    from datasets.exceptions import DatasetsError

    path = Path(resolve(given))
    name, _, split = given.rpartition("/")
    local = path.parent.is_dir()
    saved = (path / "state.json").is_file()
    if not saved and (not name or not split or (not local and (given.count("/") > 2 or not _is_hub_name(name)))):
        found = "a subset is not supported; " if given.count("/") > 2 else ""
        raise SpecError(
            f"{given}: {found}allowed is a file, catalog.schema.table, or a Hugging Face dataset with its split: "
            "org/dataset/split or dataset/split."
        )
    disable_progress_bars()
    try:
        if saved:
            return load_from_disk(str(path))
        if local:
            _check_split(load_dataset_builder(str(path.parent), trust_remote_code=False), given, split)
        return load_dataset(str(path.parent) if local else name, split=split, trust_remote_code=False)
    except (DatasetsError, ValueError, OSError, KeyError) as error:
        raise SpecError(f"{given}: {_reason(error)}") from error


def _check_split(builder: Any, given: str, split: str) -> None:
    """Refuse a split that a folder does not have before its files are read."""
    splits = [str(name) for name in builder.config.data_files or ()]
    if splits and split not in splits:
        raise SpecError(f"{given}: there is no such split; there are {', '.join(splits)}. Check the path.")


def _is_hub_name(name: str) -> bool:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    # Names of readers, `pandas` among them, which unpickles what lies in the working directory.
    if name in _PACKAGED_DATASETS_MODULES:
        return False
    return not name.startswith((".", "/", "~")) and ":" not in name


def _reason(error: Exception) -> str:
    text = str(error).strip() or repr(error)
    if error.__cause__ is not None:
        text = f"{' '.join(text.split())} {error.__cause__}"
    if "onfig name is missing" in text:
        return "the dataset has subsets, which are not supported. Save the one that you want as JSONL."
    if "trust_remote_code" in text or "loading script" in text:
        return "the dataset runs code of its own, which is never done here. Save it as JSONL on a machine you trust."
    return f"cannot be loaded as a Hugging Face dataset ({text.splitlines()[0][:300]}). Check name, split and network."
