"""One chunk → tokens and loss masks: what every worker does, on this machine and on a Spark cluster.

Encoded samples are not sent between processes: a worker appends them to its own file, the spool, and returns their
lengths.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tundish.base.workers import MEMORY_BYTES, Workers, limited, no_collection, took_memory
from tundish.data.findings import Findings
from tundish.data.samples import Problem, Rules, Sample
from tundish.data.source import EMPTY, Chunk, Source
from tundish.data.tokenize import Encoded, Encoder, TargetResponses, load_encoder, texts_of
from tundish.data.tokenizer import LOAD_SECONDS
from tundish.errors import DataError, WorkerError
from tundish.plan.overrides import target_responses
from tundish.plan.spec import RunSpec, TaskType

BATCH_SAMPLES = 256
SAMPLE_SECONDS = 10.0
"""CPU time for a sample, or for a batch of short ones. A chat of a hundred turns takes a hundredth of a second."""
CHARACTERS_PER_SECOND = 200_000
"""For this many, a sample gets another second; the slowest tokenizers read five times as many."""
SAMPLE_BYTES = 1 << 30
BYTES_PER_CHARACTER = 384
"""Memory in addition to SAMPLE_BYTES, up to MEMORY_BYTES in all: `tokenizers` takes up to 300."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """How samples are encoded."""

    model: str
    """Canonical name, or folder."""
    task_type: TaskType
    context_length: int
    """Tokens in a row."""
    target_responses: TargetResponses = "all"
    """Which of the assistant's replies are targets."""

    @classmethod
    def of(cls, spec: RunSpec) -> "Job":
        """How a run encodes its samples."""
        return cls(
            model=spec.model,
            task_type=spec.task_type,
            context_length=spec.context_length,
            target_responses=target_responses(spec.overrides),
        )

    @property
    def encoder(self) -> Encoder:
        """Loaded once a process."""
        return load_encoder(self.model, self.task_type, self.target_responses)

    def prove(self, samples: Iterable[Sample]) -> None:
        """See `Encoder.prove`."""
        encoder = self.encoder
        with limited(f"model: the tokenizer of {self.model}, tried on the first samples,", LOAD_SECONDS):
            encoder.prove(samples)


@dataclass(slots=True)
class EncodedChunk:
    """The result of a chunk."""

    size: int
    """In the unit of `Chunk.size`."""
    units: int
    """Lines, rows or files."""
    samples: int = 0
    target_tokens: int = 0
    truncated: int = 0
    """Samples cut at context_length."""
    empty: int = 0
    """.txt files that hold no sample."""
    sample_lengths: "NDArray[np.int32]" = field(default_factory=lambda: np.zeros(0, np.int32))
    """Tokens of each sample before it is cut."""
    lengths: "NDArray[np.int32]" = field(default_factory=lambda: np.zeros(0, np.int32))
    """Tokens of each piece: a sample, or of raw text as much as a row takes."""
    problems: Findings = field(default_factory=Findings)
    warnings: Findings = field(default_factory=Findings)
    spool: str = ""
    """Name of the file that holds the pieces: all tokens (int32), then all loss masks (uint8)."""
    offset: int = 0
    """Of the pieces in that file, in bytes."""


def encode_chunks(
    job: Job, source: Source, chunks: Iterable[tuple[int, Chunk]], spool: Callable[[], Path | None], workers: Workers
) -> Iterator[EncodedChunk]:
    """The result of each chunk of a source. `spool` is called before each chunk, for the folder of its samples.

    Raises:
        DataError: the model's template or tokenizer takes too much memory or CPU time for a sample, or crashes.
    """
    # Workers take chunks ahead of their results: the numbers at which those begin, until their results are here.
    before = deque[int]()

    def tasks() -> Iterator[tuple[Job, Rules, Chunk, Path | None]]:
        for start, chunk in chunks:
            before.append(start)
            yield job, source.rules, chunk, spool()

    try:
        for encoded in workers.map(encode_chunk, tasks(), again=encode_each):
            before.popleft()
            yield encoded
    except WorkerError as error:
        if not isinstance(error.what, int):
            raise
        raise DataError(
            f"{source.place.of(before[0] + error.what)}: {_blamed(job)} {error.cause}. {_ADVICE}"
        ) from error


_ADVICE = "Shorten the sample or remove it, or use another model."


def _blamed(job: Job) -> str:
    return f"the model's {'chat template or ' * (job.task_type == 'CHAT_COMPLETION')}tokenizer"


def encode_each(job: Job, rules: Rules, chunk: Chunk, spool: Path | None) -> EncodedChunk:
    """As `encode_chunk`, one sample at a time: if it crashes, the sample is known."""
    return encode_chunk(job, rules, chunk, spool, 1)


