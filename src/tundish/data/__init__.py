"""Preparation: source → checked samples → tokens + loss mask → packed rows → MDS shards.

The prepared folder is shared: it is named after all that decides its content, so the same inputs are prepared once.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tundish.data.pack import pack
from tundish.data.records import Problem, ProblemList, Sample
from tundish.data.sources import Source
from tundish.data.tokenize import CHATML, TEMPLATE_DATE, Encoded, encode, load_tokenizer, tokenizer_digest
from tundish.errors import DataError
from tundish.paths import prepared_dir, write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
COLUMNS = {"tokens": "ndarray:int32", "loss_mask": "ndarray:uint8", "segments": "ndarray:int32"}
SHARD_BYTES = 1 << 26
BATCH_SAMPLES = 1024
MANIFEST = "manifest.json"


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
    refused: int = 0
    """Empty .txt files, which hold no sample; a bad sample is an error."""
    template_date: str = TEMPLATE_DATE
    format_version: int = FORMAT_VERSION
    versions: dict[str, str]
    """Of the packages that decide the bytes."""

    @classmethod
    def read(cls, folder: Path) -> "Prepared":
        """The manifest of a complete prepared folder."""
        # The folder may have been moved since.
        return cls(**{**json.loads((folder / MANIFEST).read_text()), "folder": str(folder)})

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that are used, 0 … 1."""
        return self.tokens / (self.rows * self.context_length)


def prepare(source: Source, model: str, context_length: int) -> Prepared:
    """Tokenize and pack `source` for `model`; reuse what was prepared from identical inputs.

    Raises:
        DataError: with all problems of the data; nothing is left behind.
    """
    tokenizer = load_tokenizer(model, source.task_type)
    facts: dict[str, Any] = {
        "source_hash": source.digest(),
        "tokenizer_hash": tokenizer_digest(tokenizer),
        "context_length": context_length,
        "versions": {
            name: importlib.metadata.version(name) for name in ("tokenizers", "transformers", "mosaicml-streaming")
        },
    }
    key = json.dumps([facts, source.task_type, TEMPLATE_DATE, FORMAT_VERSION], sort_keys=True)
    folder = prepared_dir() / hashlib.sha256(key.encode()).hexdigest()[:24]
    if (folder / MANIFEST).exists():
        log.info("Reusing %s: the same data was prepared before.", folder)
        return Prepared.read(folder)
    samples, truncated = _encode_source(source, tokenizer, context_length)
    rows = pack([len(sample.tokens) for sample in samples.pieces], context_length)
    facts |= {"chatml_added": tokenizer.chat_template == CHATML}
    if source.task_type == "CONTINUED_PRETRAIN":
        facts["refused"] = len(source.files) - samples.count
    prepared = Prepared(
        folder=str(folder), samples=samples.count, rows=len(rows), truncated=truncated, **facts,
        tokens=sum(len(piece.tokens) for piece in samples.pieces),
        target_tokens=sum(int(piece.loss_mask.sum()) for piece in samples.pieces),
    )  # fmt: skip
    _publish(prepared, samples.pieces, rows)
    return prepared


@dataclass(slots=True)
class _Pieces:
    """Encoded samples no longer than a row; `count` is the number of samples that they come from."""

    pieces: list[Encoded]
    count: int = 0


def _encode_source(source: Source, tokenizer: "PreTrainedTokenizerBase", context_length: int) -> tuple[_Pieces, int]:
    found, truncated = _Pieces([]), 0
    unit = "file" if source.task_type == "CONTINUED_PRETRAIN" else "line"
    problems = ProblemList(source.path.name, unit)
    last_word = time.monotonic()
    for number, sample in _encoded(source, tokenizer, problems):
        found.count += 1
        if source.task_type == "CONTINUED_PRETRAIN":
            found.pieces.extend(_split(sample, context_length))
        else:
            truncated += len(sample.tokens) > context_length
            cut = Encoded(sample.tokens[:context_length], sample.loss_mask[:context_length])
            found.pieces.append(cut)
            if not cut.loss_mask[1:].any():
                problems.add(number, _no_target(len(sample.tokens), context_length))
        if time.monotonic() - last_word > 5:
            last_word = time.monotonic()
            log.info("Tokenized %s samples so far.", f"{found.count:,}")
    if problems:
        raise DataError(problems.messages(sum(1 for _ in source.samples())))
    return found, truncated


def _no_target(length: int, context_length: int) -> Problem:
    text = (
        f"the sample is {length:,} tokens long and nothing of its reply is left in the first {context_length:,}. "
        "Shorten the prompt, drop the line, or raise context_length."
    )
    return Problem("no target", text)


def _encoded(
    source: Source, tokenizer: "PreTrainedTokenizerBase", problems: ProblemList
) -> Iterator[tuple[int, Encoded]]:
    for batch in _batches(source):
        samples = [sample for _, sample in batch]
        try:
            encoded = encode(tokenizer, samples, source.task_type)
        except DataError:
            encoded = []
        if encoded:
            yield from ((number, sample) for (number, _), sample in zip(batch, encoded, strict=True))
            continue
        # One sample of the batch cannot be templated: find out which.
        for number, sample in batch:
            try:
                yield number, encode(tokenizer, [sample], source.task_type)[0]
            except DataError as error:
                problems.add(number, Problem(error.message, error.message))


def _batches(source: Source) -> Iterator[tuple[tuple[int, Sample], ...]]:
    """The source's samples, BATCH_SAMPLES at a time."""
    samples = source.samples()
    while batch := tuple(islice(samples, BATCH_SAMPLES)):
        yield batch


def _split(sample: Encoded, context_length: int) -> Iterator[Encoded]:
    """Pieces of at most a row: raw text is cut, and its tail is kept."""
    for start in range(0, len(sample.tokens), context_length):
        end = start + context_length
        yield Encoded(sample.tokens[start:end], sample.loss_mask[start:end])


def _publish(prepared: Prepared, samples: list[Encoded], rows: list[list[int]]) -> None:
    """Write beside the folder and rename: it is complete, or not there."""
    from streaming import MDSWriter

    folder = Path(prepared.folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    # Of a run that was killed and had the same process id, as happens in containers.
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with MDSWriter(out=str(beside), columns=COLUMNS, size_limit=SHARD_BYTES, progress_bar=False) as writer:
            for row in rows:
                writer.write(pack_row([samples[number] for number in row]))
        write_atomic(beside / MANIFEST, json.dumps(asdict(prepared), indent=2) + "\n")
        try:
            beside.rename(folder)
        except OSError:
            # Another run prepared the same data at the same time and was first.
            if not (folder / MANIFEST).exists():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def pack_row(samples: list[Encoded]) -> dict[str, Any]:
    """One row: `tokens` int32 [n], `loss_mask` uint8 [n], `segments` int32 [k] with the k samples' lengths.

    Samples of one token come last: positions 0, 0, 1, 2 … never fall, and FlashAttention would take such a row for one
    sample.
    """
    samples = sorted(samples, key=lambda sample: len(sample.tokens) == 1)
    return {
        "tokens": np.concatenate([sample.tokens for sample in samples]),
        "loss_mask": np.concatenate([sample.loss_mask for sample in samples]),
        "segments": np.array([len(sample.tokens) for sample in samples], dtype=np.int32),
    }
