"""Where a run's checkpoints are: a folder of this machine, or one of an object store or an MLflow server.

What is kept elsewhere is written here first, then copied, `.metadata` last: a checkpoint without it is not complete.
MLflow's artifact clients do the copying (`s3://`, `gs://`, `abfss://`, `wasbs://`, `mlflow-artifacts:/`).
"""

import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tundish.base.files import locked, make_folder, write_atomic
from tundish.base.home import copies_dir
from tundish.base.mlflow_client import artifacts_at, told
from tundish.checkpoints.folder import CHECKPOINT_LINK, NAME, check_complete, in_order, list_checkpoints
from tundish.checkpoints.format.metadata import METADATA
from tundish.checkpoints.format.pickles import shown
from tundish.checkpoints.manifest import problems, read_manifest
from tundish.errors import CheckpointError, StoreError
from tundish.plan.address import is_uri

log = logging.getLogger(__name__)
T = TypeVar("T")
FILE_NAME = re.compile(r"\.metadata|manifest\.json|[\w-]+\.(distcp|pt)|[\w-]+\.symlink")
LONGEST_LINK = 4096
READ = "read"
"""Folder of copies for readers, beside those that a run goes on from."""


@dataclass(frozen=True, slots=True)
class SaveFolder:
    """A folder of checkpoints."""

    address: str
    """A path of this machine, or a URI."""

    @property
    def is_remote(self) -> bool:
        """Whether it is on another machine."""
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
            CheckpointError: the store cannot be asked.
        """
        if not self.is_remote:
            return [str(path) for path in list_checkpoints(self.local)]
        names = [name for name in in_order(self._names("")) if METADATA in self._names(name)]
        return [f"{self.address}/{name}" for name in names]

    def newest(self) -> Path | None:
        """The newest complete checkpoint on this machine, copied where it is not here.

        Raises:
            CheckpointError: the store cannot be asked and there is none here, or what it holds is damaged.
        """
        here = [path.name for path in list_checkpoints(self.local)]
        if not self.is_remote:
            return self.local / here[-1] if here else None
        try:
            there = [address.rpartition("/")[2] for address in self.list()]
        except CheckpointError:
            if not here:
                raise
            log.warning("The newest checkpoint of this machine is used, as the store is away.", exc_info=True)
            return self.local / here[-1]
        if not here and not there:
            return None
        name = in_order({*here, *there})[-1]
        if name not in here:
            self.copy(name, self.local)
        return self.local / name

    def fetch(self, name: str) -> Path:
        """A checkpoint or a file on this machine, complete, for reading: not among those that its own run removes.

        Raises:
            CheckpointError: there is none of that name, or it is damaged.
        """
        return self.copy(name, self.local / READ) if self.is_remote else self.local / name

    def copy(self, name: str, folder: Path) -> Path:
        """A copy of a checkpoint or a file of the store in a folder of this machine, made where it is not there.

        Raises:
            CheckpointError: there is none of that name, or it is damaged.
        """
        copy = folder / name
        make_folder(folder)
        with locked(folder / f".{name}.lock"):
            if not copy.exists():
                self._download(name, copy)
        return copy

    def fetch_metadata(self, name: str, folder: Path) -> None:
        """Put what says which tensors a checkpoint of the store has, and nothing else, into a folder of that name.

        Raises:
            CheckpointError: the store cannot be asked.
        """
        self._get(f"{name}/{METADATA}", folder / METADATA)

    def holds(self, name: str) -> bool:
        """Whether there is a complete checkpoint, or a file, of that name in the store.

        Raises:
            CheckpointError: the store cannot be asked.
        """
        return name in self._names("") if name.endswith(".pt") else METADATA in self._names(name)

    def read_link(self, name: str) -> str:
        """The content of a `.symlink` file, read anew each time.

        Raises:
            CheckpointError: there is none, or it is none.
        """
        with tempfile.TemporaryDirectory() as scratch:
            link = Path(scratch) / name if self.is_remote else self.local / name
            if self.is_remote:
                self._get(name, link)
            try:
                if not link.is_file():
                    raise FileNotFoundError("there is no such file")
                with open(link) as file:
                    return file.read(LONGEST_LINK).strip()
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self.address}/{name}: cannot be read ({error}). Check the path.") from error

    def publish(self, folder: Path) -> None:
        """Put a complete checkpoint of this machine where it belongs, and let `latest` name it.

        Raises:
            CheckpointError: the store does not take it.
        """
        link = self.local / CHECKPOINT_LINK
        if self.is_remote:
            if METADATA not in self._names(folder.name):
                for file in sorted(folder.iterdir(), key=lambda file: (file.name == METADATA, file.name)):
                    self._put(file, folder.name)
            # Here, only what a resume begins with is kept, and what waits for its turn.
            here = list_checkpoints(self.local)
            remove(here[: here.index(folder)] if folder in here else [])
        write_atomic(link, f"{self.address}/{folder.name}")
        if self.is_remote:
            self._put(link, "")

    def keep_newest(self, count: int) -> None:
        """Remove the oldest complete checkpoints until `count` (1 or more) are left.

        Raises:
            CheckpointError: the store does not let us.
        """
        for address in self.list()[: -max(1, count)]:
            if self.is_remote:
                self._remove(address.rpartition("/")[2])
            else:
                remove([Path(address)])

    def clear(self) -> None:
        """Remove all checkpoints of the store, complete or not, and the link to the newest.

        Raises:
            CheckpointError: the store does not let us.
        """
        names = self._names("")
        for name in in_order(names):
            self._remove(name)
        if CHECKPOINT_LINK in names:
            _try(self.address, lambda: artifacts_at(self.address).delete_artifacts(CHECKPOINT_LINK))

    def _remove(self, name: str) -> None:
        """Remove a checkpoint of the store, file by file; what is interrupted is no longer complete.

        Stores remove all that begins as they are told: with ep1-ba1, ep1-ba10 would be gone.
        """
        for file in sorted(self._names(name), key=lambda file: (file != METADATA, file)):
            _try(self.address, lambda file=file: artifacts_at(self.address).delete_artifacts(f"{name}/{file}"))

    def _names(self, below: str) -> set[str]:
        """Names in the folder or, with a slash at their end, of folders in a checkpoint."""
        found = _try(self.address, lambda: artifacts_at(self.address).list_artifacts(below or None))
        return {info.path.rpartition("/")[2] + ("/" if below and info.is_dir else "") for info in found}

    def _put(self, file: Path, below: str) -> None:
        _try(self.address, lambda: artifacts_at(self.address).log_artifact(str(file), below or None))

    def _get(self, name: str, target: Path) -> None:
        if not FILE_NAME.fullmatch(name.removeprefix(f"{target.parent.name}/")):
            raise CheckpointError(
                f"{self.address}/{shown(name)}: no name of a checkpoint's file. Use another checkpoint."
            )
        _try(self.address, lambda: artifacts_at(self.address)._download_file(name, str(target)))

    def _download(self, name: str, copy: Path) -> None:
        begin = f".copy-{name}-"
        for left in copy.parent.glob(f"{begin}*"):  # of a process that was killed: nobody else holds the lock
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=copy.parent, prefix=begin) as scratch:
            whole = Path(scratch) / name
            if not NAME.fullmatch(name):
                self._get(name, whole)
            else:
                whole.mkdir()
                for file in sorted(self._names(name)):
                    self._get(f"{name}/{file}", whole / file)
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
    elif found := problems(folder):
        raise CheckpointError(f"{found[0]} The copy was not used; try again, or use another checkpoint.")


def _try(address: str, action: Callable[[], T]) -> T:
    try:
        with told(address):
            return action()
    except StoreError as error:
        raise CheckpointError(error.message) from error
