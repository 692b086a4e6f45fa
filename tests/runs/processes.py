"""The processes of a run, for tests that inspect or kill them."""

import json
import time
from collections.abc import Callable

import psutil

from tundish.base.processes import ProcessId, processes_with
from tundish.base.run_folder import RUN_VARIABLE, RunFolder


def supervisor(paths: RunFolder) -> psutil.Process | None:
    """The run's supervisor; None if it is not alive."""
    if not paths.supervisor.exists():
        return None
    record = json.loads(paths.supervisor.read_text())
    return ProcessId(**{name: value for name, value in record.items() if name != "launcher"}).process()


def ranks(paths: RunFolder) -> list[psutil.Process]:
    """The processes that train the run."""
    return [process for process in stages(paths) if "RANK" in _environment(process)]


def stages(paths: RunFolder) -> list[psutil.Process]:
    """The processes of the run's stage, including launcher and ranks."""
    return processes_with(RUN_VARIABLE, str(paths.events))


def wait_until(condition: Callable[[], object], seconds: float, pause: float = 0.1) -> None:
    """Return when the condition holds; fail after the time limit."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain"
        time.sleep(pause)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
