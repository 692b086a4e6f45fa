"""Which kind of source is at an address: the one place that decides it.

Opening a source finds out what it is and refuses what cannot be read; it reads no sample.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path, PurePath

from tundish.base.objects.contract import is_uri
from tundish.data.lines import Lines
from tundish.data.parquet import SUFFIX as PARQUET
from tundish.data.parquet import ParquetRows
from tundish.data.samples import Rules
from tundish.data.source import Source, files_below
from tundish.data.texts import SUFFIX as TEXT
from tundish.data.texts import TextFolder
from tundish.errors import SpecError
from tundish.plan.address import FILE_SUFFIXES, LINE_SUFFIXES, MOST_FILES, Address, may_be_split
from tundish.plan.spec import TaskType

TEXT_TASK: TaskType = "CONTINUED_PRETRAIN"
KINDS = (
    "a .jsonl file (.gz and .zst too), a .parquet file or a folder of them, a Delta table (its folder, or "
    "catalog.schema.table), or a Hugging Face dataset with its split (org/dataset/split)"
)
"""What chats and pairs are read from, for messages."""


def open_source(given: Address | str, task_type: TaskType, *, system_message: bool) -> Source:
    """The source at an address, without reading samples.

    Args:
        given: the address, or its text as a spec has it.
        task_type: what its samples are for.
        system_message: whether a chat may begin with a system message.

    Raises:
        SpecError: there is nothing at the address, or nothing that the task type takes.
    """
    rules = Rules(task_type, system_message)
    address = given if isinstance(given, Address) else Address.of(given)
    if address.kind == "object":
        return _open_object(address.text, rules)
    if task_type == TEXT_TASK:
        return _open_texts(address, rules)
    if address.kind == "hub":
        from tundish.data.huggingface import open_dataset

        return open_dataset(address, rules)
    return _open_named_table(address, rules) if address.kind == "table" else _open_path(address, rules)


def may_be_table(given: Address | str) -> bool:
    """Whether Rust may read the data at an address: a Delta table, or what is in an object store."""
    address = given if isinstance(given, Address) else Address.of(given)
    if address.kind == "path":
        try:
            return (address.path / "_delta_log").is_dir()
        except OSError:
            return False  # a path that is too long or not permitted is reported when it is opened
    return address.kind in ("table", "object")


def _open_path(address: Address, rules: Rules) -> Source:
    path, given = address.path, address.given
    if path.is_file():
        return _open_file(address, rules)
    if (path / "_delta_log").is_dir():
        return _open_table(str(path), given, rules)
    # Before `datasets` is asked, which would take `data/train` for the split `train` of everything in `data`.
    if path.is_dir() and any(_is_part(child) for child in islice(path.iterdir(), MOST_FILES)):
        return _open_parquet_folder(address, rules)
    if not path.name.endswith(FILE_SUFFIXES) and may_be_split(path):
        from tundish.data.huggingface import open_dataset

        return open_dataset(address, rules)
    if path.is_dir():
        problem, near = "is a folder", _sample_files(path, given)
    elif path.exists():
        problem, near = "is not a regular file", []
    else:
        problem, near = f"there is no such file ({address.places})", _near(path)
    advice = f"Did you mean {' or '.join(near)}?" if near else "Check the path."
    raise SpecError(f"{given}: {problem}; {rules.task_type} takes {KINDS}. {advice}")


def _open_file(address: Address, rules: Rules) -> Source:
    path, given = address.path, address.given
    if path.name.endswith(LINE_SUFFIXES):
        return Lines(path, rules)
    if not path.name.endswith(PARQUET):
        kind = f"is a {path.suffix} file" if path.suffix else "has no suffix"
        raise SpecError(f"{given}: {kind}; {rules.task_type} takes {KINDS}.")
    _refuse_file_of_table(path, given)
    return ParquetRows.open(path, given, rules)


_SPLIT = re.compile(r"(?:^|/)(train|val|dev|test|eval)[a-z]*(?:[-_./]|$)", re.IGNORECASE)
"""In the name of a file or of a folder around it, as datasets of the hub have it: `train-00000-of-00002.parquet`."""


def _is_part(path: Path) -> bool:
    """Whether a file or folder is why the folder around it is one of Parquet files: `date=2026-11-25` has more."""
    return path.name[0] not in "._" and (path.name.endswith(PARQUET) or ("=" in path.name and path.is_dir()))


def _open_parquet_folder(address: Address, rules: Rules) -> Source:
    path, given = address.path, address.given
    _refuse_file_of_table(path, given)
    names = files_below(path, (PARQUET, *LINE_SUFFIXES), hidden=False)
    folders = {folder for name in names for folder in PurePath(name).parents}
    parts = _parts(given, names, [str(folder) for folder in folders if (path / folder / "_delta_log").is_dir()])
    if not parts:
        raise SpecError(f"{given}: the folder holds no .parquet file. Folders inside it are searched too.")
    return ParquetRows.open(path, given, rules)


def _parts(given: str, names: Iterable[str], tables: Iterable[str]) -> list[str]:
    """The Parquet files of a folder, or of a prefix, that is read as a whole.

    Args:
        given: the folder, for messages.
        names: of the files below it that are not hidden.
        tables: Delta tables below it.

    Raises:
        SpecError: something else is there, or what must not be read as one.
    """
    names, folder = list(names), given.rstrip("/")
    parts = sorted(name for name in names if name.endswith(PARQUET))
    if not parts:
        return []
    if table := min(tables, default=None):
        raise SpecError(
            f"{given}: holds the Delta table {folder}/{table}, whose log says which of its files count. Give the path "
            "of the table, or of one file."
        )
    if lines := sorted(name for name in names if name.endswith(LINE_SUFFIXES)):
        raise SpecError(
            f"{given}: holds .parquet files beside {lines[0]}{' and others' * (len(lines) > 1)}; a folder is read as "
            "one kind of data. Give the path of one file, or move the others to another folder."
        )
    splits = {match[1].lower(): name for name in parts if (match := _SPLIT.search(name))}
    if len(splits) > 1:
        advice = "" if is_uri(given) else f", or name a split behind the folder, as in {folder}/train"
        raise SpecError(
            f"{given}: holds several splits ({', '.join(sorted(splits.values()))}), which would be read as one. Give "
            f"the path of one file{advice}."
        )
    return parts


def _refuse_file_of_table(path: Path, given: str) -> None:
    """A Delta table keeps files whose rows were deleted or rewritten: only its log says what counts."""
    if table := next((folder for folder in path.parents if (folder / "_delta_log").is_dir()), None):
        raise SpecError(f"{given}: belongs to the Delta table {table}. Give the table's folder instead.")


def _sample_files(folder: Path, given: str) -> list[str]:
    """JSONL files that may have been meant by their folder."""
    names = sorted(path.name for path in islice(folder.iterdir(), MOST_FILES) if path.name.endswith(LINE_SUFFIXES))
    return [f"{given.rstrip('/')}/{name}" for name in names[:3]]


def _near(path: Path) -> list[str]:
    """Names that are like that of a path that does not exist."""
    try:
        names = [child.name for child in islice(path.parent.iterdir(), MOST_FILES)]
    except OSError:
        return []
    stems = {name.partition(".")[0]: name for name in sorted(names, reverse=True)}
    return [stems[stem] for stem in difflib.get_close_matches(path.name.partition(".")[0], stems, n=3)]


def _open_named_table(address: Address, rules: Rules) -> Source:
    if not (address.path / "_delta_log").is_dir():
        beside = "".join(f", nor is there a file or folder {place}" for place in address.looked)
        raise SpecError(
            f"{address.given}: there is no Delta table of that name ({address.path}){beside}; {rules.task_type} takes "
            f"{KINDS}. Check the name."
        )
    return _open_table(str(address.path), address.given, rules)


def _open_table(uri: str, given: str, rules: Rules) -> Source:
    from tundish.data.delta import DeltaRows

    return DeltaRows.open(uri, given, rules)


def _open_texts(address: Address, rules: Rules) -> Source:
    # What looks like a name is a folder that does not exist: text is read from folders only.
    path = Path(address.looked[0]) if address.kind in ("table", "hub") and address.looked else address.path
    if not path.is_dir():
        places = address.places if address.kind == "path" else path
        problem = "is a file" if path.exists() else f"there is no such folder ({places})"
        raise SpecError(
            f"{address.given}: {problem}; CONTINUED_PRETRAIN takes a folder of .txt files. Name the folder."
        )
    source = TextFolder.of(path, rules)
    if not source.names:
        raise SpecError(f"{address.given}: the folder holds no .txt file. Folders inside it are searched too.")
    return source


def _open_object(uri: str, rules: Rules) -> Source:
    from tundish.data.delta import has_table
    from tundish.data.download import fetch_file, fetch_folder, versions_below

    if rules.task_type == TEXT_TASK:
        return _open_texts(Address("path", str(fetch_folder(uri, TEXT)), uri), rules)
    if uri.endswith(LINE_SUFFIXES):
        return Lines(fetch_file(uri), rules)
    if uri.endswith(PARQUET):
        return ParquetRows.open(_fetch_parquet(uri), uri, rules)
    # The data files of a Delta table end with .parquet, too, but only its log says which of their rows count.
    if not has_table(uri.rstrip("/")) and (folder := _fetch_parts(uri, versions_below(uri))):
        return ParquetRows.open(folder, uri, rules)
    return _open_table(uri.rstrip("/"), uri, rules)


def _fetch_parquet(uri: str) -> Path:
    """A local copy of an object, or of the parts below a prefix of that name: Spark names folders like files."""
    from tundish.data.download import fetch_file, versions_below

    try:
        return fetch_file(uri)
    except SpecError as missing:
        try:
            versions = versions_below(uri)
        except SpecError:
            raise missing from None
        if folder := _fetch_parts(uri, versions):
            return folder
        raise


def _fetch_parts(uri: str, versions: Mapping[str, str | None]) -> Path | None:
    """A local copy of the Parquet files below a prefix; None if there are none."""
    from tundish.data.download import fetch_objects

    tables = [table.rstrip("/") for table, log, _ in (key.partition("_delta_log/") for key in versions) if log]
    visible = [key for key in versions if not any(part[:1] in "._" for part in key.split("/"))]
    parts = _parts(uri, visible, tables)
    return fetch_objects(uri, {key: versions[key] for key in parts}) if parts else None
