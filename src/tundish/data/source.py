"""What every kind of data source is: samples in chunks, in a fixed order, of which it can give a part.

A source is cut into chunks of about a megabyte, each of which one worker turns into tokens. A chunk travels to its
worker as bytes; samples are made of it there. The borders of chunks depend on the data alone, so the same data gives
the same chunks on any number of workers. A source can be cut into parts, too, which are sources themselves, so that
several machines read it.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Protocol, TypeVar

from tundish.base.text import printable
from tundish.data.findings import Location
from tundish.data.samples import Problem, Rules, Sample
from tundish.errors import SpecError

Item = TypeVar("Item")
CHUNK_BYTES = 1 << 20
NO_SAMPLE = "{}: holds no sample: it is empty or blank. Use data with samples."
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


class Source(Protocol):
    """Samples at a place."""

    @property
    def rules(self) -> Rules:
        """What its samples must be."""
        ...

    @property
    def place(self) -> Location:
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
        """Equal as long as the data is not written to."""
        ...

    def chunks(self) -> Iterator[Chunk]:
        """All of it, in order."""
        ...

    def parts(self, size: int) -> "list[Source]":
        """Itself in parts of about `size` bytes, in order; at least one."""
        ...


def numbered(chunks: Iterable[Chunk]) -> Iterator[tuple[int, Chunk]]:
    """Chunks of a source, each with how many lines, rows or files come before it."""
    before = 0
    for chunk in chunks:
        yield before, chunk
        before += chunk.units


def first_samples(source: Source) -> Iterator[Sample]:
    """The good samples at the beginning of a source."""
    chunks = islice(source.chunks(), 1)
    samples = chain.from_iterable(chunk.samples(source.rules) for chunk in chunks)
    return (sample for _, sample in samples if sample and not isinstance(sample, Problem))


def files_below(folder: Path, suffix: str | tuple[str, ...], *, hidden: bool) -> tuple[str, ...]:
    """Names of all files with a suffix below a folder, nested ones too, sorted.

    Args:
        folder: that exists.
        suffix: of the names, or several.
        hidden: whether files and folders that begin with `.` or `_` count.

    Raises:
        SpecError: there is what cannot be read as a file of the folder: a link out of it, a pipe.
        OSError: a folder cannot be read.
    """
    names, refused, root = list[str](), list[str](), folder.resolve()
    for parent, folders, files in os.walk(folder, onerror=_raise):
        if not hidden:
            folders[:], files = ([name for name in some if name[0] not in "._"] for some in (folders, files))
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in (*(name for name in files if name.endswith(suffix)), *links):
            file = Path(parent, name)
            good = file.is_file() and file.resolve().is_relative_to(root)
            (names if good else refused).append(file.relative_to(folder).as_posix())
    if refused:
        shown = printable(", ".join(sorted(refused)[:20]))
        text = f"{len(refused)} links out of the folder, links to folders, or other things that are not files"
        raise SpecError(f"{folder}: holds {text} ({shown}). Copy the files that you want, and remove the others.")
    return tuple(sorted(names))


def _raise(error: OSError) -> None:
    raise error


def groups(items: Iterable[tuple[Item, int]], size: int) -> Iterator[tuple[tuple[Item, int], ...]]:
    """Items and their sizes in bytes, together in order until they reach `size`."""
    group, total = list[tuple[Item, int]](), 0
    for item, bytes_of_item in items:
        group.append((item, bytes_of_item))
        total += bytes_of_item
        if total >= size:
            yield tuple(group)
            group, total = [], 0
    if group:
        yield tuple(group)


def file_version(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written or replaced."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def files_digest(folder: Path, names: Iterable[str]) -> str:
    """SHA-256 over the names and contents of files in a folder."""
    total = hashlib.sha256()
    for name in names:
        total.update(os.fsencode(name) + f"\0{file_digest(folder / name)}\n".encode())
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 over a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
