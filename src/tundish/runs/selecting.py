"""Which runs a call means: by name or object, by filter."""

import contextlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from tundish.base.home import runs_dir
from tundish.base.run_folder import RunFolder
from tundish.checkpoints.save_folder import SaveFolder
from tundish.errors import RequestError, RunDamagedError, RunNotFoundError, SpecError, did_you_mean
from tundish.runs.reading import damaged_run, find_run, read_run, run_names
from tundish.runs.records import RunRecord, RunStatus

log = logging.getLogger(__name__)

CANDIDATES = 8
"""Of the runs that a beginning may mean, told at most."""
DATE_FORMATS = [
    date + time
    for date in ("%Y-%m-%d", "%m-%d-%Y", "%Y/%m/%d", "%m/%d/%Y")
    for time in ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f")
]


def name_of(training_run: object) -> str:
    """The run's name.

    Raises:
        RequestError: it is neither a name nor a run.
    """
    if isinstance(training_run, RunRecord):
        return training_run.name
    if isinstance(training_run, str):
        return training_run
    raise RequestError(f"found {type(training_run).__name__}; a run is given by its name or as a TrainingRun.")


LAST = "@last"


def named(given: str) -> str:
    """The name of the run that somebody means at a terminal: by its name, its first letters, or `@last`, the newest.

    Only there: a program that asks for a run by name must not get another one because the first is gone.

    Raises:
        RunNotFoundError: there is none.
        RequestError: there are several that begin so.
    """
    if given == LAST:
        newest = _newest_first(None)
        if not newest:
            raise RunNotFoundError(
                f"there is no run yet in {runs_dir()}. `tundish create --help` shows how to start one."
            )
        return newest[0]
    names = set(run_names())
    near = [given] if given in names else sorted(name for name in names if given and name.startswith(given))
    if len(near) > 1:
        shown = ", ".join(near[:CANDIDATES]) + (f" and {len(near) - CANDIDATES} more" if len(near) > CANDIDATES else "")
        raise RequestError(f"{given!r} is the beginning of {len(near)} runs: {shown}. Give more letters.")
    return near[0] if near else find_run(given).folder.name


def all_named(given: Iterable[str], *, exactly: bool = False) -> list[str]:
    """The names of several runs; where one is not found, all such are told.

    Args:
        given: as for `named`.
        exactly: only whole names count.

    Raises:
        RunNotFoundError: there is none of a name, or several begin so.
    """
    names, problems = list[str](), list[str]()
    for each in given:
        try:
            names.append(find_run(each).folder.name if exactly else named(each))
        except (RunNotFoundError, RequestError) as error:
            problems.append(error.message)
    if problems:
        raise RunNotFoundError("\n".join(problems))
    return names


def named_or_address(given: str) -> str:
    """The same, where a checkpoint's path or URI may be meant too."""
    return given if "/" in given or Path(given).exists() else named(given)


@dataclass(frozen=True, kw_only=True, slots=True)
class Filter:
    """What a run must be to be listed; None = anything."""

    names: set[str] | None = None
    experiment_id: str | None = None
    statuses: set[RunStatus] | None = None
    users: set[str] | None = None
    before: datetime | None = None
    after: datetime | None = None

    @classmethod
    def parse(
        cls,
        names: set[str] | None,
        experiment_id: str | None,
        statuses: Sequence[str | RunStatus] | None,
        users: Sequence[str] | None,
        before: str | datetime | None,
        after: str | datetime | None,
    ) -> "Filter":
        """The filter that the arguments of `list()` mean."""
        return cls(
            names=names,
            experiment_id=experiment_id,
            statuses={parse_status(status) for status in statuses} if statuses else None,
            users=set(users) if users else None,
            before=parse_time("before", before),
            after=parse_time("after", after),
        )

    def takes(self, run: RunRecord) -> bool:
        """Whether the run is wanted."""
        created = run.created_at
        if created is None:  # it is damaged: neither its user nor its time are known
            known = self.users is None and self.before is None and self.after is None and self.experiment_id is None
            return known and (self.statuses is None or run.status in self.statuses)
        return (
            (self.experiment_id is None or run.experiment_id == self.experiment_id)
            and (self.statuses is None or run.status in self.statuses)
            and (self.users is None or run.created_by in self.users)
            and (self.before is None or created < self.before)
            and (self.after is None or created >= self.after)
        )


def parse_status(given: str | RunStatus) -> RunStatus:
    """The status of that name, in any case.

    Raises:
        SpecError: there is none; the list would be empty, as if there were no such run.
    """
    if isinstance(given, RunStatus):
        return given
    known = [status.value for status in RunStatus]
    if given.upper() not in known:
        near = did_you_mean(given.upper(), known)
        raise SpecError(f"status: found {given!r}; allowed is {', '.join(known)}.{near}")
    return RunStatus(given.upper())


def parse_time(argument: str, given: str | datetime | None) -> datetime | None:
    """A time with zone; text without one is local time.

    Raises:
        SpecError: the text is no date.
    """
    if given is None or isinstance(given, datetime):
        return given.astimezone() if given else None
    for form in DATE_FORMATS:
        try:
            return datetime.strptime(given, form).astimezone()
        except ValueError:
            continue
    try:
        return datetime.fromisoformat(given).astimezone()
    except ValueError:
        text = f"{argument}: found {given!r}; allowed is a datetime, or text like '2026-11-21' or '11-21-2026 14:30'."
        raise SpecError(text) from None


def select(wanted: Filter, *, limit: int | None = None, include_details: bool = True) -> list[RunRecord]:
    """The wanted runs, newest first."""
    found: list[RunRecord] = []
    for name in _newest_first(wanted.names):
        if limit is not None and len(found) >= limit:
            break
        try:
            run = read_run(name)
        except RunNotFoundError:
            continue  # removed meanwhile
        except RunDamagedError as error:
            run = damaged_run(name, error)
            if not wanted.takes(run):
                log.warning("The filter left out a damaged run: %s", error.message)
        if wanted.takes(run):
            found.append(run if include_details else replace(run, events=None, submitted_config=None))
    return found


def _newest_first(names: set[str] | None) -> list[str]:
    """The runs' names, those given or all, by when their specs were written: the last file that `create()` writes."""
    root, spec, made = f"{runs_dir()}/", f"/{RunFolder(runs_dir()).spec.name}", dict[str, int]()
    for name in run_names() if names is None else names.intersection(run_names()):
        try:
            made[name] = os.stat(f"{root}{name}{spec}").st_mtime_ns
        except OSError:
            with contextlib.suppress(OSError):  # damaged, or removed meanwhile
                made[name] = os.lstat(f"{root}{name}").st_mtime_ns
    return sorted(made, key=lambda name: made[name], reverse=True)


def checkpoints(name: str) -> list[str]:
    """Full paths, or URIs, of the run's complete checkpoints, oldest first.

    Raises:
        RunNotFoundError: there is no such run.
        RunDamagedError: its folder does not say where they are.
        CheckpointError: they are on another machine that cannot be asked.
    """
    return SaveFolder(find_run(name).read_tracking().save_folder).list()
