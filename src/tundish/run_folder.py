"""What the files in a run's folder say: the one place where they are read back.

A file that cannot be read, was cut off, or is of another program or a newer version, is a RunDamagedError that names
it; what a run's own processes have written is never doubted silently.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tundish import events
from tundish.errors import RunDamagedError, RunNotFoundError
from tundish.events import Event
from tundish.paths import RunPaths, write_atomic
from tundish.processes import ProcessId
from tundish.spec import NewerSpecError, RunSpec
from tundish.stored import RECORD_BYTES, parse, read_object, read_regular

BEAT_BYTES = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracking:
    """What `create()` has made in MLflow."""

    tracking_uri: str
    experiment_id: str
    experiment_name: str
    run_id: str
    save_folder: str
    """Where the checkpoints go: `<artifacts>/<run_name>/checkpoints`."""
    registry_uri: str | None = None
    """The model registry; None: the tracking store is it."""
    model_path: str = "model"
    """Among the run's artifacts, of the model that is registered; another one after each change of the duration."""

    @property
    def environment(self) -> dict[str, str]:
        """With this, Composer's logger goes on with the run that `create()` has made."""
        return {
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "MLFLOW_EXPERIMENT_ID": self.experiment_id,
            "MLFLOW_RUN_ID": self.run_id,
        }

    def write(self, paths: RunPaths) -> None:
        """Keep it in the run folder."""
        write_atomic(paths.result("tracking"), json.dumps(asdict(self), indent=2) + "\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """A rank's sign of life."""

    host: str
    count: int
    """Of beats: another one each time."""
    moves: int
    """Another one each time the rank comes forward."""
    batch: int
    """The one that it is at, from 0."""
    doing: str
    """With the batch: starting, reading, training, or finishing."""
    usual_s: float
    """Of a step, the median of the last ones."""

    @staticmethod
    def file(folder: Path, rank: int) -> Path:
        """Where the rank writes it."""
        return folder / f"rank{rank}"

    @classmethod
    def read_all(cls, folder: Path) -> "dict[int, Beat]":
        """The latest of each rank that is at work."""
        found: dict[int, Beat] = {}
        for path in folder.glob("rank*"):
            with suppress(OSError, ValueError, TypeError):  # its rank has just ended, or writes the first one
                found[int(path.name.removeprefix("rank"))] = parse(cls, read_object(path))
        return found

    def write(self, path: Path) -> None:
        """Over the one before, of the same length, at once: disks that are shared by many ranks have little to do."""
        text = json.dumps(asdict(self)).ljust(BEAT_BYTES - 1) + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, text.encode(), 0)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """What Slurm calls the supervisor of a run."""

    job: str


SUPERVISORS: dict[str, type[ProcessId] | type[SlurmJob]] = {"local": ProcessId, "slurm": SlurmJob}
"""What `supervisor.json` holds, by launcher."""


class RunFolder(RunPaths):
    """The folder of a run: every name in it, and what the files say.

    All readers raise RunDamagedError, or RunNotFoundError where the folder is gone.
    """

    __slots__ = ()

    def check(self) -> None:
        """Make sure that it is a folder: what is done to a run must not be done to a file, or to what a link names.

        Raises:
            RunDamagedError: it is something else.
        """
        if not os.path.isdir(self.folder):
            raise RunDamagedError(f"{self.folder}: is not a folder, as a run is. Move it elsewhere.", self.folder)

    def read_spec(self) -> RunSpec:
        """The checked arguments."""
        with self._reading(self.spec, "Restore it"):
            spec = RunSpec.from_json(read_regular(self.spec, RECORD_BYTES))
            if spec.run_name != self.folder.name:
                raise ValueError(f"is of the run {spec.run_name!r}: this folder was copied, or renamed from it")
        return spec

    def read_tracking(self) -> Tracking:
        """What `create()` has made in MLflow."""
        path = self.result("tracking")
        with self._reading(path, "Restore it"):
            return parse(Tracking, read_object(path))

    def read_supervisor(self) -> tuple[str, ProcessId | SlurmJob] | None:
        """The run's launcher, and what its supervisor is called there; None before it was submitted."""
        with self._reading(self.supervisor, f"Remove it, then `tundish resume {self.folder.name}`"):
            try:
                record = read_object(self.supervisor)
            except FileNotFoundError:
                return None
            launcher = record.pop("launcher", None)
            if not isinstance(launcher, str) or launcher not in SUPERVISORS:
                known = " and ".join(SUPERVISORS)
                raise ValueError(f"names the launcher {launcher!r}; this version of tundish has {known}")
            return launcher, parse(SUPERVISORS[launcher], record)

    def read_result(self, stage: str) -> dict[str, Any] | None:
        """What a stage found, or its `error`; None before it has ended."""
        path = self.result(stage)
        with self._reading(path, f"Remove it, then `tundish resume {self.folder.name}` does the stage again"):
            try:
                return read_object(path)
            except FileNotFoundError:
                return None

    def read_events(self) -> list[Event]:
        """All events in order, of TRAIN_UPDATED only the latest; there is one at least."""
        with self._reading(self.events, "Remove what is no event from it"):
            if not (found := events.read(self.events)):
                self.events.stat()
                raise ValueError("holds no event")
        return found

    def read_doing(self) -> str:
        """How far the stage that runs is; empty where none says so."""
        try:
            return read_regular(self.doing, RECORD_BYTES).decode()
        except (OSError, ValueError):
            return ""

    @contextmanager
    def _reading(self, path: Path, advice: str) -> Iterator[None]:
        """Make one error of all that can be wrong with a file.

        Raises:
            RunNotFoundError: the folder is gone.
            RunDamagedError: what is wrong, and the advice or another way out.
        """
        try:
            yield
        except NewerSpecError as error:
            raise RunDamagedError(f"{path}: {error}. Upgrade tundish to use this run.", path) from error
        except PermissionError as error:
            text = f"{path}: may not be read by you. Ask its owner, or correct the permissions of {self.folder}."
            raise RunDamagedError(text, path) from error
        except (OSError, ValueError) as error:
            if not os.path.lexists(self.folder):
                raise RunNotFoundError(f"there is no run {self.folder.name!r} in {self.folder.parent}.") from error
            self.check()
            what = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
            if isinstance(error, FileNotFoundError):
                what, advice = "is missing", "Restore it"
            raise RunDamagedError(f"{path}: {what}. {advice}, or move {self.folder} elsewhere.", path) from error
