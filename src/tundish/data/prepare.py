"""Preparation: source → checked samples → tokens + loss mask → packed rows → MDS shards.

The prepared folder is shared by all runs: its name is a hash of everything that decides its content, so the same inputs
are prepared once.
"""

import hashlib
import importlib
import importlib.metadata
import json
import logging
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tundish.base.files import make_folder, new_folder, remove_half_made, write_atomic
from tundish.base.home import prepared_dir
from tundish.base.progress import Bars, Progress, no_progress
from tundish.base.workers import Workers, guarded
from tundish.data.encoding import Job
from tundish.data.findings import Findings, Outcome
from tundish.data.manifest import FORMAT_VERSION, MANIFEST, Prepared
from tundish.data.opening import may_be_table, open_source
from tundish.data.shards import PartResult, write_shards
from tundish.data.source import NO_SAMPLE, Source, first_samples
from tundish.data.templates import TEMPLATE_DATE
from tundish.data.tokenizer import CHATML_ADDED
from tundish.errors import DataError, FolderExistsError, StageError

log = logging.getLogger(__name__)
PACKAGES = ("jinja2", "mosaicml-streaming", "tiktoken", "tokenizers", "transformers")
"""Packages that decide the bytes of what is prepared."""
LOG_SECONDS = 10.0


def prepare(source: Source, job: Job, cluster: str | None = None, progress: Progress = no_progress) -> Prepared:
    """Tokenize and pack `source`, or reuse what was prepared from identical inputs.

    Raises:
        DataError: with all problems of the data; nothing is left behind.
    """
    outcome = examine(source, job, cluster, progress)
    if outcome.prepared is None:
        raise DataError([finding.message for finding in outcome.problems])
    return outcome.prepared


def prepare_guarded(
    given: str, job: Job, cluster: str | None = None, progress: Progress = no_progress, *, system_message: bool
) -> Prepared:
    """`prepare` for the data at an address; files that others wrote are read in a process of its own.

    Raises:
        DataError, SpecError: as `prepare` and `open_source`.
        WorkerError: the data or the model's tokenizer takes too much, or ends its process.
    """

    def bar(_: str) -> Any:
        return nullcontext(progress)

    if cluster is None:
        return guarded(_open_and_prepare, given, job, system_message, progress=bar, tables=may_be_table(given))
    # A Spark session belongs to this process, and its tasks are processes of their own. So that a tokenizer that
    # crashes its process does not crash this one, it is tried in another before it is loaded here.
    guarded(_load, job)
    return _open_and_prepare(given, job, system_message, cluster, progress=bar)


def _open_and_prepare(
    given: str, job: Job, system_message: bool, cluster: str | None = None, *, progress: Bars
) -> Prepared:
    source = open_source(given, job.task_type, system_message=system_message)
    with progress("") as report:
        return prepare(source, job, cluster, report)


def _load(job: Job) -> None:
    assert job.encoder


class _HasProblems(Exception):
    """Ends the block that creates a folder, so that none is created."""


def examine(source: Source, job: Job, cluster: str | None = None, progress: Progress = no_progress) -> Outcome:
    """Prepare `source`, and return what was found in it: the prepared data, or all problems.

    Args:
        source: the samples.
        job: what is made of them.
        cluster: the Spark master that prepares them; None: this machine does.
        progress: called with how much of the source is done.

    Raises:
        DataError: there is no sample, the data is damaged, or it was changed while it was read.
        StageError: there is no space or no permission to write, or a worker was killed.
    """
    state = source.state()
    facts: dict[str, Any] = {
        "source_hash": source.digest(),
        "tokenizer_hash": job.encoder.digest,
        "context_length": job.context_length,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    key = json.dumps([facts, asdict(source.rules), job.target_responses, bool(cluster), TEMPLATE_DATE, FORMAT_VERSION])
    folder = prepared_dir() / hashlib.sha256(key.encode()).hexdigest()[:24]
    result = PartResult()
    try:
        make_folder(folder.parent)
        remove_half_made(folder.parent)
        with new_folder(folder, wait=True) as beside:
            result = _write_shards(source, job, cluster, beside, _logged(progress))
            if source.state() != state:
                raise DataError(f"{source.place.source}: changed while it was read. Try again when it is complete.")
            if result.problems:
                raise _HasProblems
            # What makes MDS files a data set for Streaming, as its own `MDSWriter` writes it.
            index = {"version": 2, "shards": result.shards}
            write_atomic(beside / "index.json", json.dumps(index, sort_keys=True))
            manifest = json.dumps(asdict(_manifest(folder, result, job, facts)), indent=2)
            write_atomic(beside / MANIFEST, manifest + "\n")
    except FolderExistsError:
        log.info("Reusing %s: the same data was prepared before.", folder)
    except _HasProblems:
        problems, warnings = (some.findings(source.place, result.units) for some in (result.problems, result.warnings))
        return Outcome(prepared=None, total=result.units, samples=result.samples, problems=problems, warnings=warnings)
    except OSError as error:
        raise StageError(
            f"preparing the data in {folder.parent} failed: {error}. Check its free space and permissions."
        ) from error
    prepared = Prepared.read(folder)
    warnings = Findings.of(prepared.warnings).findings(source.place, prepared.units)
    return Outcome(prepared=prepared, total=prepared.units, samples=prepared.samples, problems=[], warnings=warnings)


def _write_shards(source: Source, job: Job, cluster: str | None, folder: Path, progress: Progress) -> PartResult:
    if cluster is not None:
        from tundish.data.spark import prepare_on_cluster

        result = prepare_on_cluster(job, source, folder, cluster, progress)
    else:
        job.prove(first_samples(source))
        # Loaded before the workers are forked, so that they have it.
        importlib.import_module("streaming")

        with Workers() as workers:
            result = write_shards(job, source, folder, workers, progress)
    if not result.samples and not result.problems:
        raise DataError(NO_SAMPLE.format(source.place.source))
    return result


def _manifest(folder: Path, result: PartResult, job: Job, facts: dict[str, Any]) -> Prepared:
    return Prepared(
        folder=str(folder), samples=result.samples, rows=result.rows, tokens=result.tokens, units=result.units,
        target_tokens=result.target_tokens, truncated=result.truncated, refused=result.empty,
        warnings=result.warnings.to_records(),
        chatml_added=hasattr(job.encoder.tokenizer, CHATML_ADDED), engine=job.encoder.engine, **facts,
    )  # fmt: skip


def _logged(progress: Progress) -> Progress:
    """`progress` that is also logged, every LOG_SECONDS."""
    last = time.monotonic()

    def report(done: int, total: int | None) -> None:
        nonlocal last
        progress(done, total)
        if time.monotonic() - last > LOG_SECONDS:
            last = time.monotonic()
            log.info("Prepared %s", f"{done / total:.0%} of the data." if total else f"{done:,} so far.")

    return report
