"""Base of the callbacks that act on the state that goes into a checkpoint: after the saver, on every rank."""

from composer import Callback, Logger, State
from composer.callbacks import CheckpointSaver


class AtCheckpoints(Callback):
    """Calls `at_checkpoint` after each batch whose state is saved, tundish's saver or Composer's."""

    def __init__(self) -> None:
        self._seen_batch: int | None = None

    def at_checkpoint(self, state: State, logger: Logger) -> None:
        """The state is being written, or is written."""
        raise TypeError(f"{type(self).__name__} must say what it does at a checkpoint")

    def fit_start(self, state: State, logger: Logger) -> None:
        """Go behind the saver, which LLM Foundry sorts to the end."""
        state.callbacks = [callback for callback in state.callbacks if callback is not self] + [self]
        if int(state.timestamp.batch):
            self._seen_batch = int(state.timestamp.batch)  # before the run was killed

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Saved, or not."""
        self._look(state, logger)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Saved, or not."""
        self._look(state, logger)

    def _look(self, state: State, logger: Logger) -> None:
        saver = next((callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)), None)
        batch = state.timestamp.batch
        if saver is not None and saver.last_checkpoint_batch == batch and self._seen_batch != batch:
            self._seen_batch = int(batch)
            self.at_checkpoint(state, logger)
