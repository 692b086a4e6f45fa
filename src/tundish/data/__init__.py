"""Preparation: source → checked samples → tokens + loss mask → packed rows → MDS shards.

The prepared folder is shared: it is named after all that decides its content, so the same inputs are prepared once.
"""

import hashlib
import importlib.metadata
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tundish.base.files import locked, make_folder, write_atomic
from tundish.base.home import prepared_dir
from tundish.base.workers import Bars, Workers, guarded, no_collection
from tundish.data.chunks import EMPTY, Chunk
from tundish.data.encoding import EncodedChunk, Job
from tundish.data.findings import Finding, Findings
from tundish.data.samples import Problem, Rules, Sample
from tundish.data.share import Progress, Share, prepare_share
from tundish.data.sources import Source, may_be_table, open_source
from tundish.data.templates import TEMPLATE_DATE
from tundish.data.tokenizer import CHATML_ADDED
from tundish.errors import DataError, LockHeldError, StageError

log = logging.getLogger(__name__)

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
NO_SAMPLE = "{}: there is no sample in it; all is empty. Give data with samples."


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """The manifest of a prepared folder."""

    folder: str
    samples: int
    rows: int
    tokens: int
    target_tokens: int
    truncated: int
    """Samples cut at context_length."""
    context_length: int
    source_hash: str
    tokenizer_hash: str
    chatml_added: bool
    """Whether the tokenizer had no chat template and got ChatML."""
    units: int
    """Lines, rows or files, blank ones too."""
    refused: int = 0
    """Empty .txt files, which hold no sample; a bad sample is an error."""
    warnings: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """What was found that is no problem: rule, text and the numbers of the samples."""
    engine: str = "tokenizers"
    """The library that turned text into ids; both give the same."""
    template_date: str = TEMPLATE_DATE
    format_version: int = FORMAT_VERSION
    versions: dict[str, str]
    """Of the packages that decide the bytes."""

    @classmethod
    def read(cls, folder: Path) -> "Prepared":
        """The manifest of a complete prepared folder."""
        content = json.loads((folder / MANIFEST).read_text())
        # The folder may have been moved since.
        return cls(**{**content, "folder": str(folder)})

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that are used, 0 … 1."""
        return self.tokens / (self.rows * self.context_length)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What preparation found: the prepared data, or problems."""

    prepared: Prepared | None
    """None where there are problems."""
    total: int
    """Lines, rows or files that were read."""
    samples: int
    problems: list[Finding]
    warnings: list[Finding]


def prepare(
    source: Source, job: Job, cluster: str | None = None, progress: Progress = lambda done, total: None
) -> Prepared:
    """Tokenize and pack `source`; reuse what was prepared from identical inputs.

    Raises:
        DataError: with all problems of the data; nothing is left behind.
    """
    outcome = examine(source, job, cluster, progress)
    if outcome.prepared is None:
        raise DataError([finding.message for finding in outcome.problems])
    return outcome.prepared


def prepare_guarded(
    given: str,
    job: Job,
    cluster: str | None = None,
    progress: Progress = lambda done, total: None,
    *,
    system_message: bool,
) -> Prepared:
    """`prepare`, for data at an address, with what others wrote in a process of its own.

    Raises:
        DataError, SpecError: as of `prepare` and `open_source`.
        WorkerError: the data or the model's tokenizer takes too much, or ends its process.
    """
    if cluster is None:
        tables = may_be_table(given)
        return guarded(
            _open_and_prepare, given, job, system_message, progress=lambda _: nullcontext(progress), tables=tables
        )
    # Its session is this process's. Tasks are processes of their own; here, too, the tokenizer is loaded after all.
    guarded(_load, job)
    return _open_and_prepare(given, job, system_message, cluster, progress=lambda _: nullcontext(progress))


def _open_and_prepare(
    given: str, job: Job, system_message: bool, cluster: str | None = None, *, progress: Bars
) -> Prepared:
    source = open_source(given, job.task_type, system_message=system_message)
    with progress("") as tell:
        return prepare(source, job, cluster, tell)


def _load(job: Job) -> None:
    assert job.encoder


def examine(
    source: Source, job: Job, cluster: str | None = None, progress: Progress = lambda done, total: None
) -> Outcome:
    """Prepare `source`, and say what was found in it.

    Args:
        source: the samples.
        job: what is to be made of them.
        cluster: a Spark master that prepares them; None: this machine does.
        progress: told how far it is.

    Raises:
        DataError: there is no sample, data is damaged, or was changed while it was read.
        StageError: there is no room or right to write, or a worker was killed.
    """
    state = source.state()
    facts = _facts(source, job)
    key = json.dumps([facts, asdict(source.rules), job.target_responses, bool(cluster), TEMPLATE_DATE, FORMAT_VERSION])
    folder = prepared_dir() / hashlib.sha256(key.encode()).hexdigest()[:24]
    make_folder(folder.parent)
    _clear_stale(folder.parent)
    # A second run with the same data waits for the first; the lock of a process that dies is free.
    with locked(_lock(folder)):
        if (folder / MANIFEST).exists():
            log.info("Reusing %s: the same data was prepared before.", folder)
            return _outcome(source, Prepared.read(folder))
        try:
            return _prepare_new(source, job, cluster, folder, facts, state, progress)
        except OSError as error:
            raise StageError(
                f"preparing the data in {folder.parent} failed: {error}. Check its room and rights."
            ) from error


