"""A sharded state dict → a checkpoint that is complete or absent.

PyTorch's planner decides which rank writes what. Each rank writes its file to a hidden folder and hashes it on the way.
When all have, rank 0 adds the metadata and the manifest, flushes the folder to disk and renames it. A process that is
killed at any moment leaves the hidden folder, which the next one removes.
"""

import dataclasses
import hashlib
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.filesystem import (
    _StorageInfo,  # pyright: ignore[reportPrivateUsage]  the format's own record, pickled by this name
)
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from typing_extensions import override

from tundish.base.files import flush_folder, write_atomic
from tundish.checkpoints.folder import CHECKPOINT_LINK, NAME, list_checkpoints
from tundish.checkpoints.format.metadata import METADATA
from tundish.checkpoints.format.pickles import reason
from tundish.checkpoints.manifest import FileFacts, write_manifest
from tundish.checkpoints.save_folder import SaveFolder, hidden
from tundish.errors import CheckpointError

log = logging.getLogger(__name__)

Exchange = Callable[[Any], list[Any]]
"""Gathers a value of every rank, in the order of the ranks; called on all of them."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank wrote, or why it failed."""

    file: str = ""
    facts: FileFacts | None = None
    places: tuple[tuple[int, int], ...] = ()
    """Start and length of each item of its plan."""
    error: str | None = None


class Staged(StorageWriter):
    """One rank's part of a checkpoint, taken from a state dict and not yet on disk.

    Args:
        state_dict: nested; every rank makes its `Staged` at the same time.
        folder: of the checkpoint.
        copy: whether tensors are copied, so that training may change them while they are written.
        base_model: the model that training started from.

    Raises:
        CheckpointError: the folder exists already.
    """

    def __init__(self, state_dict: dict[str, Any], folder: Path, *, copy: bool, base_model: str | None = None) -> None:
        if folder.exists():
            raise CheckpointError(f"{folder}: exists already, and checkpoints are never overwritten. Move it away.")
        self.folder, self.copy, self.base_model = folder, copy, base_model
        self._file = ""
        self._items: list[tuple[WriteItem, Any]] = []
        self._plans: list[SavePlan] = []
        self._metadata: Metadata | None = None
        dcp_save(state_dict, storage_writer=self, planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))

    @property
    def hidden(self) -> Path:
        """The folder that it is written to."""
        return hidden(self.folder)

    def write(self) -> Share:
        """Write this rank's file. A failure is returned, not raised: the other ranks wait for an answer."""
        try:
            self.hidden.mkdir(parents=True, exist_ok=True)
            with open(self.hidden / self._file, "wb") as file:
                hashing = _Hashing(file)
                places = tuple(_write_item(hashing, data) for _, data in self._items)
                file.flush()
                os.fsync(file.fileno())
            return Share(self._file, FileFacts(hashing.size, hashing.digest.hexdigest()), places)
        except OSError as error:
            return Share(error=_failure(self.folder, error))
        except Exception as error:
            return Share(
                error=f"{self.folder}: could not be written ({reason(error)}). Earlier checkpoints are untouched."
            )
        finally:
            self._items = []

    def complete(self, shares: Sequence[Share]) -> None:
        """Give the checkpoint its name; called on rank 0 with the shares of all ranks.

        Raises:
            CheckpointError: a rank failed, or wrote to another disk.
        """
        if errors := sorted({share.error for share in shares if share.error}):
            shutil.rmtree(self.hidden, ignore_errors=True)
            raise CheckpointError(" ".join(errors))
        try:
            self._complete({share.file: share.facts for share in shares if share.facts}, shares)
        except OSError as error:
            shutil.rmtree(self.hidden, ignore_errors=True)
            raise CheckpointError(_failure(self.folder, error)) from error

    def _complete(self, files: dict[str, FileFacts], shares: Sequence[Share]) -> None:
        for name, facts in files.items():
            file = self.hidden / name
            if not file.is_file() or file.stat().st_size != facts.bytes:
                raise CheckpointError(
                    f"{file}: was written on another node and is not visible here. Checkpoints must go to a disk that "
                    "all nodes share. Set save_folder or $TUNDISH_HOME to a folder on one."
                )
        path = self.hidden / METADATA
        write_atomic(path, self._pickled(shares))
        write_manifest(self.hidden, files | {METADATA: FileFacts.of(path)}, self.base_model)
        flush_folder(self.hidden)
        self.hidden.rename(self.folder)
        flush_folder(self.folder.parent)

    def _pickled(self, shares: Sequence[Share]) -> bytes:
        assert self._metadata is not None
        storage = {
            item.index: _StorageInfo(share.file, *place)
            for plan, share in zip(self._plans, shares, strict=True)
            for item, place in zip(plan.items, share.places, strict=True)
        }
        return pickle.dumps(dataclasses.replace(self._metadata, storage_data=storage))

    # What PyTorch asks of a StorageWriter.

    @override
    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @override
    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        pass

    @override
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    @override
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._plans = plans
        return [dataclasses.replace(plan, storage_data=f"__{rank}_0.distcp") for rank, plan in enumerate(plans)]

    @override
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self._file = cast(str, plan.storage_data)
        self._items = [(item, self._data(item, planner)) for item in plan.items]
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def _data(self, item: WriteItem, planner: SavePlanner) -> Any:
        data = planner.resolve_data(item)
        if item.type == WriteItemType.BYTE_IO:
            return data
        tensor = cast(torch.Tensor, data).detach()
        # A view would be saved with all that it is a view of.
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        return tensor.to("cpu", copy=self.copy or not whole).contiguous()

    @override
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._metadata = metadata

    @classmethod
    @override
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def write_checkpoint(staged: Staged, save_folder: SaveFolder, exchange: Exchange, is_first: bool) -> None:
    """Write what is staged; called on every rank. Afterwards the checkpoint is on disk and `latest` names it.

    Copying it to a store is left to the supervisor: training does not wait for that.

    Raises:
        CheckpointError: a rank failed; raised on every rank.
    """
    shares = exchange(staged.write())
    error = None
    if is_first:
        try:
            staged.complete(shares)
            if not save_folder.is_remote:
                save_folder.publish(staged.folder)
        except CheckpointError as failure:
            error = failure.message
        except OSError as failure:  # `latest` could not be replaced; the other ranks wait for an answer all the same
            error = _failure(staged.folder, failure)
    if error := exchange(error)[0]:
        raise CheckpointError(error)


