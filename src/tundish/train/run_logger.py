"""Metrics and artifacts of a run: written to its disk, and uploaded from there to MLflow while training continues.

Replaces Composer's MLFlowLogger, which the same YAML gets under the stock `llmfoundry train`: that one waits for the
server.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from composer import Callback, Logger, State
from composer.loggers import LoggerDestination
from composer.utils import dist

from tundish.base.files import make_folder, write_atomic
from tundish.base.journal import Journal
from tundish.base.run_folder import RunFolder
from tundish.base.text import redacted
from tundish.tracking.publishing import Publisher

log = logging.getLogger(__name__)

SAMPLE_SECONDS, SAMPLES = 5.0, 6
"""Seconds between samples of the system metrics, and how many of them make one point."""


class RunLogger(LoggerDestination):
    """Logs on rank 0 only.

    Args:
        run: the run's folder.
        system_metrics: whether to log the load of the machine, too.
    """

    def __init__(self, run: RunFolder, system_metrics: bool) -> None:
        self.run, self.system_metrics = run, system_metrics
        self._metrics, self._artifacts = Journal(run.metrics), Journal(run.artifacts_journal)
        self._ends = threading.Event()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start logging system metrics."""
        if self.system_metrics and dist.get_global_rank() == 0:
            threading.Thread(target=self._watch, daemon=True, name="system metrics").start()

    def close(self, state: State, logger: Logger) -> None:
        """Stop logging system metrics."""
        self._ends.set()

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log a point of each metric."""
        if dist.get_global_rank() == 0 and metrics:
            values = {name: float(value) for name, value in metrics.items()}
            self._append(self._metrics, {"time": int(time.time() * 1000), "step": step or 0, "metrics": values})

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Log params."""
        if dist.get_global_rank() == 0 and hyperparameters:
            params = {name: redacted(str(value)) for name, value in hyperparameters.items()}
            self._append(self._artifacts, {"params": params})

    def log_table(
        self, columns: list[str], rows: list[list[Any]], name: str = "Table", step: int | None = None
    ) -> None:
        """Log rows; those of one name are appended to one table."""
        if dist.get_global_rank() == 0:
            self._append(self._artifacts, {"table": f"{name}.json", "columns": columns, "rows": rows})

    def log_text(self, text: str, name: str) -> None:
        """Log a text file; called on rank 0."""
        with _optional():
            make_folder(self.run.artifacts)
            write_atomic(self.run.artifacts / name, text)
        self._append(self._artifacts, {"file": name})

    def _append(self, journal: Journal, record: dict[str, Any]) -> None:
        with _optional():
            journal.append(record)

    def _watch(self) -> None:
        monitors, step = _monitors(), self._next_step()
        while not self._ends.is_set():
            for _ in range(SAMPLES):
                for monitor in monitors:
                    monitor.collect_metrics()
                if self._ends.wait(SAMPLE_SECONDS):
                    return
            means = {
                f"system/{name}": mean for monitor in monitors for name, mean in monitor.aggregate_metrics().items()
            }
            self.log_metrics(means, step)
            step += 1
            for monitor in monitors:
                monitor.clear_metrics()

    def _next_step(self) -> int:
        """The next step of the system metrics: a run that resumes continues their count."""
        if not self.run.metrics.exists():
            return 0
        with open(self.run.metrics, "rb") as file:
            return sum(b'"system/' in line for line in file)


class PublishWhileTraining(Callback):
    """Uploads from the first batch until everything is closed; what is left then stays on the disk.

    Args:
        publisher: of the run.
    """

    def __init__(self, publisher: Publisher) -> None:
        self.publisher = publisher

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start uploading."""
        self.publisher.start()

    def post_close(self) -> None:
        """Upload the rest, now that all loggers are closed."""
        self.publisher.finish()


def _monitors() -> Sequence[Any]:
    """MLflow's own monitors, without their wrapper, which asks the server at every sample."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        with contextlib.suppress(Exception):  # no such GPU, or its package is not installed
            monitors.append(kind())
    return monitors


@contextlib.contextmanager
def _optional() -> Iterator[None]:
    # A full disk must end a run when a checkpoint fails, not when a point of a metric does.
    try:
        yield
    except OSError:
        log.warning("A metric or an artifact could not be written to the run's disk, and is lost.", exc_info=True)
