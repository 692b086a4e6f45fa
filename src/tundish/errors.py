"""Every error that tundish raises on purpose.

    TundishError
    ├── InputError (ValueError)        what the caller gave is wrong; `.problems` lists every problem
    │   ├── SpecError                  an argument
    │   │   └── FolderExistsError      a folder to write exists already
    │   └── DataError                  the training or evaluation data
    ├── RequestError (ValueError)      a call that contradicts itself (cancel nothing, cancel two ways at once)
    ├── RunNotFoundError (LookupError) no run of that name
    ├── RunDamagedError (ValueError)   a file in a run's folder is damaged or foreign; `.path` is the file
    ├── LockHeldError (TimeoutError)   another process did not release a lock in time
    ├── StoreError (RuntimeError)      MLflow's tracking store, registry or artifact store cannot be used
    ├── CheckpointError (ValueError)   a checkpoint that is incomplete, damaged or unsafe to read
    └── StageError (RuntimeError)      a stage of a run failed; `.log_path` is its log
        └── WorkerError                a process that handles foreign data exited, or used too much time or memory
    KeyboardInterrupt
    └── Interrupted                    Ctrl-C after a run was started; `.run_name` continues

Messages read `where: what is wrong; what is expected. What to do.` Secrets are masked in all of them. The
`DatabricksGenAI…` names at the end are aliases: `except` clauses written for the original client still work after its
import line is changed.
"""

import difflib
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from tundish.base.text import redacted


class FailureCause(StrEnum):
    """Why a run failed; the message of its FAILED event says it in words."""

    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    """Of a GPU."""
    HOST_OUT_OF_MEMORY = "HOST_OUT_OF_MEMORY"
    GATED_MODEL = "GATED_MODEL"
    """The model hub refuses access."""
    HUB_UNREACHABLE = "HUB_UNREACHABLE"
    DISK_FULL = "DISK_FULL"
    SHARED_MEMORY_FULL = "SHARED_MEMORY_FULL"
    TOO_MANY_FILES = "TOO_MANY_FILES"
    """The limit of open files was reached."""
    PORT_IN_USE = "PORT_IN_USE"
    DRIVER_TOO_OLD = "DRIVER_TOO_OLD"
    RANKS_DISCONNECTED = "RANKS_DISCONNECTED"
    NODE_LOST = "NODE_LOST"
    """A machine no longer answers, or its scheduler reports it as failed."""
    BAD_DATA = "BAD_DATA"
    """The training or evaluation data."""
    BAD_MODEL = "BAD_MODEL"
    """Files of the model that is trained are missing or damaged."""
    BAD_CHECKPOINT = "BAD_CHECKPOINT"
    """A checkpoint is missing, incomplete, damaged or unsafe to read."""
    BAD_INPUT = "BAD_INPUT"
    """Something else that an argument names is missing, or no longer what it was at `create()`."""
    MODEL_MISMATCH = "MODEL_MISMATCH"
    """A checkpoint is of another model."""
    DIVERGED = "DIVERGED"
    """The loss is not a finite number above 0."""
    NOTHING_LEARNED = "NOTHING_LEARNED"
    """Training changed no weight."""
    MLFLOW_UNREACHABLE = "MLFLOW_UNREACHABLE"
    """MLflow's store or registry does not answer, or refuses."""
    REGISTRATION_FAILED = "REGISTRATION_FAILED"
    """The registry took the model and did not make it ready."""
    SPARK_FAILED = "SPARK_FAILED"
    """The Spark cluster could not be reached, or could not prepare the data."""
    TIME_LIMIT = "TIME_LIMIT"
    """The scheduler's limit came before the run could save its progress."""
    PREEMPTED = "PREEMPTED"
    KILLED = "KILLED"
    """A process of the run was killed from outside, often by the out-of-memory killer."""
    CRASHED = "CRASHED"
    """A process of the run crashed, for example with SIGSEGV."""
    RUN_DAMAGED = "RUN_DAMAGED"
    """A file of the run's folder is damaged."""
    UNKNOWN = "UNKNOWN"
    """See the message and the log that it names."""

    @classmethod
    def of(cls, value: object) -> "FailureCause":
        """The cause that a file names; UNKNOWN for one that only a newer version knows."""
        return cls(value) if isinstance(value, str) and value in cls.__members__ else cls.UNKNOWN