def _outcome(source: Source, prepared: Prepared) -> Outcome:
    """What there is to say of data that was prepared before."""
    warnings = Findings.of(prepared.warnings).findings(source.place, prepared.units)
    return Outcome(prepared=prepared, total=prepared.units, samples=prepared.samples, problems=[], warnings=warnings)


def _prepare_new(
    source: Source,
    job: Job,
    cluster: str | None,
    folder: Path,
    facts: dict[str, Any],
    state: object,
    progress: Progress,
) -> Outcome:
    with _beside(folder) as beside:
        share = _share(source, job, cluster, beside, _logged(progress))
        if source.state() != state:
            raise DataError(f"{source.place.source}: changed while it was read. Try again when it is complete.")
        if not share.problems:
            prepared = _prepared(folder, share, job, facts)
            _write_index(beside, share)
            write_atomic(beside / MANIFEST, json.dumps(asdict(prepared), indent=2) + "\n")
            beside.rename(folder)
            return _outcome(source, prepared)
    problems, warnings = (found.findings(source.place, share.units) for found in (share.problems, share.warnings))
    return Outcome(prepared=None, total=share.units, samples=share.samples, problems=problems, warnings=warnings)


def _lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _clear_stale(parent: Path) -> None:
    """Remove what killed processes left half written: its lock is free."""
    for stale in parent.glob(".*.tmp"):
        with suppress(LockHeldError), locked(_lock(parent / stale.name.split(".")[1]), timeout=0):
            shutil.rmtree(stale, ignore_errors=True)


def check_structure(source: Source) -> Outcome:
    """What can be said of a source without a tokenizer: whether its lines or rows are samples.

    Raises:
        DataError: compressed data is damaged.
    """
    share = Share()
    with Workers() as workers:
        for found in workers.map(_structure, ((chunk, source.rules) for chunk in source.chunks())):
            share.add(found)
    if not share.samples and not share.problems:
        raise DataError(NO_SAMPLE.format(source.place.source))
    problems = share.problems.findings(source.place, share.units)
    return Outcome(prepared=None, total=share.units, samples=share.samples, problems=problems, warnings=[])


def _structure(chunk: Chunk, rules: Rules) -> EncodedChunk:
    found = EncodedChunk(chunk.size, chunk.units)
    with no_collection():
        for number, sample in chunk.samples(rules):
            if isinstance(sample, Problem):
                found.problems.add(number, sample)
            else:
                found.samples += sample != EMPTY
    return found


def _facts(source: Source, job: Job) -> dict[str, Any]:
    packages = ("jinja2", "mosaicml-streaming", "tiktoken", "tokenizers", "transformers")
    return {
        "source_hash": source.digest(),
        "tokenizer_hash": job.encoder.digest,
        "context_length": job.context_length,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _share(source: Source, job: Job, cluster: str | None, folder: Path, progress: Progress) -> Share:
    if cluster is not None:
        from tundish.data.spark import prepare_on_cluster

        share = prepare_on_cluster(job, source, folder, cluster, progress)
    else:
        job.prove(first_samples(source))
        # Loaded before the workers are forked, so that they have it.
        import streaming  # noqa: F401

        with Workers() as workers:
            share = prepare_share(job, source, folder, workers, progress)
    if not share.samples and not share.problems:
        raise DataError(NO_SAMPLE.format(source.place.source))
    return share


def first_samples(source: Source) -> Iterator[Sample]:
    """The good samples at the beginning of a source."""
    chunks = islice(source.chunks(), 1)
    samples = chain.from_iterable(chunk.samples(source.rules) for chunk in chunks)
    return (sample for _, sample in samples if sample and not isinstance(sample, Problem))


def _prepared(folder: Path, share: Share, job: Job, facts: dict[str, Any]) -> Prepared:
    return Prepared(
        folder=str(folder), samples=share.samples, rows=share.rows, tokens=share.tokens, units=share.units,
        target_tokens=share.target_tokens, truncated=share.truncated, refused=share.empty,
        warnings=share.warnings.to_records(),
        chatml_added=hasattr(job.encoder.tokenizer, CHATML_ADDED), engine=job.encoder.engine, **facts,
    )  # fmt: skip


def _write_index(folder: Path, share: Share) -> None:
    """The index that makes MDS files a data set (Streaming, `MDSWriter`)."""
    index = json.dumps({"version": 2, "shards": share.shards}, sort_keys=True)
    write_atomic(folder / "index.json", index)


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A folder to write in, to be renamed; gone after this if it was not. Who holds the lock is alone with it."""
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _logged(progress: Progress) -> Progress:
    """`progress`, with a word in the log every ten seconds."""
    last_word = time.monotonic()

    def tell(done: int, total: int | None) -> None:
        nonlocal last_word
        progress(done, total)
        if time.monotonic() - last_word > 10:
            last_word = time.monotonic()
            log.info("Prepared %s", f"{done / total:.0%} of the data." if total else f"{done:,} so far.")

    return tell
