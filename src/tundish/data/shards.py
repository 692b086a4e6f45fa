"""A share of the data → MDS shards: all of the data on this machine, or the part of one Spark task.

There are two passes: every chunk is encoded into a spool file; once all lengths are known, samples are packed, and each
shard is written from the spool. Memory holds lengths, never tokens.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tundish.base.progress import Progress
from tundish.base.workers import Workers
from tundish.data.encoding import EncodedChunk, Job, encode_chunks
from tundish.data.findings import Findings
from tundish.data.pack import pack
from tundish.data.source import Source, numbered
from tundish.data.tokenize import Encoded

COLUMNS = {"tokens": "ndarray:int32", "loss_mask": "ndarray:uint8", "segments": "ndarray:int32"}
SHARD_BYTES = 1 << 26
SPOOL = "spool"


@dataclass(slots=True)
class PartResult:
    """The result of a share."""

    units: int = 0
    samples: int = 0
    rows: int = 0
    tokens: int = 0
    target_tokens: int = 0
    truncated: int = 0
    empty: int = 0
    problems: Findings = field(default_factory=Findings)
    warnings: Findings = field(default_factory=Findings)
    shards: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Entries of MDS's index, in order; `raw_data.basename` is a file of the share's folder."""

    def add(self, other: "PartResult | EncodedChunk") -> None:
        """Add the result of what follows in the data."""
        self.problems.extend(other.problems, self.units)
        self.warnings.extend(other.warnings, self.units)
        for name in ("units", "samples", "target_tokens", "truncated", "empty"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if isinstance(other, PartResult):
            self.rows, self.tokens = self.rows + other.rows, self.tokens + other.tokens
            self.shards.extend(other.shards)
        else:
            self.tokens += int(other.lengths.sum())


def write_shards(job: Job, source: Source, folder: Path, workers: Workers, progress: Progress) -> PartResult:
    """Write the shards of a source's samples into `folder`, which exists; none if there are problems."""
    result, spooled = PartResult(), list[EncodedChunk]()
    spool = folder / SPOOL
    spool.mkdir()
    done, total = 0, source.size
    # After a problem no shards will be written; the rest of the data is only checked.
    chunks = numbered(source.chunks())
    for chunk in encode_chunks(job, source, chunks, lambda: None if result.problems else spool, workers):
        result.add(chunk)
        if not result.problems and len(chunk.lengths):
            spooled.append(chunk)
        done += chunk.size
        progress(done, total)
    if not result.problems:
        where = _Where.of(spooled)
        rows = pack(where.lengths, job.context_length)
        result.rows = len(rows)
        # Rows in a shard, at 5 bytes a token: a fixed number, so that where shards end depends on the data alone.
        size = max(1, SHARD_BYTES // (5 * job.context_length))
        batches = (rows[start : start + size] for start in range(0, len(rows), size))
        tasks = ((where.part(batch), folder, number) for number, batch in enumerate(batches))
        result.shards = list(workers.map(write_shard, tasks))
    shutil.rmtree(spool)
    return result


@dataclass(frozen=True, slots=True)
class _Where:
    """Where the pieces of some rows are in the spool: arrays of one entry a piece."""

    files: list[str]
    file: NDArray[np.int32]
    """Index into `files`."""
    tokens: NDArray[np.int64]
    """Offset in bytes."""
    mask: NDArray[np.int64]
    """Offset in bytes."""
    lengths: NDArray[np.int32]
    borders: NDArray[np.int64]
    """The number of pieces of each row."""

    @classmethod
    def of(cls, chunks: Sequence[EncodedChunk]) -> "_Where":
        """All pieces of all chunks, before they are packed into rows."""
        files = sorted({chunk.spool for chunk in chunks})
        counts = [len(chunk.lengths) for chunk in chunks]
        lengths = np.concatenate([chunk.lengths for chunk in chunks]) if chunks else np.zeros(0, np.int32)
        starts = [np.cumsum(chunk.lengths, dtype=np.int64) - chunk.lengths for chunk in chunks]
        ends = [chunk.offset + 4 * int(chunk.lengths.sum()) for chunk in chunks]
        empty = [np.zeros(0, np.int64)]
        return cls(
            files=files,
            file=np.repeat([files.index(chunk.spool) for chunk in chunks], counts).astype(np.int32),
            tokens=np.concatenate(
                [chunk.offset + 4 * start for chunk, start in zip(chunks, starts, strict=True)] or empty
            ),
            mask=np.concatenate([end + start for end, start in zip(ends, starts, strict=True)] or empty),
            lengths=lengths,
            borders=np.zeros(0, np.int64),
        )

    def part(self, rows: Sequence[Sequence[int]]) -> "_Where":
        """The pieces of some rows, row by row."""
        pieces = np.array([piece for row in rows for piece in row])
        borders = np.array([len(row) for row in rows])
        return _Where(
            self.files, self.file[pieces], self.tokens[pieces], self.mask[pieces], self.lengths[pieces], borders
        )

    def read(self, spool: Path) -> Iterator[list[Encoded]]:
        """The samples of each row."""
        opened = [os.open(spool / name, os.O_RDONLY) for name in self.files]
        try:
            end = 0
            for count in self.borders.tolist():
                start, end = end, end + count
                yield [self._piece(opened, piece) for piece in range(start, end)]
        finally:
            for file in opened:
                os.close(file)

    def _piece(self, opened: Sequence[int], piece: int) -> Encoded:
        file, length = opened[self.file[piece]], int(self.lengths[piece])
        tokens = os.pread(file, 4 * length, int(self.tokens[piece]))
        mask = os.pread(file, length, int(self.mask[piece]))
        return Encoded(np.frombuffer(tokens, np.int32), np.frombuffer(mask, np.uint8))


def write_shard(where: _Where, folder: Path, number: int) -> dict[str, Any]:
    """Write rows as one MDS file; returns its entry in the index."""
    from streaming import MDSWriter

    own = folder / f"{number:05}"
    with MDSWriter(out=str(own), columns=COLUMNS, size_limit=None, progress_bar=False) as writer:
        for samples in where.read(folder / SPOOL):
            writer.write(pack_row(samples))
    (entry,) = json.loads((own / "index.json").read_text())["shards"]
    name = f"shard.{number:05}.mds"
    (own / entry["raw_data"]["basename"]).rename(folder / name)
    entry["raw_data"]["basename"] = name
    shutil.rmtree(own)
    return entry


def pack_row(samples: list[Encoded]) -> dict[str, Any]:
    """One row: `tokens` int32 [n], `loss_mask` uint8 [n], `segments` int32 [k] with the k samples' lengths.

    Samples of one token come last.
    """
    # Otherwise the positions 0, 0, 1, 2 … never decrease, and FlashAttention would take such a row for one sample.
    samples = sorted(samples, key=lambda sample: len(sample.tokens) == 1)
    return {
        "tokens": np.concatenate([sample.tokens for sample in samples]),
        "loss_mask": np.concatenate([sample.loss_mask for sample in samples]),
        "segments": np.array([len(sample.tokens) for sample in samples], dtype=np.int32),
    }
