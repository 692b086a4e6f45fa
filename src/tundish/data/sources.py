"""Where samples come from: a JSONL file, or a folder of .txt files."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tundish.data.records import ProblemList, Sample, check_lines, parse_sample
from tundish.errors import DataError, SpecError
from tundish.paths import REMOTE_SCHEMES, resolve
from tundish.spec import TaskType


@dataclass(frozen=True, slots=True)
class Source:
    """Samples at a place."""

    path: Path
    task_type: TaskType
    system_message: bool
    """Whether the model's chat template takes a system message."""

    @property
    def files(self) -> list[Path]:
        """The files that hold samples, in a fixed order."""
        if self.task_type != "CONTINUED_PRETRAIN":
            return [self.path]
        # A link out of the folder would read what the caller did not name.
        root = self.path.resolve()
        found = (path for path in self.path.rglob("*.txt") if path.is_file() and path.resolve().is_relative_to(root))
        return sorted(found, key=lambda path: path.relative_to(self.path).as_posix())

    def samples(self) -> Iterator[tuple[int, Sample]]:
        """Every sample with its number: the line, or the place of its file in `files`, from 1.

        Raises:
            DataError: after the last sample, with all problems of all lines; or there is no sample.
        """
        if self.task_type == "CONTINUED_PRETRAIN":
            yield from self._texts()
            return
        problems, total = ProblemList(self.path.name), 0
        parse = partial(parse_sample, task_type=self.task_type, system_message=self.system_message)
        for number, sample in check_lines(self._lines(), parse, problems):
            total = number
            yield number, sample
        if problems:
            raise DataError(problems.messages(sum(1 for _ in self._lines())))
        if not total:
            raise DataError(
                f"{self.path}: the file is empty; each line must hold one sample. Give a file with samples."
            )

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line

    def _texts(self) -> Iterator[tuple[int, Sample]]:
        problems: list[str] = []
        found = False
        for number, path in enumerate(self.files, 1):
            try:
                text = path.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                problems.append(f"{path}: the byte at offset {error.start} is not UTF-8. Save the file as UTF-8.")
                continue
            if text.strip():
                found = True
                yield number, text
        if problems:
            raise DataError(problems)
        if not found:
            raise DataError(f"{self.path}: all .txt files are empty. Give a folder with text.")

    def digest(self) -> str:
        """SHA-256 over the names and contents of the files."""
        total = hashlib.sha256()
        for path in self.files:
            content = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    content.update(block)
            total.update(f"{path.relative_to(self.path).as_posix()}\0{content.hexdigest()}\n".encode())
        return total.hexdigest()


def open_source(given: str, task_type: TaskType, *, system_message: bool) -> Source:
    """The source that a path names, without reading samples.

    Raises:
        SpecError: there is nothing at the path, or nothing that the task type takes.
    """
    if given.startswith(REMOTE_SCHEMES):
        raise SpecError(f"{given}: reading from an object store is not built yet. Copy the data to this machine.")
    path = Path(resolve(given))
    if task_type == "CONTINUED_PRETRAIN":
        return Source(_text_folder(path, given), task_type, system_message)
    if path.is_dir():
        raise SpecError(f"{given}: is a folder; {task_type} takes one .jsonl file. Name the file.")
    if not path.exists():
        raise SpecError(f"{given}: there is no such file ({path}). Check the path.")
    if path.suffix != ".jsonl":
        raise SpecError(f"{given}: found a {path.suffix or 'nameless'} file; {task_type} takes a .jsonl file.")
    return Source(path, task_type, system_message)


def _text_folder(path: Path, given: str) -> Path:
    if not path.is_dir():
        found = "is a file" if path.exists() else f"there is no such folder ({path})"
        raise SpecError(f"{given}: {found}; CONTINUED_PRETRAIN takes a folder of .txt files. Name the folder.")
    if not Source(path, "CONTINUED_PRETRAIN", system_message=True).files:
        raise SpecError(f"{given}: the folder holds no .txt file. Folders inside it are searched too.")
    return path
