"""Saves checkpoints while training continues: the state is copied, then written by a thread of each rank."""

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from composer import Logger, State, Timestamp
from composer.callbacks import CheckpointSaver
from composer.utils import dist, reproducibility
from composer.utils.checkpoint import glob_filter
from torch.distributed.tensor import DTensor

from tundish.checkpoints.save_folder import SaveFolder
from tundish.checkpoints.saving import Staged, write_checkpoint
from tundish.errors import CheckpointError

log = logging.getLogger(__name__)

COPY_SHARE = 0.5
"""Of the free memory, for copies of all ranks of a node; where they need more, training waits for the writing."""
PATIENCE = timedelta(days=1)
"""Timeout for the slowest rank's writing, and for copies to and from a store."""


class Saver(CheckpointSaver):
    """Replaces Composer's saver. A checkpoint is complete or absent; the next one and the end of training wait for it.

    Args:
        place: where checkpoints go.
        interval: Composer's save_interval.
        keep: how many checkpoints stay; less than 1: all.
        ignore_keys: Composer's patterns of what is left out.
        base_model: name or folder, recorded in the checkpoint.

    Attributes:
        completed: called on rank 0 with the path or URI of each complete checkpoint, from another thread.
    """

    def __init__(
        self, place: SaveFolder, interval: Any, keep: int, ignore_keys: list[str] | None, base_model: str | None
    ) -> None:
        folder = str(place.local)
        super().__init__(folder, save_interval=interval, ignore_keys=ignore_keys, remote_file_name=None)
        self.folder = folder  # Composer parsed it as a URI, where '#' and '?' end the path
        self.place, self.keep, self.base_model = place, keep, base_model
        self.completed: list[Callable[[str], None]] = []
        self._group = patient_group()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Take the folder once Composer has filled in the MLflow run's id, which a YAML may leave open."""
        super().init(state, logger)
        if not self.place.is_remote:
            self.place = SaveFolder(self.folder)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Do not save again the checkpoint that the run resumes from, as Composer would at the end of an epoch."""
        if int(state.timestamp.batch):
            self.last_checkpoint_batch = state.timestamp.batch

    def batch_end(self, state: State, logger: Logger) -> None:
        """Fail if the checkpoint could not be written."""
        self._raise()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Wait, before training is reported as finished."""
        self.wait()

    def close(self, state: State, logger: Logger) -> None:
        """Wait, before the process ends."""
        self.wait()

    def state_dict(self) -> dict[str, Any]:
        """Empty: what is complete is on the disk."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""

    def wait(self) -> None:
        """Wait until the previous checkpoint is complete.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def save_now(self, state: State, logger: Logger) -> None:
        """Save a checkpoint that no interval asks for."""
        self._save_checkpoint(state, logger)

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        started = time.monotonic()
        self.wait()  # also raises the error of the previous checkpoint before another one is written
        self.last_checkpoint_batch = state.timestamp.batch
        folder = Path(self.folder, checkpoint_name(state.timestamp))
        last = state.get_elapsed_duration()
        content = self._content(state)
        # The last checkpoint needs no copy: training does not continue while it is written.
        copy = (last is None or last < 1) and _has_room(content)
        staged = Staged(content, folder, copy=copy, base_model=self.base_model)
        if copy:
            self._thread = threading.Thread(target=self._write, args=(staged,))
            self._thread.start()
        else:
            self._write(staged)
        log.info("Checkpoint %s: training waited for %.2f s.", folder.name, time.monotonic() - started)
        self._raise()

    def _content(self, state: State) -> dict[str, Any]:
        content: dict[str, Any] = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
        if self.ignore_keys:
            (self.ignore_keys if callable(self.ignore_keys) else glob_filter(self.ignore_keys))(content)
        if dist.get_global_rank():
            content.pop("rng", None)  # rank 0 has that of all ranks
        return content

    def _write(self, staged: Staged) -> None:
        first = dist.get_global_rank() == 0
        try:
            write_checkpoint(staged, self.place, self._exchange, first)
        except Exception as error:  # also where another rank died; raised in the main thread by `wait` or `batch_end`
            self._error = error
            return
        if not first:
            return
        try:
            for callback in self.completed:
                callback(f"{self.place.address}/{staged.folder.name}")
            if self.keep > 0 and not self.place.is_remote:
                self.place.keep_newest(self.keep)
        except (CheckpointError, OSError):
            # The next one tries again to remove the old ones.
            log.warning(
                "Checkpoint %s is complete, but what follows a checkpoint failed.", staged.folder, exc_info=True
            )

    def _exchange(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values


def checkpoint_name(timestamp: Timestamp) -> str:
    """`ep<epoch>-ba<batch>`."""
    return f"ep{int(timestamp.epoch)}-ba{int(timestamp.batch)}"


def patient_group() -> Any:
    """A process group for exchanges that may take hours; None with one rank. Must be called on all ranks."""
    if dist.get_world_size() == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def _has_room(content: Any) -> bool:
    """Whether copies of all ranks of this node fit into free memory."""
    needed = _bytes(content) * dist.get_local_world_size()
    return needed <= COPY_SHARE * psutil.virtual_memory().available


def _bytes(content: Any) -> int:
    """Of all tensors, as far as they are on this rank."""
    if isinstance(content, dict):
        return sum(map(_bytes, content.values()))
    if isinstance(content, DTensor):
        return content.to_local().nbytes
    return content.nbytes if isinstance(content, torch.Tensor) else 0