def clean(save_folder: Path) -> None:
    """Remove what killed processes left half written or half removed, and rename what is damaged."""
    complete = list_checkpoints(save_folder)
    for path in save_folder.glob(f".{CHECKPOINT_LINK}.*.tmp"):
        path.unlink()
    for path in sorted(save_folder.iterdir()) if save_folder.is_dir() else ():
        if not path.is_dir() or path.is_symlink() or path in complete:
            continue
        hidden_one = path.name.startswith(".") and path.name.endswith(".tmp") and NAME.fullmatch(path.name[1:-4])
        if hidden_one or (NAME.fullmatch(path.name) and not (path / METADATA).exists()):
            shutil.rmtree(path)
        elif NAME.fullmatch(path.name):
            # It was complete once, so its owner may be able to repair it.
            aside = next(to for n in count(1) if not (to := path.with_name(f"{path.name}.damaged{n}")).exists())
            path.rename(aside)
            log.warning("%s is damaged or unsafe and is not used; it was renamed to %s.", path, aside.name)


def _write_item(file: "_Hashing", data: Any) -> tuple[int, int]:
    start = file.size
    if isinstance(data, torch.Tensor):
        try:
            torch.save(data, cast(BinaryIO, file))
        except RuntimeError as error:
            # PyTorch still tries to finish its archive, and reports that failure instead of the full disk.
            raise file.error or error from error
    else:
        file.write(data.getbuffer())
    return start, file.size - start


class _Hashing:
    """A file that is hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        count = len(memoryview(data).cast("B"))
        self.digest.update(data)
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.size += count
        return count

    def flush(self) -> None:
        self.file.flush()


def _failure(folder: Path, error: OSError) -> str:
    free = shutil.disk_usage(folder.parent).free if folder.parent.is_dir() else 0
    return (
        f"{folder}: cannot be written ({error.strerror}); {free:,} bytes are free there. Earlier checkpoints are "
        "untouched. Free some disk space, then `tundish resume` the run."
    )
