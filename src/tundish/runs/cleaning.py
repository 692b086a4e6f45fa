"""What no run needs in `$TUNDISH_HOME`: prepared data, downloads, copies of checkpoints, drafts of runs."""

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tundish.base.files import is_held, locked
from tundish.base.home import copies_dir, downloads_dir, prepared_dir, runs_dir
from tundish.base.run_folder import RunFolder
from tundish.checkpoints.save_folder import READ, SaveFolder, save_folder_of
from tundish.errors import LockHeldError, RunDamagedError, RunNotFoundError
from tundish.plan.spec import RunSpec
from tundish.runs import drafts
from tundish.runs.reading import read_run, run_names
from tundish.runs.removing import remove_folder, tree_bytes

NAME = re.compile(r"(?P<half>\.)?(?P<name>[0-9a-f]{24})(?(half)\.tmp)")
"""Folders of prepared data, downloads and copies: the beginning of a hash; with a dot and .tmp while incomplete."""
INCOMPLETE, DRAFT = "incomplete", "draft"
NEEDED = ("prepared data", "download", "checkpoints")
"""Kinds that a run may need."""
IDLE_SECONDS = 3600.0
"""Something without a lock that has not changed for this long was left by a process that was killed."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that no run needs."""

    kind: str
    path: Path
    bytes: int
    locks: Sequence[Path]
    """Held by the process that uses it."""


@dataclass(slots=True)
class Needs:
    """What runs need."""

    folders: set[Path] = field(default_factory=set[Path])
    """Prepared data and copies of checkpoints."""
    preparing: bool = False
    """Whether an active run has not recorded yet which prepared data it uses."""
    unknown: bool = False
    """Whether a damaged run may need checkpoints that cannot be distinguished from others."""

    def has(self, kind: str, path: Path) -> bool:
        """Whether a run needs this, or may need it."""
        return path in self.folders or (self.unknown if kind == "checkpoints" else self.preparing)


def leftovers() -> tuple[list[Leftover], int]:
    """What can be removed, the largest first, and how many bytes are in use by runs or other processes."""
    needs, unused, used_bytes = needs_of_runs(), list[Leftover](), 0
    for candidate in _all():
        if (candidate.kind in NEEDED and needs.has(candidate.kind, candidate.path)) or _is_used(candidate):
            used_bytes += candidate.bytes
        else:
            unused.append(candidate)
    return sorted(unused, key=lambda leftover: leftover.bytes, reverse=True), used_bytes


def remove(leftover: Leftover) -> bool:
    """Remove it, unless it came into use. Returns whether it was removed."""
    if leftover.kind == DRAFT:
        drafts.undo_left()  # its MLflow run as well
        return not leftover.path.exists()
    with ExitStack() as held:
        for lock in leftover.locks:
            try:
                held.enter_context(locked(lock, timeout=0, temporary=True))
            except LockHeldError:
                return False
        # A run may have come to need it before the lock was acquired.
        if leftover.kind in NEEDED and needs_of_runs().has(leftover.kind, leftover.path):
            return False
        remove_folder(leftover.path)
    return True


def needs_of_runs() -> Needs:
    """What all runs of this machine need, damaged ones included."""
    needs = Needs()
    for name in list(run_names()):
        run = RunFolder(runs_dir() / name)
        links = [run.data(split) for split in ("train", "eval")]
        needs.folders.update(Path(os.readlink(link)) for link in links if link.is_symlink())
        try:
            spec, save_folder = RunSpec.read(run), run.read_tracking().save_folder
            needs.folders.add(SaveFolder(save_folder).local)
            if spec.custom_weights_path:
                needs.folders.add(save_folder_of(spec.custom_weights_path)[0].local)
            if not links[0].is_symlink() and not read_run(name).status.is_terminal():
                needs.preparing = True
        except RunDamagedError:
            needs.unknown = True
        except RunNotFoundError:
            continue
    return needs


def _all() -> Iterator[Leftover]:
    for kind, parent in (("prepared data", prepared_dir()), ("download", downloads_dir())):
        for folder, name, whole in _folders(parent):
            yield _leftover(kind if whole else INCOMPLETE, folder, [parent / f".{name}.lock"])
    for folder, _, whole in _folders(copies_dir()):
        locks = [*folder.glob(".*.lock"), *(folder / READ).glob(".*.lock")]
        yield _leftover("checkpoints" if whole else INCOMPLETE, folder, locks)
    for folder in runs_dir().glob(".*"):
        if folder.is_dir() and not folder.is_symlink():
            draft = folder.suffix == ".draft"
            yield _leftover(DRAFT if draft else INCOMPLETE, folder, [folder.with_suffix(".lock")] if draft else [])


def _folders(parent: Path) -> Iterator[tuple[Path, str, bool]]:
    """Folders named by a hash, with their names and whether they are complete."""
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        if (match := NAME.fullmatch(path.name)) and path.is_dir() and not path.is_symlink():
            yield path, match["name"], not match["half"]


def _leftover(kind: str, folder: Path, locks: Sequence[Path]) -> Leftover:
    return Leftover(kind, folder, tree_bytes(folder), locks)


def _is_used(one: Leftover) -> bool:
    """Whether a process holds its lock or, where it has none, has changed it lately."""
    if one.locks or one.kind in NEEDED:
        return any(map(is_held, one.locks))
    newest = max(path.lstat().st_mtime for path in (one.path, *one.path.rglob("*")))
    return time.time() - newest < IDLE_SECONDS
