"""The logger of a run that a supervisor has started: everything goes to the run's disk, and from there to MLflow.

It takes the place of Composer's MLFlowLogger, which the same YAML has under the stock `llmfoundry train`.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from composer import Logger, State
from composer.loggers import LoggerDestination
from composer.utils import dist

from tundish.base.files import make_folder, write_atomic
from tundish.base.journal import Journal
from tundish.base.run_folder import RunFolder
from tundish.base.text import redacted

log = logging.getLogger(__name__)

SAMPLE_SECONDS, SAMPLES = 5.0, 6
"""System metrics are the mean of so many samples."""


class RunLogger(LoggerDestination):
    """Rank 0's words; other ranks have none.

    Args:
        paths: of the run.
        system_metrics: whether the load of the machine is logged, too.
    """

    def __init__(self, paths: RunFolder, system_metrics: bool) -> None:
        self.paths, self.system_metrics = paths, system_metrics
        self._metrics, self._artifacts = Journal(paths.metrics), Journal(paths.artifacts_journal)
        self._ends = threading.Event()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Training begins."""
        if self.system_metrics and dist.get_global_rank() == 0:
            threading.Thread(target=self._watch, daemon=True, name="system metrics").start()

    def close(self, state: State, logger: Logger) -> None:
        """Training is over."""
        self._ends.set()

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Note a point of each metric."""
        if dist.get_global_rank() == 0 and metrics:
            values = {name: float(value) for name, value in metrics.items()}
            self._note(self._metrics, {"time": int(time.time() * 1000), "step": step or 0, "metrics": values})

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Note params."""
        if dist.get_global_rank() == 0 and hyperparameters:
            params = {name: redacted(str(value)) for name, value in hyperparameters.items()}
            self._note(self._artifacts, {"params": params})

    def log_table(
        self, columns: list[str], rows: list[list[Any]], name: str = "Table", step: int | None = None
    ) -> None:
        """Note rows; those of one name become one table."""
        if dist.get_global_rank() == 0:
            self._note(self._artifacts, {"table": f"{name}.json", "columns": columns, "rows": rows})

    def log_text(self, text: str, name: str) -> None:
        """Note a file; called on rank 0."""
        with _unimportant():
            make_folder(self.paths.artifacts)
            write_atomic(self.paths.artifacts / name, text)
        self._note(self._artifacts, {"file": name})

    def _note(self, journal: Journal, record: dict[str, Any]) -> None:
        with _unimportant():
            journal.append(record)

    def _watch(self) -> None:
        monitors, step = _monitors(), self._next_step()
        while not self._ends.is_set():
            for _ in range(SAMPLES):
                for monitor in monitors:
                    monitor.collect_metrics()
                if self._ends.wait(SAMPLE_SECONDS):
                    return
            found = {f"system/{name}": value for one in monitors for name, value in one.aggregate_metrics().items()}
            self.log_metrics(found, step)
            step += 1
            for monitor in monitors:
                monitor.clear_metrics()

    def _next_step(self) -> int:
        """Of the system metrics: a run that goes on continues their line."""
        if not self.paths.metrics.exists():
            return 0
        with open(self.paths.metrics, "rb") as file:
            return sum(b'"system/' in line for line in file)


def _monitors() -> Sequence[Any]:
    """MLflow's own, without the part that asks the server at every sample."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    found: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        with contextlib.suppress(Exception):  # there is none of the kind, or its package is not installed
            found.append(kind())
    return found


@contextlib.contextmanager
def _unimportant() -> Iterator[None]:
    """A full disk ends a run by its checkpoints, not by a point of a curve."""
    try:
        yield
    except OSError:
        log.warning("Something for MLflow could not be written to the run's disk, and is lost.", exc_info=True)
