"""The folder of a run: the name of every file in it, and how those that tundish itself reads are read and written.

A file that cannot be read, was cut off, or was written by another program or a newer version, raises a RunDamagedError
that names it: no reader treats a damaged file as a missing one.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import psutil

from tundish.base import events
from tundish.base.events import Event
from tundish.base.files import inside, write_atomic
from tundish.base.home import runs_dir
from tundish.base.processes import processes_with
from tundish.base.typed_json import RECORD_BYTES, NewerError, parse, read_object, read_regular
from tundish.errors import FailureCause, RunDamagedError, RunNotFoundError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
RUN_VARIABLE = "TUNDISH_EVENTS"
"""Environment variable of a run's processes: the path of its events.jsonl."""
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
BEAT_BYTES = 512
"""Of each beat, so that one replaces the one before completely."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracking:
    """What `create()` made in MLflow."""

    tracking_uri: str
    experiment_id: str
    experiment_name: str
    run_id: str
    save_folder: str
    """Where the checkpoints go: `<artifacts>/<run_name>/checkpoints`."""
    registry_uri: str | None = None
    """The model registry; None: it is part of the tracking store."""
    model_path: str = "model"
    """Of the registered model among the run's artifacts; each change of the duration gives a new one."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which Composer's logger continues the MLflow run that `create()` made."""
        return {
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "MLFLOW_EXPERIMENT_ID": self.experiment_id,
            "MLFLOW_RUN_ID": self.run_id,
        }

    def write(self, run: "RunFolder") -> None:
        """Record it in the run's folder."""
        run.write_result("tracking", asdict(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """A rank's sign of life."""

    host: str
    count: int
    """Of beats so far; changes with each one."""
    moves: int
    """Changes each time the rank makes progress."""
    batch: int
    """That it works on, from 0."""
    doing: str
    """With the batch: starting, reading, training, or finishing."""
    usual_s: float
    """Median duration of the latest steps."""

    @staticmethod
    def file(folder: Path, rank: int) -> Path:
        """The file of a rank."""
        return folder / f"rank{rank}"

    @classmethod
    def read_all(cls, folder: Path) -> "dict[int, Beat]":
        """The latest beat of each rank that is at work."""
        beats: dict[int, Beat] = {}
        for path in folder.glob("rank*"):
            with suppress(OSError, ValueError, TypeError):  # its rank has just exited, or writes its first beat
                beats[int(path.name.removeprefix("rank"))] = parse(cls, read_object(path))
        return beats

    def write(self, path: Path) -> None:
        """Overwrite the beat before with one of the same length."""
        # In place and not atomically: a disk that many ranks share would have three operations more for each beat.
        text = json.dumps(asdict(self)).ljust(BEAT_BYTES - 1) + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, text.encode(), 0)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of a run, `$TUNDISH_HOME/runs/<run_name>/`.

    No other module spells the name of a file in it. All methods that read raise RunDamagedError, or RunNotFoundError if
    the folder no longer exists.
    """

    folder: Path

    @classmethod
    def of(cls, run_name: str) -> Self:
        """The folder of the run of that name, whether it exists or not."""
        return cls(inside(runs_dir(), run_name))

    def check_name(self, run_name: str) -> None:
        """Check the run's name in one of its files.

        Raises:
            ValueError: it is of another run.
        """
        if run_name != self.folder.name:
            raise ValueError(f"is of the run {run_name!r}: this folder was copied, or renamed from it")

    @classmethod
    def of_this_process(cls) -> Self | None:
        """The folder of the run that this process works for, started by its supervisor or by a script of the folder."""
        events_file = os.environ.get(RUN_VARIABLE)
        return cls(Path(events_file).parent) if events_file else None

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which a process knows its run, and by which it is found if it outlives its supervisor."""
        return {RUN_VARIABLE: str(self.events)}

    def processes(self) -> list[psutil.Process]:
        """The processes of this machine that work for the run: stages, launchers, ranks; not its supervisor."""
        return processes_with(RUN_VARIABLE, str(self.events))

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def spec(self) -> Path:
        """The checked arguments, as JSON."""
        return self.folder / "spec.json"

    @property
    def plan(self) -> Path:
        """Everything that was decided about the run, as JSON; a run of a version before it has none yet."""
        return self.folder / "plan.json"

    @property
    def foundry_yaml(self) -> Path:
        """What LLM Foundry trains."""
        return self.folder / "foundry.yaml"

    @property
    def events(self) -> Path:
        """What happened, append-only, one JSON object a line."""
        return self.folder / "events.jsonl"

    @property
    def supervisor(self) -> Path:
        """Which launcher has the run, and how that identifies the supervisor, as JSON."""
        return self.folder / "supervisor.json"

    @property
    def lock(self) -> Path:
        """Held by the run's supervisor as long as it lives: there is never a second one."""
        return self.folder / "supervisor.lock"

    @property
    def batch_script(self) -> Path:
        """What was submitted to the scheduler of a cluster, where one has the run."""
        return self.folder / "job.sbatch"

    @property
    def logs(self) -> Path:
        """The folder of all logs: one for each stage, and one for each rank."""
        return self.folder / "logs"

    def log(self, stage: str, rank: int | str | None = None) -> Path:
        """The log of a stage, or of one rank of it."""
        return self.logs / (f"{stage}.log" if rank is None else f"{stage}-rank{rank}.log")

    def stage_logs(self, stage: str) -> list[Path]:
        """The logs that a stage has: its own first, then those of its ranks."""
        return [log for log in [self.log(stage), *sorted(self.logs.glob(self.log(stage, "*").name))] if log.is_file()]

    def result(self, stage: str) -> Path:
        """What a stage found, as JSON: its result, or an `error` and its `cause`."""
        return self.folder / "results" / f"{stage}.json"

    @property
    def learned(self) -> Path:
        """Left by the ranks once training has changed a weight."""
        return self.folder / "results" / "learned"

    def data(self, split: str) -> Path:
        """A link to the prepared data of `train` or `eval`."""
        return self.folder / "data" / split

    @property
    def work(self) -> Path:
        """Working directory of the stages."""
        return self.folder / "work"

    @property
    def stop_request(self) -> Path:
        """If it exists, the ranks save a checkpoint after their current batch and exit."""
        return self.work / "stop"

    @property
    def stopped(self) -> Path:
        """Left by the ranks when they have done so."""
        return self.work / "stopped"

    @property
    def beats(self) -> Path:
        """The ranks' signs of life, one file each (Beat)."""
        return self.work / "beats"

    @property
    def scratch(self) -> Path:
        """Temporary files of a stage; exists while the stage runs."""
        return self.work / "scratch"

    @property
    def doing(self) -> Path:
        """How far the running stage is, as text."""
        return self.scratch / "doing"

    @property
    def metrics(self) -> Path:
        """Every point of every metric, one JSON object a line; MLflow gets them from here."""
        return self.folder / "metrics.jsonl"

    @property
    def artifacts_journal(self) -> Path:
        """What else MLflow gets while training, one JSON object a line: params, data sets, rows, names of files."""
        return self.folder / "artifacts.jsonl"

    @property
    def artifacts(self) -> Path:
        """The files that artifacts.jsonl names."""
        return self.folder / "artifacts"

    @property
    def export(self) -> Path:
        """The exported model, a Hugging Face folder."""
        return self.folder / "export"

    def begin_stage(self, stage: str) -> None:
        """Remove what an earlier try of a stage has left: what is there later comes from this try."""
        self.work.mkdir(exist_ok=True)
        for file in (self.result(stage), self.stop_request, self.stopped):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.beats, ignore_errors=True)

    def write_result(self, stage: str, result: Mapping[str, Any]) -> None:
        """Record what a stage found: the stage is done."""
        write_atomic(self.result(stage), json.dumps(result, indent=2) + "\n")

    def write_error(self, stage: str, message: str, cause: FailureCause) -> None:
        """Record why a stage failed."""
        write_atomic(self.result(stage), json.dumps({"error": message, "cause": cause}) + "\n")

    def add_event(self, type: str, message: str, **facts: Any) -> None:
        """Append an event, with facts for machines."""
        events.append(self.events, type, message, **facts)

    def has_ended(self) -> bool:
        """Whether the latest event is an end of the run."""
        return self.read_events()[-1].type in events.TERMINAL_TYPES

    def is_done(self, stage: str) -> bool:
        """Whether a stage has left its result, and not an error."""
        result = self.read_result(stage)
        return result is not None and "error" not in result

    def check(self) -> None:
        """Check that it is a folder.

        Raises:
            RunDamagedError: it is something else.
        """
        if not os.path.isdir(self.folder):
            raise RunDamagedError(f"{self.folder}: must be a folder, as of a run. Move it elsewhere.", self.folder)

    def read(self, path: Path, parsed: Callable[[bytes], T]) -> T:
        """What `parsed` makes of the bytes of a file in the folder."""
        with self._reading(path, "Restore it"):
            return parsed(read_regular(path, RECORD_BYTES))

    def read_tracking(self) -> Tracking:
        """What `create()` made in MLflow."""
        path = self.result("tracking")
        with self._reading(path, "Restore it"):
            return parse(Tracking, read_object(path))

    def read_supervisor(self, records: Mapping[str, type[T]]) -> tuple[str, T] | None:
        """The run's launcher, and how it identifies the supervisor; None before the run was submitted.

        Args:
            records: the dataclass of each launcher's record, by the launcher's name.
        """
        with self._reading(self.supervisor, f"Remove it, then `tundish resume {self.name}`"):
            try:
                record = read_object(self.supervisor)
            except FileNotFoundError:
                return None
            launcher = record.pop("launcher", None)
            if not isinstance(launcher, str) or launcher not in records:
                known = " and ".join(records)
                raise ValueError(f"launcher must be {known.replace(' and ', ' or ')}, not {launcher!r}")
            return launcher, parse(records[launcher], record)

    def write_supervisor(self, launcher: str, record: "DataclassInstance") -> None:
        """Record which launcher has the run, and how that identifies the supervisor."""
        write_atomic(self.supervisor, json.dumps({"launcher": launcher, **asdict(record)}) + "\n")

    def read_result(self, stage: str) -> dict[str, Any] | None:
        """What a stage found, or its `error` and `cause`; None before it has ended."""
        path = self.result(stage)
        with self._reading(path, f"Remove it, then `tundish resume {self.name}` repeats the stage"):
            try:
                return read_object(path)
            except FileNotFoundError:
                return None

    def read_events(self) -> list[Event]:
        """All events in order, but of TRAIN_UPDATED only the latest; at least one."""
        with self._reading(self.events, "Remove the lines that are not events"):
            if not (happened := events.read(self.events)):
                self.events.stat()  # raises if the file is missing
                raise ValueError("contains no event")
        return happened

    def last_beat(self) -> datetime | None:
        """When the rank was last alive that has been silent longest; None if no rank is at work."""
        beats: list[float] = []
        for path in self.beats.glob("rank*"):
            with suppress(FileNotFoundError):  # its rank has just exited
                beats.append(path.stat().st_mtime)
        return datetime.fromtimestamp(min(beats), UTC) if beats else None

    def write_doing(self, text: str) -> None:
        """Show how far the running stage is; nothing where no supervisor runs it."""
        if self.scratch.is_dir():
            write_atomic(self.doing, text)

    def read_doing(self) -> str:
        """How far the running stage is; empty if it does not show that."""
        try:
            return read_regular(self.doing, RECORD_BYTES).decode()
        except (OSError, ValueError):
            return ""

    @contextmanager
    def _reading(self, path: Path, advice: str) -> Iterator[None]:
        """Turn every error of reading a file into one that names the file and what to do.

        Raises:
            RunNotFoundError: the run's folder no longer exists.
            RunDamagedError: the file is missing, unreadable or damaged.
        """
        try:
            yield
        except NewerError as error:
            raise RunDamagedError(f"{path}: {error}. Upgrade tundish to use this run.", path) from error
        except PermissionError as error:
            text = f"{path}: permission denied. Ask its owner, or correct the permissions of {self.folder}."
            raise RunDamagedError(text, path) from error
        except (OSError, ValueError) as error:
            if not os.path.lexists(self.folder):
                raise RunNotFoundError(f"there is no run {self.folder.name!r} in {self.folder.parent}.") from error
            self.check()
            what = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
            if isinstance(error, FileNotFoundError):
                what, advice = "is missing", "Restore it"
            raise RunDamagedError(f"{path}: {what}. {advice}, or move {self.folder} elsewhere.", path) from error