@no_collection()
def encode_chunk(
    job: Job, rules: Rules, chunk: Chunk, spool: Path | None, batch_samples: int = BATCH_SAMPLES
) -> EncodedChunk:
    """Check, tokenize and cut the samples of a chunk; append them to this process's file in `spool`, if it is given."""
    encoded = EncodedChunk(chunk.size, chunk.units)
    pieces: list[Encoded] = []
    lengths: list[int] = []
    for number, sample in _encoded(job, rules, chunk, encoded, batch_samples):
        lengths.append(len(sample.tokens))
        cut = list(_cut(sample, job))
        if job.task_type != "CONTINUED_PRETRAIN":
            encoded.truncated += len(sample.tokens) > job.context_length
            # The first token of a sample is not predicted, so it is no target.
            if not cut[0].loss_mask[1:].any():
                text = (
                    f"the sample is {len(sample.tokens):,} tokens long, and none of its reply is within the first "
                    f"{job.context_length:,}. Shorten the prompt, drop the sample, or raise context_length."
                )
                encoded.problems.add(number, Problem("no target", text))
        pieces.extend(cut)
    encoded.samples, encoded.sample_lengths = len(lengths), np.array(lengths, dtype=np.int32)
    encoded.lengths = np.array([len(piece.tokens) for piece in pieces], dtype=np.int32)
    encoded.target_tokens = sum(int(piece.loss_mask.sum()) for piece in pieces)
    if spool is not None and pieces:
        encoded.spool, encoded.offset = _append(spool, pieces)
    return encoded


def _encoded(
    job: Job, rules: Rules, chunk: Chunk, encoded: EncodedChunk, batch_samples: int
) -> Iterator[tuple[int, Encoded]]:
    encoder = job.encoder
    good = _good_samples(rules, chunk, encoded, encoder)
    while batch := list(islice(good, batch_samples)):
        for (number, _), result in zip(batch, _encode(job, encoder, batch), strict=True):
            if isinstance(result, DataError):
                # The message has details of the sample; its first words are the same for all of the kind.
                encoded.problems.add(number, Problem(" ".join(result.message.split()[:5]), result.message))
            else:
                yield number, result


def _encode(job: Job, encoder: Encoder, batch: Sequence[tuple[int, Sample]]) -> list[Encoded | DataError]:
    samples = [sample for _, sample in batch]
    try:
        with limited(batch[0][0], *allowed(text for sample in samples for text in texts_of(sample))):
            return encoder.encode(samples)
    except BaseException as error:  # tokenizers raises Exception itself; a panic of its Rust code is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        if len(batch) > 1:
            # One of them is to blame; the others are good.
            return [result for numbered in batch for result in _encode(job, encoder, [numbered])]
        cause = (
            took_memory()
            if isinstance(error, MemoryError)
            else f"fails on the sample ({' '.join(str(error).split())[:200]})"
        )
        return [DataError(f"{_blamed(job)} {cause}. {_ADVICE}")]


def allowed(texts: Iterable[str]) -> tuple[float, int]:
    """Limits of a template or a tokenizer for texts: seconds of CPU time, and bytes of memory."""
    characters = sum(map(len, texts))
    memory = min(MEMORY_BYTES, SAMPLE_BYTES + characters * BYTES_PER_CHARACTER)
    return SAMPLE_SECONDS + characters / CHARACTERS_PER_SECOND, memory


def _good_samples(rules: Rules, chunk: Chunk, encoded: EncodedChunk, encoder: Encoder) -> Iterator[tuple[int, Sample]]:
    for number, sample in chunk.samples(rules):
        if isinstance(sample, Problem):
            encoded.problems.add(number, sample)
        elif sample == EMPTY:
            encoded.empty += 1
        else:
            if (token := encoder.control_token(sample)) is not None:
                encoded.warnings.add(number, _control_token(token, rules.task_type))
            yield number, sample


def _control_token(token: str, task_type: TaskType) -> Problem:
    if task_type == "CHAT_COMPLETION":
        text = (
            f"a message contains {token!r}, a control token of the model. It is kept as plain text and has no effect."
        )
    else:
        text = f"contains {token!r}, a control token of the model. It acts as one, as no template is applied."
    return Problem("control token", f"{text} Remove it if it is not intended.")


def _cut(sample: Encoded, job: Job) -> Iterator[Encoded]:
    """The parts of a sample that go into rows: its beginning; of raw text everything, in pieces of at most a row."""
    length = len(sample.tokens) if job.task_type == "CONTINUED_PRETRAIN" else 1
    for start in range(0, length, job.context_length):
        end = start + job.context_length
        yield Encoded(sample.tokens[start:end], sample.loss_mask[start:end])


def _append(spool: Path, pieces: Sequence[Encoded]) -> tuple[str, int]:
    name = f"{os.getpid()}.spool"
    with open(spool / name, "ab") as file:
        offset = file.tell()
        file.write(np.concatenate([piece.tokens for piece in pieces]).tobytes())
        file.write(np.concatenate([piece.loss_mask for piece in pieces]).tobytes())
    return name, offset
