"""Removing runs for good: what goes, what stays, and the removal itself, which may be interrupted and done again."""

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
from tundish.base.mlflow_client import impatient, open_client, quiet, told
from tundish.base.run_folder import RunFolder, Tracking
from tundish.checkpoints.save_folder import SaveFolder, hidden
from tundish.checkpoints.save_folder import remove as remove_at_once
from tundish.errors import RequestError, RunDamagedError, StoreError
from tundish.launch import release_devices
from tundish.runs.reading import damaged_run, find_run, read_run, run_names
from tundish.runs.records import RunRecord

DAMAGED = "DAMAGED"
LOCK_SECONDS = 10.0
"""How long a removal waits for somebody who cancels or resumes the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Removal:
    """What is removed with a run."""

    name: str
    status: str
    ended_at: datetime | None
    folders: Sequence[Path]
    """On this machine; the run's own is the last."""
    bytes: int
    """That they take."""
    elsewhere: str | None
    """Where its checkpoints are on another machine, if they are removed."""
    mlflow: Tracking | None
    """Its MLflow run, if that is deleted."""
    notes: Sequence[str]
    """What else there is to know, a sentence each."""


def plan(names: Iterable[str], *, local: bool = False) -> list[Removal]:
    """What the removal of runs would take.

    Args:
        names: of the runs.
        local: only what is on this machine; neither MLflow nor an object store is asked.

    Raises:
        RunNotFoundError: there is no run of a name.
        RequestError: a run goes on, or another one begins with its checkpoints; MLflow does not answer. All that is in
            the way is told at once.
    """
    found, problems = list[Removal](), list[str]()
    for name in dict.fromkeys(names):
        try:
            found.append(_plan_one(find_run(name), local))
        except RequestError as error:
            problems.append(error.message)
    if problems:
        raise RequestError(" ".join(problems))
    return found


def ended_before(moment: datetime) -> list[str]:
    """The runs that had ended by then, oldest first; damaged ones, of which that is not known, are left out."""
    ended = {run.name: run.completed_at or run.created_at for run in _all_runs() if run.status.is_terminal()}
    return sorted((name for name, end in ended.items() if end and end < moment), key=lambda name: str(ended[name]))


def remove(removal: Removal) -> None:
    """Remove a run. Its own folder goes last: what was interrupted is still there as a run, and can be removed again.

    Raises:
        RequestError: it goes on meanwhile, or MLflow does not answer.
        CheckpointError: the store does not let its checkpoints be removed.
    """
    paths = find_run(removal.name)
    with locked(paths.folder, LOCK_SECONDS):  # nobody resumes it meanwhile
        _refuse_going_on(paths)
        if removal.elsewhere is not None:
            SaveFolder(removal.elsewhere).clear()
        for folder in removal.folders[:-1]:
            remove_folder(folder)
            if folder.parent.name == removal.name:  # made for the checkpoints alone
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()
        if removal.mlflow is not None:
            with _asking(removal.mlflow) as client:
                client.delete_run(removal.mlflow.run_id)
        release_devices(paths)
        remove_folder(removal.folders[-1])


def tree_bytes(folder: Path) -> int:
    """What a folder takes of its disk; links are not followed."""
    entries = [os.path.join(root, name) for root, _, files in os.walk(folder) for name in files]
    total = 0
    for entry in entries:
        with contextlib.suppress(OSError):  # gone meanwhile
            total += os.lstat(entry).st_blocks * 512
    return total


def _plan_one(paths: RunFolder, local: bool) -> Removal:
    _refuse_going_on(paths)
    name, folders, notes = paths.folder.name, [paths.folder], list[str]()
    run, tracking = _known(paths)
    if tracking is None:
        notes.append("Where its checkpoints and its MLflow run are cannot be read: they stay.")
        return _removal(run, folders, notes)
    _refuse_needed(name, tracking.save_folder)
    place, elsewhere = SaveFolder(tracking.save_folder), None
    if place.local.parent.name == name or place.is_remote:
        folders.insert(0, place.local)
    else:
        notes.append(f"Its checkpoints stay: {place.local} is not a folder that tundish makes.")
    if place.is_remote and local:
        notes.append(f"Its checkpoints stay in {place.address}.")
    elif place.is_remote:
        elsewhere = place.address
        notes.append(f"Its checkpoints in {place.address} are removed too: {len(place.list())} complete ones.")
    if local or run.submitted_config is None:
        why = "" if local else " What it was registered as cannot be read."
        notes.append(f"Its MLflow run {tracking.run_id} stays.{why}")
        return _removal(run, folders, notes, elsewhere)
    from tundish.export.registry import version_of

    with _asking(tracking) as client:
        name = run.submitted_config.registered_name
        version, there = version_of(client, name, tracking.run_id), _is_active(client, tracking.run_id)
    if version:
        notes.append(f"{name} version {version} stays, and with it the MLflow run that it was logged in.")
        return _removal(run, folders, notes, elsewhere)
    if there:
        notes.append("Its MLflow run is deleted too: MLflow keeps it in its trash until `mlflow gc`.")
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


def _known(paths: RunFolder) -> tuple[RunRecord, Tracking | None]:
    """The run, damaged or not, and what can be read of where it is in MLflow."""
    try:
        run = read_run(paths.folder.name)
    except RunDamagedError as error:
        run = damaged_run(paths.folder.name, error)
    try:
        return run, paths.read_tracking()
    except RunDamagedError:
        return run, None


def _refuse_going_on(paths: RunFolder) -> None:
    """Raise a RequestError where something of the run goes on."""
    name = paths.folder.name
    try:
        run, said = read_run(name), paths.read_events()[-1].type
        ended = run.status.is_terminal()
        at_rest = ended and (said in TERMINAL_TYPES or _has_no_process(paths))
    except RunDamagedError:
        at_rest = not is_held(paths.lock) and _has_no_process(paths)
    if not at_rest:
        raise RequestError(f"{name} has not ended. `tundish cancel {name}` stops it; then remove it.")


def _has_no_process(paths: RunFolder) -> bool:
    return not paths.processes()


def _refuse_needed(name: str, save_folder: str) -> None:
    """Raise a RequestError where a run that goes on begins with the run's weights."""
    for other in _all_runs():
        begins = (other.custom_weights_path or "").startswith(f"{save_folder}/")
        if begins and other.name != name and not other.status.is_terminal():
            raise RequestError(f"{other.name} begins with a checkpoint of {name}. Wait for its end.")


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
    """A client of the run's store; what it says becomes a RequestError."""
    try:
        client = open_client(tracking.tracking_uri, tracking.registry_uri or tracking.tracking_uri)
        with told(tracking.tracking_uri), quiet(), impatient():
            yield client
    except StoreError as error:
        raise RequestError(
            f"MLflow does not answer for run {tracking.run_id}: {error.message} "
            "--local removes only what is on this machine."
        ) from error


def remove_folder(folder: Path) -> None:
    """Remove a folder, and what is left of it from a removal that was interrupted."""
    if os.path.lexists(folder):
        remove_at_once([folder])
    shutil.rmtree(hidden(folder), ignore_errors=True)
