"""What every kind of data source is: samples in chunks, in a fixed order, of which it can give a part.

A source is cut into chunks of about a megabyte, each of which one worker turns into tokens. A chunk travels to its
worker as bytes; samples are made of it there. The borders of chunks depend on the data alone, so the same data gives
the same chunks on any number of workers. A source can be cut into parts, too, which are sources themselves, so that
several machines read it.
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

from tundish.data.findings import Location
from tundish.data.samples import Problem, Rules, Sample

CHUNK_BYTES = 1 << 20
NO_SAMPLE = "{}: there is no sample in it; all is empty. Give data with samples."
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
        """What is another one when somebody has written to it."""
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


def file_version(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written or replaced."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def file_digest(path: Path) -> str:
    """SHA-256 over a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
