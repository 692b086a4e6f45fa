"""What the files in a run's folder say: the one place where they are read back.

A file that cannot be read, was cut off, or is of another program or a newer version, is a RunDamagedError that names
it; what a run's own processes have written is never doubted silently.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tundish.base import events
from tundish.base.events import Event
from tundish.base.files import inside, write_atomic
from tundish.base.home import runs_dir
from tundish.base.typed_json import RECORD_BYTES, NewerError, parse, read_object, read_regular
from tundish.errors import FailureCause, RunDamagedError, RunNotFoundError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
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

    def write(self, paths: "RunFolder") -> None:
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
class RunFolder:
    """The folder of a run, `$TUNDISH_HOME/runs/<run_name>/`: every name in it, and what the files say.

    No other module spells a file name of it. All readers raise RunDamagedError, or RunNotFoundError where the folder is
    gone.
    """

    folder: Path

    @classmethod
    def of(cls, run_name: str) -> Self:
        """The folder of the run of that name, whether it exists or not."""
        return cls(inside(runs_dir(), run_name))

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def spec(self) -> Path:
        """The checked arguments, as JSON; written last, so a folder without it is not a run."""
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
        """Append-only, one JSON object a line."""
        return self.folder / "events.jsonl"

    @property
    def supervisor(self) -> Path:
        """Which launcher has the run, and how that identifies the supervisor, as JSON."""
        return self.folder / "supervisor.json"

    @property
    def lock(self) -> Path:
        """Held by the run's supervisor while it lives: there is never a second one."""
        return self.folder / "supervisor.lock"

    @property
    def batch_script(self) -> Path:
        """What was submitted to the scheduler of a cluster, where one has the run."""
        return self.folder / "job.sbatch"

    @property
    def logs(self) -> Path:
        """One log a stage, and one a rank while training."""
        return self.folder / "logs"

    def log(self, stage: str) -> Path:
        """The log of one stage."""
        return self.logs / f"{stage}.log"

    def stage_logs(self, stage: str) -> list[Path]:
        """All logs that a stage has, the main one first; of training, one a rank besides."""
        return [log for log in [self.log(stage), *sorted(self.logs.glob(f"{stage}-rank*.log"))] if log.is_file()]

    def result(self, stage: str) -> Path:
        """What a stage found, as JSON: its result, or an `error` and its `cause`."""
        return self.folder / "results" / f"{stage}.json"

    @property
    def learned(self) -> Path:
        """Left by the ranks when training has changed a weight."""
        return self.folder / "results" / "learned"

    def data(self, split: str) -> Path:
        """A link to the prepared data of `train` or `eval`."""
        return self.folder / "data" / split

    @property
    def work(self) -> Path:
        """Working directory of the ranks."""
        return self.folder / "work"

    @property
    def stop_request(self) -> Path:
        """While it is there, the ranks save a checkpoint after their batch and end."""
        return self.work / "stop"

    @property
    def stopped(self) -> Path:
        """Left by the ranks when they have done so."""
        return self.work / "stopped"

    @property
    def beats(self) -> Path:
        """Signs of life of the ranks, a file each."""
        return self.work / "beats"

    @property
    def scratch(self) -> Path:
        """Temporary files of a stage, there while it runs."""
        return self.work / "scratch"

    @property
    def doing(self) -> Path:
        """How far a stage is, as text; gone with the stage."""
        return self.scratch / "doing"

    @property
    def metrics(self) -> Path:
        """Every point of every metric, one JSON object a line; MLflow has them from here."""
        return self.folder / "metrics.jsonl"

    @property
    def artifacts_journal(self) -> Path:
        """What else MLflow is told while training, one JSON object a line: params, data sets, rows, names of files."""
        return self.folder / "artifacts.jsonl"

    @property
    def artifacts(self) -> Path:
        """The files that are named there."""
        return self.folder / "artifacts"

    @property
    def export(self) -> Path:
        """The Hugging Face folder."""
        return self.folder / "export"

    def begin_stage(self, stage: str) -> None:
        """Remove what an earlier try of a stage has left, so that what is found later is of this one."""
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
        """Make sure that it is a folder: what is done to a run must not be done to a file, or to what a link names.

        Raises:
            RunDamagedError: it is something else.
        """
        if not os.path.isdir(self.folder):
            raise RunDamagedError(f"{self.folder}: is not a folder, as a run is. Move it elsewhere.", self.folder)

    def read(self, path: Path, parsed: Callable[[bytes], T]) -> T:
        """What a file of the folder holds, as `parsed` makes it of its bytes."""
        with self._reading(path, "Restore it"):
            return parsed(read_regular(path, RECORD_BYTES))

    def read_tracking(self) -> Tracking:
        """What `create()` has made in MLflow."""
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
                raise ValueError(f"names the launcher {launcher!r}; this version of tundish has {known}")
            return launcher, parse(records[launcher], record)

    def write_supervisor(self, launcher: str, record: "DataclassInstance") -> None:
        """Record which launcher has the run, and how that identifies the supervisor."""
        write_atomic(self.supervisor, json.dumps({"launcher": launcher, **asdict(record)}) + "\n")

    def read_result(self, stage: str) -> dict[str, Any] | None:
        """What a stage found, or its `error`; None before it has ended."""
        path = self.result(stage)
        with self._reading(path, f"Remove it, then `tundish resume {self.name}` does the stage again"):
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
        except NewerError as error:
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
