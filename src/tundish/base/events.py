"""events.jsonl: appended to by the stage that did the thing, after it did it; read by everybody.

One JSON object a line with `type`, `time` (ISO 8601, UTC), `message`, and facts for machines where there are any.
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
"""Facts that readers count with."""
LOCK_SECONDS = 2.0
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
    """Append one event, its message without secrets; whole lines only, whoever else writes."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    record = {"type": type, "time": time, "message": redacted(message), **facts}
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        # Held for longer than a line takes only by a process that was stopped. Then the line goes without it: on a
        # disk of this machine it is whole all the same.
        try_lock(descriptor, LOCK_SECONDS)
        size = os.fstat(descriptor).st_size
        if not size:
            flush_folder(path.parent)
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            # A writer was killed in the middle of its line: that one is lost, not this one.
            line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        # Progress may be lost in a power cut; what a run reached may not.
        if type != "TRAIN_UPDATED":
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[Event]:
    """All events in order, of TRAIN_UPDATED only the latest; a line that was cut off is left out.

    Raises:
        OSError: the file is there, but cannot be read.
        ValueError: it is no regular file, or a whole line of it is no event.
    """
    try:
        lines = read_regular(path).split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    latest = max((i for i, line in enumerate(lines) if line.startswith(PROGRESS)), default=-1)
    # The others are thousands in a long run, and not even looked at.
    kept = ((i + 1, line) for i, line in enumerate(lines) if i == latest or not line.startswith(PROGRESS))
    return [event for number, line in kept if (event := _event(number, line)) is not None]


def _event(number: int, line: bytes) -> Event | None:
    """One line; None: a writer was killed, or the power failed, in the middle of it."""
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
        raise ValueError(f"line {number} is no event: {line[:100].decode(errors='replace')}") from None
    return Event(type, time, message, record)


def short_duration(seconds: float) -> str:
    """`45s`, `5min`, `2hr` or `1d`."""
    for limit, size, unit in ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "hr")):
        if seconds < limit:
            return f"{int(seconds / size)}{unit}"
    return f"{int(seconds / 86400)}d"
