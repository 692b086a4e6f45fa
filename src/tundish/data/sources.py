"""Where samples come from: JSONL, folders of .txt files, Delta tables, Hugging Face datasets.

A source is read as chunks, in a fixed order. It can be cut into parts, which are sources themselves, so that several
machines read it. Opening a source finds out what it is and refuses what cannot be read; no sample is read by it.
"""

import difflib
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

from tundish.base.text import printable
from tundish.data.chunks import CHUNK_BYTES, Chunk, Compression, TextFiles, line_blocks, open_lines
from tundish.data.findings import Place
from tundish.data.samples import Rules
from tundish.errors import DataError, SpecError
from tundish.plan.address import LINE_SUFFIXES, MOST_FILES, Address, may_be_split
from tundish.plan.spec import TaskType

MAX_EXPANDED_BYTES = 1 << 30
MAX_RATIO = 200
"""Of compressed data that expands to more than MAX_EXPANDED_BYTES; text is compressed to a third, or to a twentieth."""
TEXT_TASK: TaskType = "CONTINUED_PRETRAIN"


class Source(Protocol):
    """Samples at a place."""

    @property
    def rules(self) -> Rules:
        """What its samples must be."""
        ...

    @property
    def place(self) -> Place:
        """How messages name its samples."""
        ...

    @property
    def size(self) -> int | None:
        """How much there is, in the unit of `Chunk.size`; None where that is known only after reading."""
        ...

    def digest(self) -> str:
        """SHA-256 over its content."""
        ...

    def state(self) -> object:
        """What is another one when somebody has written to it."""
        ...

    def chunks(self) -> Iterator[Chunk]:
        """All of it, in order."""
        ...

    def parts(self, size: int) -> "list[Source]":
        """Itself in parts of about `size` bytes, in order; at least one."""
        ...


