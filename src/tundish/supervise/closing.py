"""Closes a run's MLflow run: `python -m tundish.supervise.closing RUN_FOLDER STATUS [--if-ended]`.

In a process of its own, since MLflow takes seconds to load, and a store that is down must hold up neither the
supervisor nor `cancel()`.
"""

import sys
from pathlib import Path

from tundish.base.files import locked
from tundish.base.run_folder import RunFolder


def close_command(run: RunFolder, status: str, *, if_ended: bool = False) -> list[str]:
    """What starts the process.

    Args:
        run: its folder.
        status: of MLflow's: FINISHED, FAILED or KILLED.
        if_ended: whether nothing is done if the run was resumed meanwhile.
    """
    command = [sys.executable, "-m", "tundish.supervise.closing", str(run.folder), status]
    return [*command, "--if-ended"] if if_ended else command


def main(folder: str, status: str, *options: str) -> None:
    """Close the MLflow run."""
    run = RunFolder(Path(folder))
    if "--if-ended" not in options:
        _close(run, status)
        return
    with locked(run.folder):  # as resume() does
        if run.has_ended():
            _close(run, status)


def _close(run: RunFolder, status: str) -> None:
    from tundish.base.mlflow_client import impatient
    from tundish.tracking.experiment import end_tracking
    from tundish.tracking.notes import log_files
    from tundish.tracking.publishing import Checkpoints, Publisher, channels

    with impatient(seconds=5, retries=0):
        # Metrics that MLflow does not have yet, but no checkpoints: their upload may take hours.
        Publisher([channel for channel in channels(run) if not isinstance(channel, Checkpoints)], None).attempt()
        end_tracking(run.read_tracking(), status)
    log_files(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
