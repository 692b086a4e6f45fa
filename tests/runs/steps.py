"""`create()` that ends at a chosen step: what it does to files below `$TUNDISH_HOME`, to MLflow and to its launcher."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tundish.base.home import home
from tundish.runs import creating

CHANGES = frozenset({"os.mkdir", "os.rename", "subprocess.Popen"})
MLFLOW = ("create_run", "log_batch")


@dataclass
class Steps:
    """Counts, and does something at the step of a number."""

    at: int = 0
    """From 1; 0: by its name."""
    named: str | None = None
    """A part of it."""
    then: Callable[[str], None] = lambda step: None
    seen: int = 0

    def step(self, name: str) -> None:
        """One more."""
        self.seen += 1
        if self.seen == self.at or (self.named is not None and self.named in name):
            self.then(name)


_now: Steps | None = None
_hooked = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """A step is what changes files of the home; SQLite's own are MLflow's."""
    if _now is None:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    path = str(arguments[0]) if arguments else ""
    if (event in CHANGES and not (event == "os.mkdir" and os.path.isdir(path))) or writes:
        if event == "subprocess.Popen" or (path.startswith(str(home())) and "/mlflow/" not in path):
            _now.step(f"{event} {path}")


@contextmanager
def counted(steps: Steps) -> Iterator[Steps]:
    """The steps that are taken in a block."""
    from mlflow import MlflowClient

    global _now, _hooked
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True
    kept = {name: getattr(MlflowClient, name) for name in MLFLOW}

    def told(name: str, when: str) -> None:
        if _now is not None:
            _now.step(f"{when} {name}")

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            told(name, "before")
            result = kept[name](*given, **named)
            told(name, "after")
            return result

        return call

    for name in MLFLOW:
        setattr(MlflowClient, name, wrapped(name))
    _now = steps
    try:
        yield steps
    finally:
        _now = None
        for name, method in kept.items():
            setattr(MlflowClient, name, method)


def full(step: str) -> None:
    """The disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), step)


def kill(_: str) -> None:
    """`kill -9` of this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def accept_anything(given: dict[str, Any]) -> None:
    """From now on `create()` takes these arguments for checked ones: it is what comes after that is looked at."""
    plan = creating.check(given | {"run_name": "checked"})
    creating.check = lambda arguments, progress=None: replace(
        plan, spec=replace(plan.spec, run_name=arguments["run_name"])
    )
