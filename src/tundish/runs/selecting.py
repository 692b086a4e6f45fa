"""Which runs a call means: by name, by object, or by filter."""

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
"""How many runs a message lists at most."""
DATE_FORMATS = [
    date + time
    for date in ("%Y-%m-%d", "%m-%d-%Y", "%Y/%m/%d", "%m/%d/%Y")
    for time in ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f")
]


def name_of(training_run: object) -> str:
    """The run's name.

    Raises:
        RequestError: it is neither a name nor a run object.
    """
    if isinstance(training_run, RunRecord):
        return training_run.name
    if isinstance(training_run, str):
        return training_run
    raise RequestError(f"a run must be given as its name or a TrainingRun, not as {type(training_run).__name__}.")


LAST = "@last"


def named(text: str) -> str:
    """The name of the run that a user means on the command line: its name, its first letters, or `@last` (the newest).

    The Python API takes whole names only: a program must not get another run because the one it names was removed.

    Raises:
        RunNotFoundError: there is no such run.
        RequestError: several runs begin with these letters.
    """
    if text == LAST:
        newest = _newest_first(None)
        if not newest:
            raise RunNotFoundError(
                f"there are no runs yet in {runs_dir()}. `tundish create --help` shows how to start one."
            )
        return newest[0]
    names = set(run_names())
    matches = [text] if text in names else sorted(name for name in names if text and name.startswith(text))
    if len(matches) > 1:
        more = f" and {len(matches) - CANDIDATES} more" if len(matches) > CANDIDATES else ""
        shown = ", ".join(matches[:CANDIDATES]) + more
        raise RequestError(f"{len(matches)} runs begin with {text!r}: {shown}. Give more letters.")
    return matches[0] if matches else find_run(text).folder.name


def all_named(texts: Iterable[str], *, exactly: bool = False) -> list[str]:
    """The names of several runs; all that are not found are reported together.

    Args:
        texts: as for `named`.
        exactly: accept whole names only.

    Raises:
        RunNotFoundError: a run does not exist, or several begin with the same letters.
    """
    names, problems = list[str](), list[str]()
    for text in texts:
        try:
            names.append(find_run(text).folder.name if exactly else named(text))
        except (RunNotFoundError, RequestError) as error:
            problems.append(error.message)
    if problems:
        raise RunNotFoundError("\n".join(problems))
    return names


def named_or_address(text: str) -> str:
    """Like `named`, but paths and URIs of checkpoints are returned as they are."""
    return text if "/" in text or Path(text).exists() else named(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Filter:
    """Conditions that a run must meet; None accepts every run."""

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
        """The filter that the arguments of `list()` describe."""
        return cls(
            names=names,
            experiment_id=experiment_id,
            statuses={parse_status(status) for status in statuses} if statuses else None,
            users=set(users) if users else None,
            before=parse_time("before", before),
            after=parse_time("after", after),
        )

    def matches(self, run: RunRecord) -> bool:
        """Whether a run meets all conditions."""
        created = run.created_at
        if created is None:  # damaged: its user, time and experiment are unknown
            known = self.users is None and self.before is None and self.after is None and self.experiment_id is None
            return known and (self.statuses is None or run.status in self.statuses)
        return (
            (self.experiment_id is None or run.experiment_id == self.experiment_id)
            and (self.statuses is None or run.status in self.statuses)
            and (self.users is None or run.created_by in self.users)
            and (self.before is None or created < self.before)
            and (self.after is None or created >= self.after)
        )


def parse_status(status: str | RunStatus) -> RunStatus:
    """Read a status, in upper or lower case.

    Raises:
        SpecError: it is unknown; the list would be empty, as if no run had it.
    """
    if isinstance(status, RunStatus):
        return status
    known = [known.value for known in RunStatus]
    if status.upper() not in known:
        near = did_you_mean(status.upper(), known)
        raise SpecError(f"status must be one of {', '.join(known)}, not {status!r}.{near}")
    return RunStatus(status.upper())


def parse_time(argument: str, value: str | datetime | None) -> datetime | None:
    """Read a time; one without a time zone is local time.

    Raises:
        SpecError: the text is not a date.
    """
    if value is None or isinstance(value, datetime):
        return value.astimezone() if value else None
    for form in DATE_FORMATS:
        try:
            return datetime.strptime(value, form).astimezone()
        except ValueError:
            continue
    try:
        return datetime.fromisoformat(value).astimezone()
    except ValueError:
        text = f"{argument} must be a datetime, or text like '2026-11-21' or '11-21-2026 14:30', not {value!r}."
        raise SpecError(text) from None


def select(condition: Filter, *, limit: int | None = None, include_details: bool = True) -> list[RunRecord]:
    """The runs that match, newest first; `limit` of them at most."""
    runs: list[RunRecord] = []
    for name in _newest_first(condition.names):
        if limit is not None and len(runs) >= limit:
            break
        try:
            run = read_run(name)
        except RunNotFoundError:
            continue  # removed in the meantime
        except RunDamagedError as error:
            run = damaged_run(name, error)
            if not condition.matches(run):
                log.warning("Skipped a damaged run that the filter cannot judge: %s", error.message)
        if condition.matches(run):
            runs.append(run if include_details else replace(run, events=None, submitted_config=None))
    return runs


def _newest_first(names: set[str] | None) -> list[str]:
    """Names of runs, these or all, by the time of their spec: the last file that `create()` writes."""
    # Strings, not Paths: there may be tens of thousands of runs.
    root, spec, created = f"{runs_dir()}/", f"/{RunFolder(runs_dir()).spec.name}", dict[str, int]()
    for name in run_names() if names is None else names.intersection(run_names()):
        try:
            created[name] = os.stat(f"{root}{name}{spec}").st_mtime_ns
        except OSError:
            with contextlib.suppress(OSError):  # damaged, or removed in the meantime
                created[name] = os.lstat(f"{root}{name}").st_mtime_ns
    return sorted(created, key=lambda name: created[name], reverse=True)


def checkpoints(name: str) -> list[str]:
    """Full paths or URIs of a run's complete checkpoints, oldest first.

    Raises:
        RunNotFoundError: there is no such run.
        RunDamagedError: the file that says where they are is damaged.
        CheckpointError: they are in an object store that cannot be reached.
    """
    return SaveFolder(find_run(name).read_tracking().save_folder).list()