class TundishError(Exception):
    """Base of all errors of tundish; `.message` is the whole text.

    `.failure` is the cause of a run that fails with this error: the one given, or the default of its class.
    """

    failure: FailureCause = FailureCause.UNKNOWN

    def __init__(self, message: str = "", *, failure: FailureCause | None = None) -> None:
        self.message = redacted(message)
        self.failure = failure or type(self).failure
        super().__init__(self.message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message,), {"failure": self.failure}


class InputError(TundishError, ValueError):
    """What the caller gave is wrong. `.problems` lists all problems of the call, one sentence or two each."""

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = tuple(map(redacted, (problems,) if isinstance(problems, str) else problems))
        super().__init__(_join(self.problems))

    def __reduce__(self) -> tuple[type["InputError"], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class SpecError(InputError):
    """An argument of `create()` is wrong."""

    failure: FailureCause = FailureCause.BAD_INPUT


class FolderExistsError(SpecError):
    """A folder that is to be written exists already."""


class DataError(InputError):
    """The training or evaluation data is wrong."""

    failure: FailureCause = FailureCause.BAD_DATA


class RequestError(TundishError, ValueError):
    """A call that contradicts itself or names nothing."""


class RunNotFoundError(TundishError, LookupError):
    """There is no run of that name."""


class RunDamagedError(TundishError, ValueError):
    """A file in a run's folder cannot be read, or its content is not what tundish wrote. `.path` is the file."""

    failure: FailureCause = FailureCause.RUN_DAMAGED

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple[type["RunDamagedError"], tuple[str, Path]]:
        return type(self), (self.message, self.path)


class LockHeldError(TundishError, TimeoutError):
    """Another process holds a lock and did not release it in time."""


class StoreError(TundishError, RuntimeError):
    """A store of MLflow cannot be used. `.found` names it and the reason, `.advice` what to do."""

    failure: FailureCause = FailureCause.MLFLOW_UNREACHABLE

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(f"{found}. {advice}")
        self.found, self.advice = redacted(found), advice

    def __reduce__(self) -> tuple[type["StoreError"], tuple[str, str]]:
        return type(self), (self.found, self.advice)


class CheckpointError(TundishError, ValueError):
    """A checkpoint is incomplete, damaged, or holds what may not be loaded."""

    failure: FailureCause = FailureCause.BAD_CHECKPOINT


class StageError(TundishError, RuntimeError):
    """A stage of a run failed. `.log_path` is its log, or None."""

    def __init__(self, message: str, log_path: str | None = None, *, failure: FailureCause | None = None) -> None:
        super().__init__(message, failure=failure)
        self.log_path = log_path

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.log_path), {"failure": self.failure}


class WorkerError(StageError):
    """A process that handles foreign data exited, or used more time or memory than it may."""

    failure: FailureCause = FailureCause.BAD_DATA

    def __init__(
        self, message: str, what: object = None, cause: str = "", *, failure: FailureCause | None = None
    ) -> None:
        super().__init__(message, failure=failure)
        self.what = what
        """What it was working on; None if that did not cause the failure."""
        self.cause = cause
        """What happened, as the rest of a sentence that begins with `what`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.what, self.cause), {"failure": self.failure}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while waiting for a run that was started; the run continues."""

    def __init__(self, run_name: str) -> None:
        super().__init__(f"Run {run_name} continues.")
        self.run_name = run_name


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A sentence with the known names nearest to `given`, to append to another one; empty if none is near."""
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
