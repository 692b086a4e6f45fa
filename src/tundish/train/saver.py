"""Checkpoints while training goes on: the state is copied, then written by a thread of each rank."""

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
"""Of the free memory that copies of all ranks of a node may take; else training waits until all is written."""
PATIENCE = timedelta(days=1)
"""For the slowest rank's writing, and for copies to and from a store."""


class Saver(CheckpointSaver):
    """Takes the place of Composer's saver, and of its arguments of the same names.

    A checkpoint is complete or absent, whatever happens; the next one, and the end of training, wait for it.

    Attributes:
        completed: called on rank 0 with the path or URI of each complete checkpoint, from another thread.
    """

    def __init__(
        self, place: SaveFolder, interval: Any, keep: int, ignore_keys: list[str] | None, base_model: str | None
    ) -> None:
        folder = str(place.local)
        super().__init__(folder, save_interval=interval, ignore_keys=ignore_keys, remote_file_name=None)
        self.folder = folder  # which Composer has taken for a URI: '#' and '?' would end it
        self.place, self.keep, self.base_model = place, keep, base_model
        self.completed: list[Callable[[str], None]] = []
        self._group = patient_group()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def init(self, state: State, logger: Logger) -> None:
        """A file that is trained by hand may leave the MLflow run's id to Composer, which knows it by now."""
        super().init(state, logger)
        if not self.place.is_remote:
            self.place = SaveFolder(self.folder)

    def fit_start(self, state: State, logger: Logger) -> None:
        """A run that goes on has the checkpoint of this batch: at the end of an epoch it would be saved once more."""
        if int(state.timestamp.batch):
            self.last_checkpoint_batch = state.timestamp.batch

    def batch_end(self, state: State, logger: Logger) -> None:
        """A checkpoint that could not be written ends the run."""
        self._raise()

    def fit_end(self, state: State, logger: Logger) -> None:
        """All is written before training is said to be over."""
        self.wait()

    def close(self, state: State, logger: Logger) -> None:
        """All is written before the process ends."""
        self.wait()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what is complete is on the disk."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is nothing to load."""

    def wait(self) -> None:
        """Until the checkpoint before is complete.

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
        self.wait()
        self.last_checkpoint_batch = state.timestamp.batch
        folder = Path(self.folder, checkpoint_name(state.timestamp))
        last = state.get_elapsed_duration()
        content = self._content(state)
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
            content.pop("rng", None)  # the first rank has everybody's
        return content

    def _write(self, staged: Staged) -> None:
        first = dist.get_global_rank() == 0
        try:
            write_checkpoint(staged, self.place, self._exchange, first)
        except Exception as error:  # of another rank's death, too: raised where training looks
            self._error = error
            return
        if not first:
            return
        try:
            for tell in self.completed:
                tell(f"{self.place.address}/{staged.folder.name}")
            if self.keep > 0 and not self.place.is_remote:
                self.place.keep_newest(self.keep)
        except (CheckpointError, OSError):
            # It is complete; the next one tries to remove the old ones again.
            log.warning("Checkpoint %s is complete, but not all is done after it.", staged.folder, exc_info=True)

    def _exchange(self, given: Any) -> list[Any]:
        if self._group is None:
            return [given]
        found: list[Any] = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(found, given, group=self._group)
        return found


def checkpoint_name(timestamp: Timestamp) -> str:
    """`ep<epoch>-ba<batch>`."""
    return f"ep{int(timestamp.epoch)}-ba{int(timestamp.batch)}"


def patient_group() -> Any:
    """A process group of its own for what may take hours; None with one rank. Made by all ranks at once."""
    if dist.get_world_size() == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def _has_room(content: Any) -> bool:
    """Whether copies of every rank of this node fit into the memory that is free."""
    wanted = _bytes(content) * dist.get_local_world_size()
    return wanted <= COPY_SHARE * psutil.virtual_memory().available


def _bytes(content: Any) -> int:
    """Of all tensors on this rank."""
    if isinstance(content, dict):
        return sum(map(_bytes, content.values()))
    if isinstance(content, DTensor):
        return content.to_local().nbytes
    return content.nbytes if isinstance(content, torch.Tensor) else 0
