"""Ranks that end before their time save a checkpoint first, when they are asked: by a signal or by the supervisor."""

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
    """After the batch in which it is asked, saves a checkpoint and ends all ranks with exit code STOPPED.

    A cluster that preempts a run sends SIGTERM or SIGUSR1 to all of its processes; the supervisor, which may get the
    signal alone, asks by a file.

    Args:
        paths: of the run that the supervisor has; None = signals only.
        publisher: sends on what was saved and logged; None = another rank's.
    """

    def __init__(self, paths: RunFolder | None, publisher: Publisher | None) -> None:
        self.paths, self.publisher = paths, publisher
        self._asked = False
        self._group = patient_group()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Before, there is nothing to save, and a signal ends the process at once."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGUSR1, self._on_signal)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """All ranks look after every batch, and stop at the same one."""
        asked = self._asked or (
            dist.get_local_rank() == 0 and self.paths is not None and self.paths.stop_request.exists()
        )
        done = state.get_elapsed_duration()
        if not self._agreed(asked) or (done is not None and done >= 1):
            return
        for saver in (callback for callback in state.callbacks if isinstance(callback, Saver)):
            if saver.last_checkpoint_batch != state.timestamp.batch:
                saver.save_now(state, logger)
            saver.wait()
        if self.publisher is not None:
            self.publisher.finish(hurry=True)
        log.warning("Stopped after batch %s, as asked; the checkpoint is complete.", int(state.timestamp.batch))
        if self.paths is not None and dist.get_global_rank() == 0:
            self.paths.work.mkdir(exist_ok=True)
            self.paths.stopped.touch()
        self._agreed(True)  # nobody ends while another one still writes
        logging.shutdown()
        sys.stdout.flush()
        os._exit(STOPPED)  # closing the loggers would call the run finished

    def _agreed(self, asked: bool) -> bool:
        """Whether any rank was asked."""
        if self._group is None:
            return asked
        found = torch.tensor(int(asked))
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(found)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if _a_rank_is_gone():
            os._exit(128 + signal.SIGTERM)  # the launcher ends those that wait for a rank that has crashed
        self._asked = True


def _a_rank_is_gone() -> bool:
    launcher: Any = psutil.Process().parent()
    return launcher is None or len(launcher.children()) < dist.get_local_world_size()
