"""Locks between processes: held on a file by flock, let go of by the kernel; who waits is told who holds one."""

import contextlib
import fcntl
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from tundish.errors import LockHeldError
from tundish.processes import ProcessId
from tundish.text import redacted

log = logging.getLogger(__name__)
TELL_SECONDS = 2.0
"""Who waits for a lock so long is told who holds it, and told again after …"""
TELL_AGAIN_SECONDS = 60.0
LOCK_NAME = "lock"
"""The file by which a folder is locked."""


@contextmanager
def locked(path: Path, timeout: float | None = None, *, temporary: bool = False) -> Iterator[None]:
    """Hold a lock on a file, which is made, or on a folder that exists, by its file `lock`.

    The kernel lets go of it when its holder dies. Who waits is told after a moment who holds it.

    Args:
        path: of the file or the folder.
        timeout: seconds; None waits for ever.
        temporary: the file is removed at the end.

    Raises:
        LockHeldError: it was not free in time.
    """
    file = _lock_file(path)
    while True:
        descriptor = _open_lock(file)
        try:
            _wait_for(descriptor, file, timeout)
            if _is_there(descriptor, file):
                _sign(descriptor)
                try:
                    yield
                finally:
                    if temporary:
                        file.unlink(missing_ok=True)
                return
            # Removed while it was waited for; another one may have taken its place.
        finally:
            os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether somebody holds a lock on a file or a folder, be it on another machine that shares the disk."""
    try:
        descriptor = os.open(_lock_file(path), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, seconds: float) -> bool:
    """Whether an open file could be locked within so many seconds."""
    end, pause = time.monotonic() + seconds, 0.005
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if (left := end - time.monotonic()) <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, 0.1)


def _lock_file(path: Path) -> Path:
    return path / LOCK_NAME if path.is_dir() else path


def _open_lock(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        return os.open(file, os.O_RDONLY)  # another user's, in a shared home: it can be held, not signed


def _wait_for(descriptor: int, file: Path, timeout: float | None) -> None:
    end = math.inf if timeout is None else time.monotonic() + timeout
    seconds = TELL_SECONDS
    while not try_lock(descriptor, max(0.0, min(seconds, end - time.monotonic()))):
        if time.monotonic() >= end:
            raise LockHeldError(f"{file}: is held by {_holder(file)}. Wait for its end, or end it.")
        log.warning("Waiting for %s, which is held by %s.", file, _holder(file))
        seconds = TELL_AGAIN_SECONDS


def _is_there(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Say in the lock who holds it."""
    command = redacted(" ".join([Path(sys.argv[0]).name, *sys.argv[1:3]]))
    text = json.dumps({**asdict(ProcessId.of(os.getpid())), "command": command}) + "\n"
    with contextlib.suppress(OSError):  # a full disk: it is held all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _holder(file: Path) -> str:
    """Who holds a lock, as far as it says."""
    try:
        record = json.loads(file.read_text())
        command, holder = str(record.pop("command")), ProcessId(**record)
        since = datetime.fromtimestamp(file.stat().st_mtime)
        if holder.is_here and holder.process() is None:
            return "another process"  # the one that has signed has ended
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "another process"
    return f"process {holder.pid} on {holder.host} ({command}) since {since:%Y-%m-%d %H:%M:%S}"