@dataclass(frozen=True, slots=True)
class Lines:
    """A JSONL file, or a range of one."""

    path: Path
    rules: Rules
    start: int = 0
    """Offset in bytes, at the beginning of a line."""
    end: int | None = None

    @property
    def place(self) -> Place:
        """See Source."""
        return Place(self.path.name, "line")

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
        return _file_digest(self.path)

    def state(self) -> object:
        """See Source."""
        return _file_version(self.path)

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
            found = f"the compressed data is damaged or cut off ({error}). Compress or copy it again."
            raise DataError(f"{self.path.name}: {found}") from error

    def _check_ratio(self, expanded: int) -> None:
        size = self.path.stat().st_size
        if expanded > MAX_RATIO * size:
            raise DataError(
                f"its {size:,} bytes expand to more than {MAX_RATIO} times as many, which no text does. If it is meant "
                "so, give it uncompressed."
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
class TextFolder:
    """The .txt files of a folder, nested ones too, or some of them."""

    path: Path
    rules: Rules
    names: tuple[str, ...]
    """Below `path`, sorted."""

    @classmethod
    def of(cls, path: Path, rules: Rules) -> "TextFolder":
        """All .txt files below `path`.

        Raises:
            SpecError: there is what cannot be read as a file of the folder: a link out of it, a pipe.
            OSError: a folder cannot be read.
        """
        found, refused, root = list[str](), list[str](), path.resolve()
        for folder, folders, files in os.walk(path, onerror=_raise):
            texts = [name for name in files if name.endswith(".txt")]
            for name in (*texts, *(name for name in folders if Path(folder, name).is_symlink())):
                file = Path(folder, name)
                good = file.is_file() and file.resolve().is_relative_to(root)
                (found if good else refused).append(file.relative_to(path).as_posix())
        if refused:
            names = printable(", ".join(sorted(refused)[:20]))
            text = f"{len(refused)} links out of the folder, links to folders, or other things that are no files"
            raise SpecError(f"{path}: found {text} ({names}). Copy the files that are meant, remove the others.")
        return cls(path, rules, tuple(sorted(found)))

    @property
    def place(self) -> Place:
        """See Source."""
        return Place(self.path.name, "file", lambda number: printable(self.names[number - 1]))

    @property
    def size(self) -> int:
        """See Source; bytes."""
        return sum(size for _, size in self._sized())

    def _sized(self) -> Iterator[tuple[str, int]]:
        return ((name, (self.path / name).stat().st_size) for name in self.names)

    def digest(self) -> str:
        """See Source."""
        total = hashlib.sha256()
        for name in self.names:
            total.update(os.fsencode(name) + f"\0{_file_digest(self.path / name)}\n".encode())
        return total.hexdigest()

    def state(self) -> object:
        """See Source."""
        return [_file_version(self.path / name) for name in self.names]

    def chunks(self) -> Iterator[Chunk]:
        """See Source."""
        return (
            TextFiles(self.path, tuple(name for name, _ in files), sum(size for _, size in files))
            for files in groups(self._sized(), CHUNK_BYTES)
        )

    def parts(self, size: int) -> list[Source]:
        """See Source."""
        return [replace(self, names=tuple(name for name, _ in files)) for files in groups(self._sized(), size)]


def groups(files: Iterable[tuple[str, int]], size: int) -> Iterator[tuple[tuple[str, int], ...]]:
    """Files and their sizes in bytes, together in order until they reach `size`."""
    group, total = list[tuple[str, int]](), 0
    for name, bytes_of_file in files:
        group.append((name, bytes_of_file))
        total += bytes_of_file
        if total >= size:
            yield tuple(group)
            group, total = [], 0
    if group:
        yield tuple(group)


def _raise(error: OSError) -> None:
    raise error


def _file_version(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_source(given: Address | str, task_type: TaskType, *, system_message: bool) -> Source:
    """The source at an address, without reading samples.

    Args:
        given: the address, or its text as a spec has it.
        task_type: what its samples are for.
        system_message: whether a chat may begin with one.

    Raises:
        SpecError: there is nothing at the address, or nothing that the task type takes.
    """
    rules = Rules(task_type, system_message)
    address = given if isinstance(given, Address) else Address.of(given)
    if address.kind == "object":
        return _open_remote(address.text, rules)
    if task_type == TEXT_TASK:
        return _open_folder(address, rules)
    if address.kind == "hub":
        from tundish.data.huggingface import open_dataset

        return open_dataset(address, rules)
    if address.kind == "table":
        return _open_named_table(address, rules)
    return _open_path(address, rules)


def may_be_table(given: Address | str) -> bool:
    """Whether the data at an address may be a Delta table."""
    address = given if isinstance(given, Address) else Address.of(given)
    if address.kind == "path":
        try:
            return (address.path / "_delta_log").is_dir()
        except OSError:
            return False  # too long for a path, or not to be entered: told when it is opened
    return address.kind == "table" or (address.kind == "object" and not address.text.endswith(LINE_SUFFIXES))


_KINDS = (
    "a .jsonl file (.gz and .zst too), a Delta table (its folder, or catalog.schema.table), or a Hugging Face dataset "
    "with its split (org/dataset/split)"
)


def _open_path(address: Address, rules: Rules) -> Source:
    path = address.path
    if path.is_file():
        return _open_file(address, rules)
    if (path / "_delta_log").is_dir():
        return _open_table(str(path), address.given, rules)
    if not path.name.endswith(LINE_SUFFIXES) and may_be_split(path):
        from tundish.data.huggingface import open_dataset

        return open_dataset(address, rules)
    missing = f"there is no such file ({address.places})"
    found = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else missing
    near = _lines_in(path, address.given) if path.is_dir() else [] if path.exists() else _near(path)
    advice = f"Did you mean {' or '.join(near)}?" if near else "Check the path."
    raise SpecError(f"{address.given}: {found}; {rules.task_type} takes {_KINDS}. {advice}")


def _lines_in(folder: Path, given: str) -> list[str]:
    """JSONL files that may have been meant by their folder."""
    names = sorted(path.name for path in islice(folder.iterdir(), MOST_FILES) if path.name.endswith(LINE_SUFFIXES))
    return [f"{given.rstrip('/')}/{name}" for name in names[:3]]


def _near(path: Path) -> list[str]:
    """What stands there under a name like that of a path that is not there."""
    try:
        names = [found.name for found in islice(path.parent.iterdir(), MOST_FILES)]
    except OSError:
        return []
    stems = {name.partition(".")[0]: name for name in sorted(names, reverse=True)}
    return [stems[stem] for stem in difflib.get_close_matches(path.name.partition(".")[0], stems, n=3)]


def _open_named_table(address: Address, rules: Rules) -> Source:
    if not (address.path / "_delta_log").is_dir():
        beside = "".join(f", nor is there a file or folder {place}" for place in address.looked)
        raise SpecError(
            f"{address.given}: there is no Delta table of that name ({address.path}){beside}; {rules.task_type} takes "
            f"{_KINDS}. Check the name."
        )
    return _open_table(str(address.path), address.given, rules)


def _open_file(address: Address, rules: Rules) -> Source:
    path = address.path
    if not path.name.endswith(LINE_SUFFIXES):
        found = path.suffix or "nameless"
        raise SpecError(f"{address.given}: found a {found} file; {rules.task_type} takes {_KINDS}.")
    return Lines(path, rules)


def _open_folder(address: Address, rules: Rules) -> Source:
    # What looks like a name is a folder that is not there: text is read from folders only.
    path = Path(address.looked[0]) if address.kind in ("table", "hub") and address.looked else address.path
    if not path.is_dir():
        places = address.places if address.kind == "path" else path
        found = "is a file" if path.exists() else f"there is no such folder ({places})"
        raise SpecError(f"{address.given}: {found}; CONTINUED_PRETRAIN takes a folder of .txt files. Name the folder.")
    source = TextFolder.of(path, rules)
    if not source.names:
        raise SpecError(f"{address.given}: the folder holds no .txt file. Folders inside it are searched too.")
    return source


def _open_table(uri: str, given: str, rules: Rules) -> Source:
    from tundish.data.delta import DeltaRows

    return DeltaRows.open(uri, given, rules)


def _open_remote(given: str, rules: Rules) -> Source:
    from tundish.data.download import fetch_file, fetch_texts

    if rules.task_type == TEXT_TASK:
        return _open_folder(Address("path", str(fetch_texts(given)), given), rules)
    if given.endswith(LINE_SUFFIXES):
        return Lines(fetch_file(given), rules)
    return _open_table(given.rstrip("/"), given, rules)
