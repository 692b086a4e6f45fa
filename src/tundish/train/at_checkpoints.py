"""Base of the callbacks that act when a checkpoint is complete: after Composer's saver, on every rank."""

from pathlib import Path

from composer import Callback, Logger, State
from composer.callbacks import CheckpointSaver


class AtCheckpoints(Callback):
    """Calls `checkpoint_saved` after each checkpoint that Composer's saver has written."""

    def __init__(self) -> None:
        self._seen_batch: int | None = None

    def checkpoint_saved(self, state: State, logger: Logger, folder: Path) -> None:
        """The checkpoint in `folder` is written by all ranks."""
        raise TypeError(f"{type(self).__name__} must say what it does at a checkpoint")

    def fit_start(self, state: State, logger: Logger) -> None:
        """Go behind the saver, which LLM Foundry sorts to the end."""
        state.callbacks = [callback for callback in state.callbacks if callback is not self] + [self]
        if int(state.timestamp.batch):
            # A run that goes on has the checkpoint of this batch: at the end of an epoch, Composer would save another.
            self._seen_batch = int(state.timestamp.batch)
            for callback in state.callbacks:
                if isinstance(callback, CheckpointSaver):
                    callback.last_checkpoint_batch = state.timestamp.batch

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Composer has just saved, or not."""
        self._look(state, logger)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Composer has just saved, or not."""
        self._look(state, logger)

    def _look(self, state: State, logger: Logger) -> None:
        saver = next((callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)), None)
        batch = state.timestamp.batch
        if saver is None or saver.last_checkpoint_batch != batch or self._seen_batch == batch:
            return
        self._seen_batch = int(batch)
        saved = list(saver.all_saved_checkpoints_to_timestamp)
        self.checkpoint_saved(state, logger, Path(saved[-1]).parent)
