"""Every error that tundish raises on purpose.

    TundishError
    ├── InputError (ValueError)        what the caller gave is wrong; `.problems` holds every problem found
    │   ├── SpecError                  an argument
    │   │   └── FolderExistsError      a folder to write that is there already
    │   └── DataError                  the training or evaluation data
    ├── RequestError (ValueError)      a call that makes no sense (cancel nothing, cancel two ways at once)
    ├── RunNotFoundError (LookupError) no run of that name
    ├── RunDamagedError (ValueError)   a file of a run's folder is damaged or of another program; `.path` is the file
    ├── LockHeldError (TimeoutError)   another process holds a lock for too long
    ├── StoreError (RuntimeError)      MLflow's tracking store, registry or artifact store cannot be used
    ├── CheckpointError (ValueError)   a checkpoint that is incomplete, damaged or unsafe to read
    └── StageError (RuntimeError)      a stage of a run ended without its result; `.log_path` says more
        └── WorkerError                a process that handles what others wrote has ended, or took too much
    KeyboardInterrupt
    └── Interrupted                    Ctrl-C when a run had been started; `.run_name` goes on

Messages say: where – what was found – what is allowed – what to do; secrets are masked in all of them. The
`DatabricksGenAI…` names at the end are aliases, so that `except` clauses written for the original client still work
after its import line is changed.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tundish.base.text import redacted


class TundishError(Exception):
    """Base of all errors of tundish; `.message` is the whole text."""

    def __init__(self, message: str = "") -> None:
        self.message = redacted(message)
        super().__init__(self.message)


class InputError(TundishError, ValueError):
    """What the caller gave is wrong. `.problems` lists all problems of the call, one sentence or two each."""

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = tuple(map(redacted, (problems,) if isinstance(problems, str) else problems))
        super().__init__(_join(self.problems))

    def __reduce__(self) -> tuple[type["InputError"], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class SpecError(InputError):
    """An argument of `create()` is wrong."""


class FolderExistsError(SpecError):
    """A folder that is to be written is there already."""


class DataError(InputError):
    """The training or evaluation data is wrong."""


class RequestError(TundishError, ValueError):
    """A call that contradicts itself or names nothing."""


class RunNotFoundError(TundishError, LookupError):
    """There is no run of that name."""


class RunDamagedError(TundishError, ValueError):
    """A file of a run's folder cannot be read, or holds something else than it must. `.path` is the file."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple[type["RunDamagedError"], tuple[str, Path]]:
        return type(self), (self.message, self.path)


class LockHeldError(TundishError, TimeoutError):
    """Another process holds a lock, and did not let go of it in time."""


class StoreError(TundishError, RuntimeError):
    """A store of MLflow's cannot be used. `.found` names it and says why, `.advice` what to do."""

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(f"{found}. {advice}")
        self.found, self.advice = redacted(found), advice

    def __reduce__(self) -> tuple[type["StoreError"], tuple[str, str]]:
        return type(self), (self.found, self.advice)


class CheckpointError(TundishError, ValueError):
    """A checkpoint is incomplete, damaged, or holds what may not be loaded."""


class StageError(TundishError, RuntimeError):
    """A stage of a run failed. `.log_path` is the file to read, or None."""

    def __init__(self, message: str, log_path: str | None = None) -> None:
        super().__init__(message)
        self.log_path = log_path

    def __reduce__(self) -> tuple[type["StageError"], tuple[str, str | None]]:
        return type(self), (self.message, self.log_path)


class WorkerError(StageError):
    """A process that handles what others wrote has ended, or took more time or memory than it may."""

    def __init__(self, message: str, what: object = None, cause: str = "") -> None:
        super().__init__(message)
        self.what = what
        """It was at; None where that has nothing to do with it."""
        self.cause = cause
        """What it did, behind `what`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.what, self.cause)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a run that has been started is waited for; it goes on."""

    def __init__(self, run_name: str) -> None:
        super().__init__(f"Run {run_name} goes on.")
        self.run_name = run_name


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A sentence with what may have been meant, to put behind another one; empty when nothing is near."""
    near = difflib.get_close_matches(given, list(known), n=3)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _join(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return "\n".join([f"{len(problems)} problems:", *(f"  - {problem}" for problem in problems)])


DatabricksGenAIError = TundishError
DatabricksModelTrainingRequestError = RequestError
DatabricksGenAIResponseError = RunNotFoundError
DatabricksGenAIConfigError = SpecError
ValidationError = InputError
