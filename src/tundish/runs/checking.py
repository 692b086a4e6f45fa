"""The data that a call names: what is wrong with its paths, and with its rows."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from tundish.errors import DataError, SpecError
from tundish.models import ModelCard
from tundish.overrides import target_responses
from tundish.paths import REMOTE_SCHEMES, resolve
from tundish.spec import RunSpec, TaskType

if TYPE_CHECKING:
    from tundish.data.encoding import Job
    from tundish.data.report import Report
    from tundish.data.sources import Source

Tell = Callable[[int, int | None], None]
BarOf = Callable[[str], AbstractContextManager[Tell]]
"""Makes a progress bar with a title; entered, it is told how much is done, and of how much."""


def no_bar(title: str) -> AbstractContextManager[Tell]:
    """Progress for nobody."""
    return nullcontext(lambda done, total: None)


@dataclass(slots=True)
class CheckedData:
    """What was found in training and evaluation data."""

    problems: list[str] = field(default_factory=list[str])
    """Of the paths, and of the tokenizer."""
    reports: "list[Report]" = field(default_factory=list)
    """Of the rows."""


def job_of(spec: RunSpec) -> "Job":
    """What a run makes of its samples."""
    from tundish.data.encoding import Job

    return Job(
        model=spec.model,
        task_type=spec.task_type,
        context_length=spec.context_length,
        target_responses=target_responses(spec.overrides),
    )


def check_data(
    arguments: Mapping[str, Any], parsed: tuple[RunSpec, ModelCard] | None, *, rows: bool, progress: BarOf = no_bar
) -> CheckedData:
    """Open the sources that the arguments of `create()` name, and with `rows` prepare them.

    Where other arguments are wrong (`parsed` is None), only the structure of the rows is checked: nothing can be
    tokenized then.
    """
    found = CheckedData()
    for name, given in _named_paths(arguments):
        try:
            source = _open(given, arguments.get("task_type") or "CHAT_COMPLETION", parsed)
            if rows and source is not None:
                with progress(f"Checking {name}") as tell:
                    found.reports.append(_report(name, source, parsed, tell))
        except SpecError as error:
            found.problems.extend(
                problem if problem.startswith("model:") else f"{name}: {problem}" for problem in error.problems
            )
        except DataError as error:
            found.problems.extend(f"{name}: {problem}" for problem in error.problems)
        except (OSError, ValueError) as error:
            found.problems.append(f"{name}: cannot be read ({error}). Check the path.")
    found.problems = list(dict.fromkeys(found.problems))  # the tokenizer's would be there twice
    return found


def _named_paths(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("train_data_path", "eval_data_path"):
        given = arguments.get(name)
        # What is no text is told by the spec's own check.
        if given and isinstance(given, str | Path):
            yield name, str(given)


def _open(given: str, task_type: str, parsed: tuple[RunSpec, ModelCard] | None) -> "Source | None":
    from tundish.data.sources import open_source

    if task_type not in get_args(TaskType):
        # What it should hold cannot be told, but whether it is there.
        if not given.startswith(REMOTE_SCHEMES) and not Path(resolve(given)).exists():
            raise SpecError(f"{given}: there is no such file or folder. Check the path.")
        return None
    return open_source(given, cast(TaskType, task_type), system_message=parsed is None or parsed[1].system_message)


def _report(name: str, source: "Source", parsed: tuple[RunSpec, ModelCard] | None, tell: Tell) -> "Report":
    from tundish.data import check_structure
    from tundish.data.report import report_of, report_on

    if parsed is None:
        return report_of(name, source, check_structure(source), [])
    return report_on(name, source, job_of(parsed[0]), parsed[0].data_prep_cluster_id, tell)
