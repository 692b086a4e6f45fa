"""A folder that appears under its name complete, or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tundish.errors import SpecError
from tundish.paths import flush_folder


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `target` when the block ends well, and is gone when it does not.

    A lock is held meanwhile: the kernel frees it when its holder dies, and machines that share the disk see it, which
    the number of a process would not tell. So what is found half written was left by a process that was killed, and is
    removed.

    Raises:
        SpecError: another process makes the same folder, or it is there already.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _held(target.with_name(f".{target.name}.lock"), target):
        beside = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            yield beside
            if target.is_symlink() or (target.exists() and any(target.iterdir())):
                raise SpecError(f"{target}: is there already. Remove it, or choose another folder.")
            flush_folder(beside)
            beside.rename(target)
            flush_folder(target.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _held(lock: Path, target: Path) -> Iterator[None]:
    """The lock, whose file is there only while somebody holds it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(descriptor, lock):
                break
        except BlockingIOError:
            os.close(descriptor)
            raise SpecError(
                f"{target}: another process is making it, here or on a machine that shares the disk. Wait for it, or "
                "choose another folder."
            ) from None
        os.close(descriptor)  # of a file that its holder has removed meanwhile
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
