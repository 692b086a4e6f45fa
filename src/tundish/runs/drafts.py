"""A run while `create()` makes it: its name is reserved, and nothing is left of it if `create()` fails or is killed.

Beside the runs are `.NAME.lock`, held by the process that makes the run, and `.NAME.draft` with what it has made and
what must be undone. A process that is killed leaves both: the kernel releases its lock, and the next `create()` undoes
the rest.
"""

import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tundish import launch
from tundish.base.files import flush_folder, locked, make_folder, write_atomic
from tundish.base.home import runs_dir
from tundish.base.run_folder import RunFolder
from tundish.base.typed_json import parse, read_object
from tundish.errors import LockHeldError, SpecError, StoreError
from tundish.tracking.experiment import delete_runs

log = logging.getLogger(__name__)
BALLAST_BYTES = 1 << 18
"""Freed before anything is undone: on a full disk, MLflow's database could not even delete a run."""


@dataclass(frozen=True, slots=True)
class InMLflow:
    """Where the MLflow run of a draft will be, recorded before it is made."""

    tracking_uri: str
    experiment_name: str
    mark: str
    """Value of the MLflow run's tag MARK."""


class Draft:
    """A run that is being made, not visible yet."""

    def __init__(self, name: str) -> None:
        self.folder = runs_dir() / f".{name}.draft"
        self.run = RunFolder(self.folder / "run")
        """Where it is made."""
        self.published = RunFolder(runs_dir() / name)
        """Where it is moved to as a whole."""
        self.mark = secrets.token_hex(16)
        self.started = False
        """From then on it is kept."""

    def make(self) -> None:
        """Make the folder."""
        self.folder.mkdir()
        (self.folder / "ballast").write_bytes(bytes(BALLAST_BYTES))
        self.run.folder.mkdir()

    def note_mlflow(self, tracking_uri: str, experiment_name: str) -> None:
        """Record what must be undone in MLflow, before anything is made there."""
        record = InMLflow(tracking_uri, experiment_name, self.mark)
        write_atomic(self.folder / "mlflow.json", json.dumps(asdict(record)) + "\n")

    def publish(self) -> None:
        """Give the run its name."""
        self.run.folder.rename(self.published.folder)
        flush_folder(runs_dir())

    def undo(self) -> None:
        """Remove all that was made."""
        if not self.folder.exists():
            return
        if self.published.folder.exists() and not self.run.folder.exists():
            self.published.folder.rename(self.run.folder)
        (self.folder / "ballast").unlink(missing_ok=True)
        launch.release_devices(self.published)
        with suppress(FileNotFoundError, ValueError):  # killed before MLflow was asked
            record = parse(InMLflow, read_object(self.folder / "mlflow.json"))
            delete_runs(record.tracking_uri, record.experiment_name, record.mark)
        shutil.rmtree(self.folder)


@contextmanager
def reserved(name: str) -> Iterator[Draft]:
    """The draft of a run of that name, which is alone with it; undone where the block does not start it.

    Raises:
        SpecError: there is one already, or another process makes one.
    """
    make_folder(runs_dir())
    try:
        with locked(_lock(name), timeout=0, temporary=True):
            _undo_left(name)
            draft = Draft(name)
            if os.path.lexists(draft.published.folder):
                raise SpecError(f"run_name: run {name!r} already exists. Choose another name.")
            if draft.folder.exists():
                raise SpecError(f"run_name: {draft.folder} is left over from an earlier create(). Choose another name.")
            try:
                yield draft
            except BaseException:
                if not draft.started:
                    _try_to_undo(draft)
                raise
            finally:
                if draft.started:
                    shutil.rmtree(draft.folder, ignore_errors=True)
    except LockHeldError as error:
        text = f"run_name: run {name!r} is being created right now. Choose another name. {error.message}"
        raise SpecError(text) from None


def undo_left() -> None:
    """Undo what was left by processes that were killed while they made a run."""
    for path in runs_dir().glob(".*"):
        if path.suffix == ".draft":
            name = path.name[1:].removesuffix(".draft")
            with suppress(LockHeldError), locked(_lock(name), timeout=0, temporary=True):
                _undo_left(name)


def _undo_left(name: str) -> None:
    draft = Draft(name)
    if not draft.folder.exists():
        return
    if draft.published.folder.exists() and not draft.run.folder.exists() and launch.is_submitted(draft.published):
        shutil.rmtree(draft.folder)  # it was started, and is kept
    else:
        _try_to_undo(draft)


def _try_to_undo(draft: Draft) -> None:
    try:
        draft.undo()
    except (StoreError, OSError) as error:
        name = draft.published.folder.name
        text = "What create() left of the run %s in %s cannot be removed now; the next create() tries again: %s"
        log.warning(text, name, draft.folder, " ".join(str(error).split()))


def _lock(name: str) -> Path:
    return runs_dir() / f".{name}.lock"
