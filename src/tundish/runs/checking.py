"""Checks of the data that a call names: its addresses, its rows, and whether the eval prompts fit."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tundish.errors import DataError, InputError, SpecError, WorkerError
from tundish.plan.address import Address
from tundish.plan.spec import ANSWER_TOKENS, Arguments, RunSpec, TaskType

if TYPE_CHECKING:
    from tundish.data.encoding import Job
    from tundish.data.report import Report
    from tundish.data.source import Source

Tell = Callable[[int, int | None], None]
BarOf = Callable[[str], AbstractContextManager[Tell]]
"""Makes a progress bar with a title; entered, it is called with how much is done, and of how much."""


def no_bar(title: str) -> AbstractContextManager[Tell]:
    """Progress that is not shown."""
    return nullcontext(lambda done, total: None)


@dataclass(slots=True)
class CheckedData:
    """The results of checking training and evaluation data."""

    problems: list[str] = field(default_factory=list[str])
    """With the addresses and the tokenizer."""
    reports: "list[Report]" = field(default_factory=list)
    """On the rows."""
    unreadable: list[str] = field(default_factory=list[str])
    """Problems of data on which there is no report: it is damaged, or has nothing but blank lines."""

    @property
    def row_problems(self) -> list[str]:
        """What is wrong with the data itself."""
        return [*self.unreadable, *(message for report in self.reports for message in report.messages)]


def check_data(
    read: Arguments, *, complete: bool, rows: bool, most: float = math.inf, progress: BarOf = no_bar
) -> CheckedData:
    """Open the sources that the arguments of `create()` name, and with `rows` look at every one.

    They are prepared, too, unless one has more than `most` bytes: then, where the arguments are not `complete` (others
    are wrong), and where a source cannot be opened or the tokenizer not be loaded, only their structure is checked.
    """
    from tundish.base.workers import guarded
    from tundish.data.opening import may_be_table

    spec = read.spec if complete else None
    if spec is not None and spec.data_prep_cluster_id and rows:
        # The Spark session belongs to this process.
        return _check_data(read, spec, rows, most, progress)
    if spec is not None and rows and _is_small(read.data.values(), most):
        # Imported here, so that the process that is forked next has them, too.
        import streaming
        from transformers import AutoTokenizer

        assert streaming
        assert AutoTokenizer
    try:
        tables = any(may_be_table(address) for address in read.data.values())
        return guarded(_check_data, read, spec, rows, most, progress=progress, tables=tables)
    except WorkerError as error:
        return CheckedData(problems=[error.message])


def _is_small(addresses: Iterable[Address], most: float) -> bool:
    """Whether all of the data is files of this machine of at most `most` bytes."""
    try:
        files = [address.path for address in addresses]
        return bool(files) and all(file.is_file() and file.stat().st_size <= most for file in files)
    except (SpecError, OSError):
        return False  # reported when it is opened


def _check_data(read: Arguments, spec: RunSpec | None, rows: bool, most: float, progress: BarOf) -> CheckedData:
    data = CheckedData()
    sources = dict[str, "Source"]()
    system_message = spec is None or read.card is None or read.card.system_message
    for name, address in read.data.items():
        with collected(data, name):
            if (source := _open(address, read.task_type, system_message)) is not None:
                sources[name] = source
    if not rows:
        return data
    small = all((source.size or 0) <= most for source in sources.values())
    job = None
    if spec is not None and not data.problems and (small or spec.eval_prompts):
        with collected(data, "model"):
            from tundish.data.encoding import Job

            job = Job.of(spec)
            data.problems.extend(_prompt_problems(spec, job))
    for name, source in sources.items():
        with collected(data, name):
            to_prepare = job if small and not data.problems else None
            cluster = None if spec is None else spec.data_prep_cluster_id
            data.reports.append(_report(name, source, to_prepare, cluster, progress))
    return data


def _prompt_problems(spec: RunSpec, job: "Job") -> list[str]:
    """Eval prompts that leave no room in the context for a completion."""
    from tundish.base.workers import guarded, limited
    from tundish.data.encoding import allowed

    if spec.data_prep_cluster_id:
        spec = replace(spec, data_prep_cluster_id=None)
        return guarded(_prompt_problems, spec, job)
    room = spec.context_length - ANSWER_TOKENS
    tokenizer: Any = job.encoder.tokenizer
    lengths = list[tuple[int, int]]()
    for number, prompt in enumerate(spec.eval_prompts, 1):
        with limited(f"eval_prompts: the model's tokenizer, at prompt {number},", *allowed([prompt])):
            lengths.append((number, len(tokenizer(prompt)["input_ids"])))
    return [
        f"eval_prompts: prompt {number} has {length:,} tokens; with a completion of {ANSWER_TOKENS}, at most "
        f"{max(0, room):,} fit into the context of {spec.context_length:,}. Shorten it, or raise context_length."
        for number, length in lengths
        if length > room
    ]


@contextmanager
def collected(data: CheckedData, name: str) -> Iterator[None]:
    """Turn errors into problems of an argument."""
    try:
        yield
    except InputError as error:
        prefix = f"{name}: "
        kind = data.unreadable if isinstance(error, DataError) else data.problems
        kind.extend(prefix + problem.removeprefix(prefix) for problem in error.problems)
    except WorkerError as error:
        data.problems.append(error.message)
    except (OSError, ValueError) as error:
        data.problems.append(f"{name}: cannot be read ({error}). Check the path.")


def _open(address: Address, task_type: TaskType | None, system_message: bool) -> "Source | None":
    from tundish.data.opening import open_source

    if task_type is None:
        # What the data should hold is not known, but whether it is there.
        if address.kind == "path" and not address.path.exists():
            raise SpecError(f"{address.given}: there is no such file or folder ({address.places}). Check the path.")
        return None
    return open_source(address, task_type, system_message=system_message)


def _report(name: str, source: "Source", job: "Job | None", cluster: str | None, progress: BarOf) -> "Report":
    from tundish.data.report import report_of, report_on
    from tundish.data.structure import check_structure

    if job is None:
        return report_of(name, source, check_structure(source), [])
    with progress(f"Preparing {name}") as update:
        return report_on(name, source, job, cluster, update)
