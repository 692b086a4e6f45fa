"""What a run logs to MLflow, on its own disk first: a file of JSON lines, and how far it was sent."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tundish.base.files import write_atomic


class Journal:
    """A file of JSON lines with one writer, and a file next to it with the position of the first unsent line.

    Args:
        path: of the file; created with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sent = path.with_suffix(".sent")
        self._alone = threading.Lock()

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a line; an incomplete one before it, left by a kill, is lost."""
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        with self._alone, open(self.path, "ab+") as file:
            end = file.tell()
            if end < self.sent:  # after a power failure, lines that were sent may be missing
                self.note_sent(end)
            if end:
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All records, in order."""
        return (record for record, _ in self._records(0))

    def unsent(self) -> Iterator[tuple[dict[str, Any], int]]:
        """The records that were not sent, in order, each with the position after it."""
        return self._records(self.sent)

    def _records(self, position: int) -> Iterator[tuple[dict[str, Any], int]]:
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # incomplete: it is being written
                position += len(line)
                with contextlib.suppress(ValueError):
                    yield json.loads(line), position

    @property
    def sent(self) -> int:
        """Position at which the unsent lines begin."""
        try:
            return int(self._sent.read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def note_sent(self, position: int) -> None:
        """Record that all lines before a position were sent."""
        write_atomic(self._sent, f"{position}\n")

    @property
    def is_sent(self) -> bool:
        """Whether everything was sent."""
        return not self.path.exists() or self.sent >= os.path.getsize(self.path)
