"""Where a run's checkpoints are kept: a folder of this machine, an object store, or an MLflow server.

A checkpoint of a store is written on this machine first, then copied with `.metadata` last: without it, a checkpoint is
not complete.
"""

import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tundish.base.files import locked, make_folder, write_atomic
from tundish.base.home import copies_dir
from tundish.base.objects.contract import is_uri
from tundish.base.objects.errors import store_errors_as
from tundish.base.objects.opening import open_store
from tundish.checkpoints.folder import CHECKPOINT_LINK, NAME, check_complete, in_order, list_checkpoints
from tundish.checkpoints.format.metadata import METADATA
from tundish.checkpoints.format.pickles import shown
from tundish.checkpoints.manifest import problems, read_manifest
from tundish.errors import CheckpointError

log = logging.getLogger(__name__)
FILE_NAME = re.compile(r"\.metadata|manifest\.json|[\w-]+\.(distcp|pt)|[\w-]+\.symlink")
LONGEST_LINK = 4096
READ = "read"
"""Folder of copies for readers, beside those that a run resumes from."""


@dataclass(frozen=True, slots=True)
class SaveFolder:
    """A folder of checkpoints, and the link that names the newest one."""

    address: str
    """A path of this machine, or a URI."""

    @property
    def is_remote(self) -> bool:
        """Whether it is in a store."""
        return is_uri(self.address)

    @property
    def local(self) -> Path:
        """The folder itself, or this machine's copy of it."""
        if not self.is_remote:
            return Path(self.address)
        return copies_dir() / hashlib.sha256(self.address.encode()).hexdigest()[:24]

    def list(self) -> list[str]:
        """Addresses of the complete checkpoints, oldest first.

        Raises:
            CheckpointError: the store does not answer.
        """
        if not self.is_remote:
            return [str(path) for path in list_checkpoints(self.local)]
        keys = self._keys()
        names = in_order({key.partition("/")[0] for key in keys})
        return [f"{self.address}/{name}" for name in names if f"{name}/{METADATA}" in keys]

    def newest(self) -> Path | None:
        """The newest complete checkpoint, on this machine; copied from the store if this machine lacks it.

        Raises:
            CheckpointError: the store does not answer and this machine has none, or the copy is damaged.
        """
        here = [path.name for path in list_checkpoints(self.local)]
        if not self.is_remote:
            return self.local / here[-1] if here else None
        try:
            there = [address.rpartition("/")[2] for address in self.list()]
        except CheckpointError:
            if not here:
                raise
            log.warning("Using the newest checkpoint of this machine, as the store does not answer.", exc_info=True)
            return self.local / here[-1]
        if not here and not there:
            return None
        name = in_order({*here, *there})[-1]
        return self.local / name if name in here else self.copy(name, self.local)

    def fetch(self, name: str) -> Path:
        """A checkpoint or a `.pt` file, on this machine, for reading: a run that keeps the newest few cannot remove it.

        Raises:
            CheckpointError: it does not exist, or is damaged.
        """
        return self.copy(name, self.local / READ) if self.is_remote else self.local / name

    def copy(self, name: str, folder: Path) -> Path:
        """Copy a checkpoint or a `.pt` file of the store to a folder of this machine, unless it is there.

        Raises:
            CheckpointError: it does not exist, or is damaged.
        """
        copy = folder / name
        make_folder(folder)
        with locked(folder / f".{name}.lock"):
            if not copy.exists():
                self._download(name, copy)
        return copy

    def fetch_metadata(self, name: str, folder: Path) -> None:
        """Copy only a checkpoint's `.metadata`, which lists its tensors, from the store to a folder of that name.

        Raises:
            CheckpointError: the store does not have it, or does not answer.
        """
        self._get(f"{name}/{METADATA}", folder / METADATA)

    def holds(self, name: str) -> bool:
        """Whether the store has a complete checkpoint, or a `.pt` file, of that name.

        Raises:
            CheckpointError: the store does not answer.
        """
        with store_errors_as(CheckpointError):
            return open_store(self.address).find(name if name.endswith(".pt") else f"{name}/{METADATA}") is not None

    def read_link(self, name: str) -> str:
        """The text of a `.symlink` file, read anew each time.

        Raises:
            CheckpointError: it does not exist, or is not text.
        """
        path = self.local / name
        try:
            if self.is_remote:
                with store_errors_as(CheckpointError):
                    return open_store(self.address).read(name, 0, LONGEST_LINK).decode().strip()
            if not path.is_file():  # opening a named pipe would wait forever
                raise FileNotFoundError("no such file")
            with open(path) as file:
                return file.read(LONGEST_LINK).strip()
        except (OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.address}/{name}: cannot be read ({error}). Check the path.") from error

    def publish(self, folder: Path) -> None:
        """Copy a complete checkpoint of this machine to the store, if there is one, and let `latest` name it.

        A process that is killed meanwhile leaves a checkpoint without `.metadata`, or a `latest` that names the one
        before; publishing again completes it.

        Raises:
            CheckpointError: the store refuses it, or does not answer.
        """
        link = self.local / CHECKPOINT_LINK
        if self.is_remote:
            if not self.holds(folder.name):
                for file in sorted(folder.iterdir(), key=lambda file: (file.name == METADATA, file.name)):
                    self._put(file, f"{folder.name}/{file.name}")
            # This machine keeps what a resume begins with, and those that are not published yet.
            here = list_checkpoints(self.local)
            remove(here[: here.index(folder)] if folder in here else [])
        write_atomic(link, f"{self.address}/{folder.name}")
        if self.is_remote:
            self._put(link, CHECKPOINT_LINK)

    def keep_newest(self, count: int) -> None:
        """Remove the oldest complete checkpoints until `count` (at least 1) are left.

        Raises:
            CheckpointError: the store refuses it, or does not answer.
        """
        for address in self.list()[: -max(1, count)]:
            if self.is_remote:
                self._remove(address.rpartition("/")[2])
            else:
                remove([Path(address)])

    def clear(self) -> None:
        """Remove all checkpoints of the store, complete or not, and the link to the newest.

        Raises:
            CheckpointError: the store refuses it, or does not answer.
        """
        for name in in_order({key.partition("/")[0] for key in self._keys()}):
            self._remove(name)
        with store_errors_as(CheckpointError):
            open_store(self.address).delete(CHECKPOINT_LINK)

    def _remove(self, name: str) -> None:
        # `.metadata` first: what is interrupted is not complete any more.
        for key in sorted(self._keys(name), key=lambda key: (key != f"{name}/{METADATA}", key)):
            with store_errors_as(CheckpointError):
                open_store(self.address).delete(key)

    def _keys(self, below: str = "") -> set[str]:
        with store_errors_as(CheckpointError):
            return {entry.key for entry in open_store(self.address).list(below)}

    def _put(self, file: Path, key: str) -> None:
        with store_errors_as(CheckpointError):
            open_store(self.address).upload(file, key)

    def _get(self, key: str, target: Path) -> None:
        if not FILE_NAME.fullmatch(key.removeprefix(f"{target.parent.name}/")):
            raise CheckpointError(
                f"{self.address}/{shown(key)}: checkpoints have no file of this name. Use another checkpoint."
            )
        with store_errors_as(CheckpointError):
            open_store(self.address).download(key, target)

    def _download(self, name: str, copy: Path) -> None:
        begin = f".copy-{name}-"
        for left in copy.parent.glob(f"{begin}*"):  # of a process that was killed: this one holds the lock
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=copy.parent, prefix=begin) as scratch:
            whole = Path(scratch) / name
            if not NAME.fullmatch(name):
                self._get(name, whole)
            else:
                whole.mkdir()
                for key in sorted(self._keys(name)):
                    self._get(key, whole / key.removeprefix(f"{name}/"))
                _check_copy(whole)
            whole.rename(copy)


def hidden(folder: Path) -> Path:
    """The name under which a checkpoint is not complete."""
    return folder.with_name(f".{folder.name}.tmp")


def remove(folders: Sequence[Path]) -> None:
    """Remove checkpoints or exports of this machine, each at once: one that is half removed would look complete."""
    for path in folders:
        shutil.rmtree(hidden(path), ignore_errors=True)  # the rest of one that could not be removed
        path.rename(hidden(path))
        shutil.rmtree(hidden(path))


def save_folder_of(address: str) -> tuple[SaveFolder, str]:
    """The folder that a checkpoint or file lies in, and its name there."""
    parent, _, name = address.rstrip("/").rpartition("/")
    return SaveFolder(parent), name


def _check_copy(folder: Path) -> None:
    if read_manifest(folder) is None:
        check_complete(folder)
    elif damage := problems(folder):
        raise CheckpointError(f"{damage[0]} The copy was not used; try again, or use another checkpoint.")
