"""`tundish doctor`: what this machine and its surroundings lack for a run, in a few seconds.

The checks run at the same time, each in a thread of its own that nobody waits for longer than `SECONDS`: a server that
hangs costs one line of the report.
"""

import threading
import time
from collections.abc import Callable, Mapping

from tundish.base.mlflow_client import impatient
from tundish.doctor import machine, packages, services
from tundish.doctor.finding import Finding

SECONDS = 15.0
CHECKS: Mapping[str, Callable[[], Finding]] = {
    "devices": machine.devices,
    "NVIDIA driver": machine.driver,
    "torch": packages.torch,
    "flash-attn": packages.flash_attention,
    "packages": packages.packages,
    "shared memory": machine.shared_memory,
    "TUNDISH_HOME": machine.home,
    "open files": machine.open_files,
    "MLflow": services.mlflow,
    "model hub": services.hub,
    "Slurm": services.slurm,
}


def examine(checks: Mapping[str, Callable[[], Finding]] = CHECKS, seconds: float = SECONDS) -> list[Finding]:
    """What the checks find, in their order; one that fails or takes longer than `seconds` is a problem of its own."""
    found: dict[str, Finding] = {}
    # Daemons: one that hangs does not keep the command from ending.
    threads = {
        name: threading.Thread(target=_run, args=(name, check, found), daemon=True) for name, check in checks.items()
    }
    end = time.monotonic() + seconds
    with impatient(seconds=3, retries=0):
        for thread in threads.values():
            thread.start()
        for thread in threads.values():
            thread.join(max(0.0, end - time.monotonic()))
    late = f"no answer within {seconds:g} s"
    return [
        found.get(name, Finding(name, "problem", late, "Look for a server, a disk or a driver that hangs.")).redacted()
        for name in checks
    ]


def _run(name: str, check: Callable[[], Finding], found: dict[str, Finding]) -> None:
    try:
        found[name] = check()
    except Exception as error:
        advice = "This is a mistake of tundish, or of what it asked; the other lines hold."
        found[name] = Finding(name, "problem", f"the check failed ({type(error).__name__}: {error})", advice)
