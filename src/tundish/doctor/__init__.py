"""`tundish doctor`: what this machine and the services it uses are missing for a run, in a few seconds.

The checks run at the same time, each in its own thread with a timeout of `SECONDS`: a server that hangs costs one line
of the report.
"""

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial

from tundish.base.mlflow_client import impatient
from tundish.doctor import machine, packages, services
from tundish.doctor.finding import Finding
from tundish.launch import LAUNCHERS

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
    **{launcher.SERVICE: partial(services.launcher, launcher) for launcher in LAUNCHERS.values() if launcher.SERVICE},
}


def examine(checks: Mapping[str, Callable[[], Finding]] = CHECKS, seconds: float = SECONDS) -> list[Finding]:
    """The findings of the checks, in their order; a check that fails or takes longer than `seconds` is a problem."""
    findings: dict[str, Finding] = {}
    # Daemon threads: one that hangs does not keep the command from exiting.
    threads = {
        name: threading.Thread(target=_run, args=(name, check, findings), daemon=True) for name, check in checks.items()
    }
    end = time.monotonic() + seconds
    with impatient(seconds=3, retries=0):
        for thread in threads.values():
            thread.start()
        for thread in threads.values():
            thread.join(max(0.0, end - time.monotonic()))
    late = f"no answer within {seconds:g} s"
    return [
        findings.get(name, Finding(name, "problem", late, "A server, disk or driver may hang.")).redacted()
        for name in checks
    ]


def _run(name: str, check: Callable[[], Finding], findings: dict[str, Finding]) -> None:
    try:
        findings[name] = check()
    except Exception as error:
        advice = "This is a bug in tundish, or in what it asked; the other lines are valid."
        findings[name] = Finding(name, "problem", f"the check failed ({type(error).__name__}: {error})", advice)
