"""What a run tells MLflow, on its own disk first: lines that are appended, and how far they have been sent on."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tundish.base.files import write_atomic


class Journal:
    """A file of JSON lines with one writer, and a file beside it that says where the unsent ones begin.

    Args:
        path: of the file, made by its first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sent = path.with_suffix(".sent")
        self._alone = threading.Lock()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line; whatever was cut off before it by a kill is lost, not this one."""
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        with self._alone, open(self.path, "ab+") as file:
            end = file.tell()
            if end < self.sent:  # a machine that has lost its power forgets the last lines, though they were sent
                self.note_sent(end)
            if end:
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All records, in order."""
        return (record for record, _ in self._records(0))

    def unsent(self) -> Iterator[tuple[dict[str, Any], int]]:
        """The records that have not been sent, in order, each with the place behind it."""
        return self._records(self.sent)

    def _records(self, place: int) -> Iterator[tuple[dict[str, Any], int]]:
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            file.seek(place)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is just being written
                place += len(line)
                with contextlib.suppress(ValueError):
                    yield json.loads(line), place

    @property
    def sent(self) -> int:
        """Where the unsent lines begin."""
        try:
            return int(self._sent.read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def note_sent(self, place: int) -> None:
        """All lines before a place have been sent."""
        write_atomic(self._sent, f"{place}\n")

    @property
    def is_sent(self) -> bool:
        """Whether nothing waits."""
        return not self.path.exists() or self.sent >= os.path.getsize(self.path)
