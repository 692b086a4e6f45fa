"""A folder that appears under its name complete, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tundish.errors import LockHeldError, SpecError
from tundish.locks import locked
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
    with _alone(target):
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
def _alone(target: Path) -> Iterator[None]:
    try:
        with locked(target.with_name(f".{target.name}.lock"), timeout=0, temporary=True):
            yield
    except LockHeldError as error:
        raise SpecError(
            f"{target}: another process is making it, here or on a machine that shares the disk. {error.message}"
        ) from error
