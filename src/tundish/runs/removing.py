"""Removing runs: what is removed, what is kept, and the removal itself, which can be interrupted and repeated."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tundish.base.events import TERMINAL_TYPES
from tundish.base.files import is_held, locked
from tundish.base.home import mlflow_artifacts_dir
from tundish.base.mlflow_client import impatient, open_client, quiet, store_errors
from tundish.base.run_folder import RunFolder, Tracking
from tundish.checkpoints.save_folder import SaveFolder, hidden
from tundish.checkpoints.save_folder import remove as remove_at_once
from tundish.errors import RequestError, RunDamagedError, StoreError
from tundish.launch import release_devices
from tundish.runs.reading import damaged_run, find_run, read_run, run_names
from tundish.runs.records import RunRecord

DAMAGED = "DAMAGED"
LOCK_SECONDS = 10.0
"""How long a removal waits for another process that cancels or resumes the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Removal:
    """What is removed with a run."""

    name: str
    status: str
    ended_at: datetime | None
    folders: Sequence[Path]
    """On this machine; the run's own folder is last."""
    bytes: int
    """Their size on disk."""
    elsewhere: str | None
    """URI of its checkpoints in an object store, if they are removed."""
    mlflow: Tracking | None
    """Its MLflow run, if that is deleted as well."""
    notes: Sequence[str]
    """What else the user should know, a sentence each."""


def plan(names: Iterable[str], *, local: bool = False) -> list[Removal]:
    """What removing runs would remove.

    Args:
        names: of the runs.
        local: only what is on this machine; neither MLflow nor an object store is contacted.

    Raises:
        RunNotFoundError: there is no run of a name.
        RequestError: a run is active, an active run starts from its checkpoints, or MLflow does not answer; all
            problems are reported together.
    """
    removals, problems = list[Removal](), list[str]()
    for name in dict.fromkeys(names):
        try:
            removals.append(_plan_one(find_run(name), local))
        except RequestError as error:
            problems.append(error.message)
    if problems:
        raise RequestError(" ".join(problems))
    return removals


def ended_before(moment: datetime) -> list[str]:
    """The runs that had ended by then, oldest first, without damaged ones, whose end is unknown."""
    ended = {run.name: run.completed_at or run.created_at for run in _all_runs() if run.status.is_terminal()}
    return sorted((name for name, end in ended.items() if end and end < moment), key=lambda name: str(ended[name]))


def remove(removal: Removal) -> None:
    """Remove a run. Its own folder is removed last, so that an interrupted removal can be repeated.

    Raises:
        RequestError: it was resumed in the meantime, or MLflow does not answer.
        CheckpointError: the object store does not allow removing its checkpoints.
    """
    run_folder = find_run(removal.name)
    with locked(run_folder.folder, LOCK_SECONDS):  # so that it cannot be resumed in the meantime
        _refuse_active(run_folder)
        if removal.elsewhere is not None:
            SaveFolder(removal.elsewhere).clear()
        for folder in removal.folders[:-1]:
            remove_folder(folder)
            if folder.parent.name == removal.name:  # it was made for the checkpoints
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()
        if removal.mlflow is not None:
            with _asking(removal.mlflow) as client:
                client.delete_run(removal.mlflow.run_id)
        release_devices(run_folder)
        remove_folder(removal.folders[-1])


def tree_bytes(folder: Path) -> int:
    """Size of a folder on disk; links are not followed."""
    entries = [os.path.join(root, name) for root, _, files in os.walk(folder) for name in files]
    total = 0
    for entry in entries:
        with contextlib.suppress(OSError):  # removed in the meantime
            total += os.lstat(entry).st_blocks * 512
    return total


