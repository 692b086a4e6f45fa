"""Stops a run early with a checkpoint, when a signal or the supervisor asks for it."""

import logging
import os
import signal
import sys
from types import FrameType
from typing import Any

import psutil
import torch
from composer import Callback, Logger, State
from composer.utils import dist

from tundish.base.run_folder import RunFolder
from tundish.launch.command import STOPPED
from tundish.tracking.publishing import Publisher
from tundish.train.saver import Saver, patient_group

log = logging.getLogger(__name__)


class StopWhenAsked(Callback):
    """After the current batch, saves a checkpoint and ends all ranks with exit code STOPPED.

    A cluster that preempts a run sends SIGTERM or SIGUSR1 to all of its processes; the supervisor, which may be the
    only one to get the signal, asks by a file.

    Args:
        run: its folder, where the file appears; None = signals only.
        publisher: uploads what was saved and logged; None on all ranks but the first.
    """

    def __init__(self, run: RunFolder | None, publisher: Publisher | None) -> None:
        self.run, self.publisher = run, publisher
        self._asked = False
        self._group = patient_group()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Handle signals from now on; before, there is nothing to save, and they end the process."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGUSR1, self._on_signal)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Look for a request after every batch; all ranks stop at the same one."""
        asked = self._asked or (dist.get_local_rank() == 0 and self.run is not None and self.run.stop_request.exists())
        done = state.get_elapsed_duration()
        # After the last batch, training ends by itself, with its own checkpoint.
        if not self._agreed(asked) or (done is not None and done >= 1):
            return
        for saver in (callback for callback in state.callbacks if isinstance(callback, Saver)):
            if saver.last_checkpoint_batch != state.timestamp.batch:
                saver.save_now(state, logger)
            saver.wait()
        if self.publisher is not None:
            self.publisher.finish(hurry=True)
        log.warning("Stopped after batch %s, as requested; the checkpoint is complete.", int(state.timestamp.batch))
        if self.run is not None and dist.get_global_rank() == 0:
            self.run.work.mkdir(exist_ok=True)
            self.run.stopped.touch()
        self._agreed(True)  # a barrier: no rank exits while another one still writes
        logging.shutdown()
        sys.stdout.flush()
        os._exit(STOPPED)  # closing the loggers would set the MLflow run to FINISHED

    def _agreed(self, asked: bool) -> bool:
        """Whether any rank was asked; called on all ranks."""
        if self._group is None:
            return asked
        any_asked = torch.tensor(int(asked))
        torch.distributed.all_reduce(any_asked, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(any_asked)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if _a_rank_has_exited():
            os._exit(128 + signal.SIGTERM)  # the launcher's own signal, to ranks that wait for one that crashed
        self._asked = True


def _a_rank_has_exited() -> bool:
    launcher: Any = psutil.Process().parent()
    return launcher is None or len(launcher.children()) < dist.get_local_world_size()
