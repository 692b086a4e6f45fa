"""Files and folders that are complete or absent, and locks between processes.

Names that come from arguments or data are joined by `inside`, which refuses those that would leave their root. A lock
is flock's: the kernel releases it when its holder dies. Its file names the holder, for those who wait.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from tundish.base.home import home
from tundish.base.processes import ProcessId
from tundish.base.text import redacted
from tundish.errors import FolderExistsError, LockHeldError, SpecError

log = logging.getLogger(__name__)
REPORT_SECONDS = 2.0
"""Waiting time for a lock after which its holder is logged."""
REPORT_AGAIN_SECONDS = 60.0
LOCK_NAME = "lock"
"""The file in a folder that is locked for the folder."""


def make_folder(folder: Path) -> Path:
    """Make a folder in `$TUNDISH_HOME`, and a missing home first, readable by its user only."""
    # Data, specs and logs are in it. A home that exists keeps the permissions that its owner chose; all other folders
    # and files get those of the umask.
    if not home().exists():
        home().mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def inside(root: Path, *parts: str) -> Path:
    """`root` joined with `parts`, as an absolute path.

    Raises:
        SpecError: the result would be outside `root`, by `..`, an absolute part or a link.
    """
    real_root = root.resolve()
    path = root.joinpath(*parts).resolve()
    if not path.is_relative_to(real_root):
        raise SpecError(
            f"{'/'.join(parts)}: leaves {root}. Give a path without '..' and without links to other places."
        )
    return path


def content_root(folder: Path) -> Path:
    """The folder that links in a model's or dataset's folder may point into.

    That is the folder itself. A snapshot in the hub's cache consists of links to files beside it: there it is the
    folder of the model or dataset.
    """
    real = folder.resolve()
    is_snapshot = real.parent.name == "snapshots" and real.parents[1].name.startswith(("models--", "datasets--"))
    return real.parents[1] if is_snapshot else real


def obstacle_to_writing(folder: Path) -> str:
    """Why `folder`, or the nearest folder above it that exists, is not writable; empty = it is."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)):
            return ""
    except OSError as error:
        return f"{existing(folder)}: {error.strerror}"


def existing(folder: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside `path`, flush to disk, rename: a reader sees the old content or the new, never a part."""
    # Random and not the process's number: on a shared disk, a process of another machine may have the same one.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk, its space is needed
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make sure that files created, renamed or removed in a folder stay so after a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(target: Path, *, wait: bool = False, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which is renamed to `target` at the end of the block, or removed if the block fails.

    Args:
        target: the folder; an empty one is replaced.
        wait: for another process that makes the same folder. Its lock file then stays, so that other users who may not
            write beside the folder can hold it.
        replace: an existing folder gives way to the new one, but only once that is complete.

    Raises:
        FolderExistsError: it exists already, or another process has made it meanwhile, and `replace` is False.
        SpecError: another process is making the same folder, and `wait` is False.
    """
    # The lock is released when its holder dies, and machines that share the disk see it. So a half-written folder that
    # is found under the lock was left by a process that was killed.
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target, wait):
        if not replace:
            _refuse_existing(target)
        beside = _half_made(target)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            yield beside
            if replace:
                shutil.rmtree(target, ignore_errors=True)
            _refuse_existing(target)  # made meanwhile by a program that does not use the lock
            flush_folder(beside)
            beside.rename(target)
            flush_folder(target.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def remove_half_made(parent: Path) -> None:
    """Remove from `parent` what `new_folder` was making in processes that were killed: their locks are free.

    Names of the folders in `parent` have no dots.
    """
    for beside in parent.glob(".*.tmp"):
        # Earlier versions put the number of the process behind the name: .<name>.<pid>.tmp
        target = parent / beside.name.split(".")[1]
        with contextlib.suppress(LockHeldError), locked(_lock_of(target), timeout=0):
            shutil.rmtree(beside, ignore_errors=True)


def _half_made(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def _lock_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _refuse_existing(target: Path) -> None:
    if target.is_symlink() or (target.exists() and any(target.iterdir())):
        raise FolderExistsError(f"{target}: already exists. Remove it, or choose another folder.")


@contextmanager
def _alone(target: Path, wait: bool) -> Iterator[None]:
    try:
        with locked(_lock_of(target), timeout=None if wait else 0, temporary=not wait):
            yield
    except LockHeldError as error:
        raise SpecError(
            f"{target}: another process is making it, on this machine or on one that shares the disk. {error.message}"
        ) from error


@contextmanager
def locked(path: Path, timeout: float | None = None, *, temporary: bool = False) -> Iterator[None]:
    """Hold a lock during the block. After a moment of waiting, a warning names the holder.

    Args:
        path: of a file, which is created, or of an existing folder.
        timeout: seconds; None waits forever.
        temporary: whether the file is removed at the end.

    Raises:
        LockHeldError: another process did not release it in time.
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
            # The file was removed while this process waited; there may be a new one of the same name.
        finally:
            os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether a process holds the lock of a file or folder, here or on another machine that shares the disk."""
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
    """Lock an open file; False if another process holds the lock for that many seconds."""
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
        return os.open(file, os.O_RDONLY)  # another user's, in a shared home: it can be held, but not signed


def _wait_for(descriptor: int, file: Path, timeout: float | None) -> None:
    end = math.inf if timeout is None else time.monotonic() + timeout
    seconds = REPORT_SECONDS
    while not try_lock(descriptor, max(0.0, min(seconds, end - time.monotonic()))):
        if time.monotonic() >= end:
            raise LockHeldError(f"{file}: is locked by {_holder(file)}. Wait until it exits, or end it.")
        log.warning("Waiting for %s, locked by %s.", file, _holder(file))
        seconds = REPORT_AGAIN_SECONDS


def _is_there(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write into the lock's file which process holds it."""
    command = redacted(" ".join([Path(sys.argv[0]).name, *sys.argv[1:3]]))
    text = json.dumps({**asdict(ProcessId.of(os.getpid())), "command": command}) + "\n"
    with contextlib.suppress(OSError):  # a full disk: the lock is held anyway
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _holder(file: Path) -> str:
    """The process that holds a lock, as far as its file shows."""
    try:
        record = json.loads(file.read_text())
        command, holder = str(record.pop("command")), ProcessId(**record)
        since = datetime.fromtimestamp(file.stat().st_mtime)
        if holder.is_here and holder.process() is None:
            return "another process"  # the one that signed has exited
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "another process"
    return f"process {holder.pid} on {holder.host} ({command}) since {since:%Y-%m-%d %H:%M:%S}"
