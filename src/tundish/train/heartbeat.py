"""Each rank's heartbeat and position, in a file of its own, by which the supervisor sees which rank hangs."""

import platform
import statistics
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from composer import Callback, Logger, State
from composer.utils import dist

from tundish.base.run_folder import Beat

BEAT_SECONDS = 2.0


class Heartbeat(Callback):
    """Writes a beat every BEAT_SECONDS, from a thread of its own: a rank that hangs in a step still beats.

    Args:
        folder: the beats of all ranks.
    """

    def __init__(self, folder: Path) -> None:
        self.file = Beat.file(folder, dist.get_global_rank())
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._batch, self._doing, self._moves = 0, "starting", 0
        self._began = 0.0
        self._seconds: deque[float] = deque(maxlen=16)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start beating: all ranks are connected."""
        self._batch = int(state.timestamp.batch)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """A step begins by reading its batch."""
        self._batch, self._began = int(state.timestamp.batch), time.monotonic()
        self._move("reading")

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """From here on, ranks wait for each other."""
        self._move("training")

    def batch_end(self, state: State, logger: Logger) -> None:
        """The step is done; evaluation, checkpoint and eval prompts may follow."""
        self._seconds.append(time.monotonic() - self._began)
        self._move("finishing")

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """Evaluation makes progress."""
        self._move("finishing")

    def close(self, state: State, logger: Logger) -> None:
        """Remove the beat: a rank that ends first does not hang."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(BEAT_SECONDS)  # or its last beat might be written after the file was removed
        with suppress(OSError):
            self.file.unlink()

    def _move(self, doing: str) -> None:
        self._doing, self._moves = doing, self._moves + 1

    def _beat(self) -> None:
        count, host = 0, platform.node() or "?"
        while not self._closed.is_set():
            usual = statistics.median(self._seconds) if self._seconds else 0.0
            beat = Beat(host=host, count=count, moves=self._moves, batch=self._batch, doing=self._doing, usual_s=usual)
            with suppress(OSError):  # a full or briefly unavailable disk must not end the heartbeat
                beat.write(self.file)
            count += 1
            self._closed.wait(BEAT_SECONDS)
