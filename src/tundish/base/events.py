"""events.jsonl: the events of a run. The process that did something appends an event afterwards.

One JSON object per line with `type`, `time` (ISO 8601, UTC), `message`, and more fields that are facts for programs.
"""

import errno
import json
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from tundish.base.files import flush_folder, try_lock
from tundish.base.text import redacted
from tundish.base.typed_json import moment, read_regular
from tundish.errors import FailureCause

PROGRESS = b'{"type": "TRAIN_UPDATED"'
NUMBERS = ("eta_s", "share", "loss", "eval_loss", "tokens_per_s")
"""Facts that readers calculate with."""
LOCK_SECONDS = 2.0
"""The longest wait for another writer, which needs much less for its line."""
TERMINAL_TYPES = frozenset({"COMPLETED", "FAILED", "STOPPED", "CANCELED"})


@dataclass(frozen=True, slots=True)
class Event:
    """One line of events.jsonl."""

    type: str
    time: datetime
    message: str
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def cause(self) -> FailureCause | None:
        """Why the run failed, or had to be started again; None for other events, and those of older versions."""
        value = self.facts.get("cause")
        return None if value is None else FailureCause.of(value)


def append(path: Path, type: str, message: str, **facts: Any) -> None:
    """Append one event, its message without secrets, as one whole line even when several processes write.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    record = {"type": type, "time": time, "message": redacted(message), **facts}
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        # Only a process that was stopped (SIGSTOP) holds the lock for longer. The line is then appended without it,
        # and is whole anyway on a local disk.
        try_lock(descriptor, LOCK_SECONDS)
        size = os.fstat(descriptor).st_size
        if not size:
            flush_folder(path.parent)
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            # Another writer was killed in the middle of its line: that line is lost, this one must not be.
            line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        # In a power failure, progress may be lost, but not what a run has reached.
        if type != "TRAIN_UPDATED":
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[Event]:
    """All events in order, but of TRAIN_UPDATED only the latest; lines that were cut off are skipped.

    Raises:
        OSError: the file exists, but cannot be read.
        ValueError: it is not a regular file, or one of its complete lines is not an event.
    """
    try:
        lines = read_regular(path).split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    latest = max((i for i, line in enumerate(lines) if line.startswith(PROGRESS)), default=-1)
    # A long run has thousands of the others: parsing them would slow down every `tundish list`.
    kept = ((i + 1, line) for i, line in enumerate(lines) if i == latest or not line.startswith(PROGRESS))
    return [event for number, line in kept if (event := _event(number, line)) is not None]


def _event(number: int, line: bytes) -> Event | None:
    """The event of a line; None for half a line, whose writer was killed or lost power."""
    try:
        record = orjson.loads(line)
    except ValueError:
        return None
    try:
        type, time, message = record.pop("type"), moment(record.pop("time")), record.pop("message")
        texts = isinstance(type, str) and isinstance(message, str)
        numbers = all(isinstance(record.get(name, 0), int | float) for name in NUMBERS)
        if not texts or not numbers:
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"line {number} is not an event: {line[:100].decode(errors='replace')}") from None
    return Event(type, time, message, record)


def short_duration(seconds: float) -> str:
    """`45s`, `5min`, `2hr` or `1d`."""
    for limit, size, unit in ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "hr")):
        if seconds < limit:
            return f"{int(seconds / size)}{unit}"
    return f"{int(seconds / 86400)}d"