def _plan_one(run_folder: RunFolder, local: bool) -> Removal:
    _refuse_active(run_folder)
    name, folders, notes = run_folder.folder.name, [run_folder.folder], list[str]()
    run, tracking = _known(run_folder)
    if tracking is None:
        notes.append("Its checkpoints and its MLflow run are kept: the file that says where they are cannot be read.")
        return _removal(run, folders, notes)
    _refuse_needed(name, tracking.save_folder)
    place, elsewhere = SaveFolder(tracking.save_folder), None
    if place.local.parent.name == name or place.is_remote:
        folders.insert(0, place.local)
    else:
        notes.append(f"Its checkpoints are kept: {place.local} is not a folder that tundish created.")
    if place.is_remote and local:
        notes.append(f"Its checkpoints in {place.address} are kept.")
    elif place.is_remote:
        elsewhere = place.address
        notes.append(f"Its {len(place.list())} complete checkpoints in {place.address} are removed too.")
    if local or run.submitted_config is None:
        why = "" if local else ": the name that it was registered under cannot be read"
        notes.append(f"Its MLflow run {tracking.run_id} is kept{why}.")
        return _removal(run, folders, notes, elsewhere)
    from tundish.export.registry import version_of

    with _asking(tracking) as client:
        name = run.submitted_config.registered_name
        version, there = version_of(client, name, tracking.run_id), _is_active(client, tracking.run_id)
    if version:
        notes.append(f"{name} version {version} is kept, and with it the MLflow run that it was logged in.")
        return _removal(run, folders, notes, elsewhere)
    if there:
        notes.append("Its MLflow run is deleted too; MLflow can restore it until `mlflow gc`.")
    for artifacts in mlflow_artifacts_dir().glob(f"*/{tracking.run_id}"):
        folders.insert(0, artifacts)
    return _removal(run, folders, notes, elsewhere, tracking if there else None)


def _removal(
    run: RunRecord,
    folders: list[Path],
    notes: list[str],
    elsewhere: str | None = None,
    mlflow: Tracking | None = None,
) -> Removal:
    outer = [folder for folder in folders if not any(other in folder.parents for other in folders)]
    return Removal(
        name=run.name,
        status=DAMAGED if run.damaged_file else str(run.status),
        ended_at=run.completed_at or run.created_at,
        folders=folders,
        bytes=sum(map(tree_bytes, outer)),
        elsewhere=elsewhere,
        mlflow=mlflow,
        notes=notes,
    )


def _known(run_folder: RunFolder) -> tuple[RunRecord, Tracking | None]:
    """The run, damaged or not, and where it is in MLflow if that can be read."""
    try:
        run = read_run(run_folder.folder.name)
    except RunDamagedError as error:
        run = damaged_run(run_folder.folder.name, error)
    try:
        return run, run_folder.read_tracking()
    except RunDamagedError:
        return run, None


def _refuse_active(run_folder: RunFolder) -> None:
    """Raise a RequestError if the run or a process of it is still active."""
    name = run_folder.folder.name
    try:
        ended = read_run(name).status.is_terminal()
        # Without a terminal event its supervisor was killed, and processes of a stage may have survived it.
        active = not ended or (run_folder.read_events()[-1].type not in TERMINAL_TYPES and bool(run_folder.processes()))
    except RunDamagedError:
        active = is_held(run_folder.lock) or bool(run_folder.processes())
    if active:
        raise RequestError(f"{name} is still active. Stop it with `tundish cancel {name}`, then remove it.")


def _refuse_needed(name: str, save_folder: str) -> None:
    """Raise a RequestError if an active run starts from a checkpoint of this one."""
    for other in _all_runs():
        starts_from_it = (other.custom_weights_path or "").startswith(f"{save_folder}/")
        if starts_from_it and other.name != name and not other.status.is_terminal():
            raise RequestError(f"{other.name} starts from a checkpoint of {name}. Wait until it ends, or cancel it.")


def _all_runs() -> Iterator[RunRecord]:
    for name in list(run_names()):
        with contextlib.suppress(RunDamagedError, LookupError):
            yield read_run(name)


def _is_active(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            return False
        raise


@contextmanager
def _asking(tracking: Tracking) -> Iterator[Any]:
    """A client of the run's store, whose errors become RequestErrors."""
    try:
        client = open_client(tracking.tracking_uri, tracking.registry_uri or tracking.tracking_uri)
        with store_errors(tracking.tracking_uri), quiet(), impatient():
            yield client
    except StoreError as error:
        raise RequestError(
            f"MLflow does not answer for run {tracking.run_id}: {error.message} "
            "Use --local to remove only what is on this machine."
        ) from error


def remove_folder(folder: Path) -> None:
    """Remove a folder, and what an interrupted removal has left of it."""
    if os.path.lexists(folder):
        remove_at_once([folder])
    shutil.rmtree(hidden(folder), ignore_errors=True)
