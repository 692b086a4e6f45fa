"""A folder of .txt files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tundish.base.text import printable
from tundish.data.findings import Location
from tundish.data.samples import Problem, Rules, Sample
from tundish.data.source import CHUNK_BYTES, EMPTY, Chunk, Source, file_version, files_below, files_digest, groups

SUFFIX = ".txt"
MAX_TEXT_BYTES = 1 << 28
"""A larger .txt file is refused: it is held in memory."""


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
        return cls(path, rules, files_below(path, SUFFIX, hidden=True))

    @property
    def place(self) -> Location:
        """See Source."""
        return Location(self.path.name, "file", lambda number: printable(self.names[number - 1]))

    @property
    def size(self) -> int:
        """See Source; bytes."""
        return sum(size for _, size in self._sized())

    def _sized(self) -> Iterator[tuple[str, int]]:
        return ((name, (self.path / name).stat().st_size) for name in self.names)

    def digest(self) -> str:
        """See Source."""
        return files_digest(self.path, self.names)

    def state(self) -> object:
        """See Source."""
        return [file_version(self.path / name) for name in self.names]

    def chunks(self) -> Iterator[Chunk]:
        """See Source."""
        return (
            TextFiles(self.path, tuple(name for name, _ in files), sum(size for _, size in files))
            for files in groups(self._sized(), CHUNK_BYTES)
        )

    def parts(self, size: int) -> list[Source]:
        """See Source."""
        return [replace(self, names=tuple(name for name, _ in files)) for files in groups(self._sized(), size)]


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
            "too large", f"larger than {MAX_TEXT_BYTES >> 20} MiB. Split it into several files (split -C 200M)."
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"the byte at offset {error.start} is not UTF-8. Save the file as UTF-8."
        return Problem("not UTF-8", reason)
    return EMPTY if text.isspace() else text
