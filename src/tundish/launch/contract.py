"""What every launcher offers, and what it reports about a run.

A launcher starts the supervisor of a run, knows whether it is alive, and ends it. It is a module with the functions of
`Launcher`; `tundish.launch` lists them. All other modules use launchers through this contract and know none by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from signal import Signals
from typing import Any, Literal, Protocol

from tundish.base.run_folder import RunFolder
from tundish.errors import FailureCause
from tundish.plan.compute import Compute


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """Whether a run is alive, as its launcher sees it."""

    alive: bool
    """It runs, or waits to be started."""
    waiting: str = ""
    """What it waits for, in a sentence; empty once it has started."""
    unknown: str = ""
    """Why its state cannot be determined now."""
    end: str = ""
    """How it ended without recording an end of its own, where the launcher knows."""
    cause: FailureCause = FailureCause.UNKNOWN
    """Why it ended so."""
    canceled: bool = False
    """It was canceled by the launcher's own means."""


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the service that a launcher needs works."""

    state: Literal["ok", "problem", "absent"]
    """`absent`: this machine has no such service."""
    text: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Restart:
    """How a launcher restarts a run that was stopped."""

    reason: str
    """What stopped the run and who restarts it, in two sentences."""
    request: Callable[[], None]
    """Asks for the restart; it may end this process. Raises RequestError where it is refused."""


class Launcher(Protocol):
    """The functions of a launcher's module."""

    @property
    def RECORD(self) -> type[Any]:
        """The dataclass that identifies a supervisor in `supervisor.json`."""
        ...

    @property
    def STARTS_ALL_NODES(self) -> bool:
        """Whether it starts a run on several nodes by itself; otherwise people start a script on each."""
        ...

    @property
    def SERVICE(self) -> str:
        """The name of the service that it needs, for people; empty = none."""
        ...

    def health(self) -> Health:
        """Ask the service, for at most a few seconds; called where SERVICE is not empty."""
        ...

    def problems(self, compute: Compute) -> list[str]:
        """What `compute` asks for and this launcher, from this machine, cannot give."""
        ...

    def submit(self, run: RunFolder, compute: Compute) -> None:
        """Start the run's supervisor, now or when its turn comes, and record it.

        Raises:
            SpecError: the launcher refuses.
        """
        ...

    def record_supervisor(self, run: RunFolder, compute: Compute) -> None:
        """Record this process as the run's supervisor: the process that submitted it may have been killed first."""
        ...

    def adopt(self, run: RunFolder) -> None:
        """Record a supervisor that was submitted for this run but never recorded."""
        ...

    def may_have(self, run: RunFolder) -> bool:
        """Whether a supervisor was submitted for this run, or may have been, though none is recorded."""
        ...

    def state(self, run: RunFolder, record: Any) -> Life:
        """Whether the recorded supervisor is alive."""
        ...

    def cancel(self, run: RunFolder, record: Any, seconds: float) -> None:
        """End the recorded supervisor, and everything that it has started, within so many seconds.

        Raises:
            RequestError: it cannot be ended from this machine.
        """
        ...

    def wait_for_devices(self, run: RunFolder) -> Sequence[str]:
        """Wait until the run may use its devices; their names for CUDA_VISIBLE_DEVICES, empty = all that are visible.

        Called by the supervisor before the first stage.
        """
        ...

    def release_devices(self, run: RunFolder) -> None:
        """Give up the run's devices, or its place in the queue for them."""
        ...

    def restart(self, stopped_by: Signals, *, progressed: bool) -> Restart | None:
        """How a run whose supervisor got this signal is restarted; None = its user resumes it.

        Args:
            stopped_by: SIGTERM or SIGUSR1.
            progressed: whether a stage or a checkpoint was completed since the supervisor started.

        Raises:
            StageError: a restart would be in vain.
        """
        ...

    def scripts(
        self, compute: Compute, run: RunFolder, address: str | None, port: int, environment: Mapping[str, str]
    ) -> dict[str, str]:
        """What starts the run, by file name.

        Args:
            compute: where to train.
            run: its folder.
            address: of the first host, for the others; None where there are none.
            port: of the first host.
            environment: of the ranks, beside what every rank gets.
        """
        ...
