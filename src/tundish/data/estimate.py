"""What a run would train on: samples, tokens, rows and steps; for large data, from a random sample of its chunks.

Totals of sampled data are ratio estimates with cluster sampling (Cochran, "Sampling Techniques", chapters 6 and 9):
chunks are drawn, not single samples, so the margin comes from how much chunks differ from each other.
"""

import base64
import html
import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tundish.base.progress import Progress
from tundish.base.text import counted, printable
from tundish.base.workers import Workers
from tundish.data.encoding import EncodedChunk, Job, encode_chunks
from tundish.data.pack import pack
from tundish.data.source import Chunk, Source, first_samples, numbered
from tundish.errors import DataError
from tundish.plan.address import local_path
from tundish.plan.memory import MemoryPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLED_CHUNKS = 96
"""The most chunks, of about a megabyte each, that are tokenized."""
SEED = 17
"""Of the random sample: the same data gives the same estimate."""
Z_95 = 1.96
"""Standard errors in a 95 % margin."""
BAR = 40
"""Characters of the longest bar of the histogram."""


class Steps(Protocol):
    """Batch size in rows and optimizer steps, from rows and tokens."""

    def __call__(self, rows: int, tokens: int) -> tuple[int, int]:
        """For an epoch of this many."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a run would train on. Printed, it is a report; in a notebook, a page."""

    source: str
    context_length: int
    samples: int
    tokens: int
    """Of one epoch, after samples are cut."""
    target_tokens: int
    truncated_share: float
    """Of the samples, 0 … 1."""
    rows: int
    """After packing."""
    fill: float
    """Share of the rows' tokens that are used, 0 … 1."""
    batch_size: int
    """Rows in an optimizer step."""
    steps: int
    """Of the whole run."""
    duration: str
    refused: int
    """Samples with problems among those that were read."""
    sampled_share: float
    """How much of the data was tokenized, 0 … 1."""
    margin: float
    """Of samples, tokens, rows and steps: relative, at 95 % confidence; 0 if everything was tokenized."""
    edges: list[int]
    """Of the bins of the histogram of sample lengths, in tokens."""
    counts: list[int]
    """Tokenized samples between two edges."""
    memory: MemoryPlan | None = None
    """What a step needs on one device."""

    def lines(self) -> Iterator[str]:
        """The estimate as text, without the histogram."""
        about = f" ± {self.margin:.1%}" if self.sampled_share < 1 else ""
        yield f"{self.source}"
        yield f"  samples        {self.samples:,}{about}"
        yield f"  tokens         {self.tokens:,}{about} per epoch, {self.target_tokens:,} of them targets"
        yield f"  truncated      {self.truncated_share:.2%} of the samples, longer than {self.context_length:,} tokens"
        yield f"  rows           {self.rows:,}{about} of {self.context_length:,} tokens, {self.fill:.1%} full"
        yield f"  batch size     {counted(self.batch_size, 'row')}"
        # Steps that are given in batches ("ba") do not depend on the data.
        yield f"  steps          {self.steps:,}{'' if self.duration.endswith('ba') else about} for {self.duration}"
        if self.sampled_share < 1:
            yield f"  from           {self.sampled_share:.1%} of the data, drawn at random; margins at 95 % confidence"
        if self.refused:
            yield f"  problems       {self.refused:,} samples would be refused; `tundish validate` explains why"
        if self.memory is not None:
            yield ""
            yield from self.memory.lines()

    def histogram(self) -> Iterator[str]:
        """Sample lengths as bars of text."""
        most = max([*self.counts, 1])
        width = len(f"{self.edges[-1]:,}")
        yield "  tokens per sample"
        for low, high, count in zip(self.edges, self.edges[1:], self.counts, strict=False):
            bar = "█" * round(BAR * count / most) or ("▏" if count else "")
            yield f"  {low:>{width},} – {high - 1:<{width},} {bar} {count:,}"

    def __str__(self) -> str:
        return "\n".join([*self.lines(), "", *self.histogram()])

    def plot(self, path: str | Path) -> None:
        """Write the histogram; the file's name decides the format (.png, .svg, .pdf, .jpg)."""
        self._figure().savefig(local_path(path, "path"), dpi=120)

    def _figure(self) -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes: Any = figure.add_subplot()
        places = np.arange(len(self.counts))
        axes.bar(places, self.counts, width=0.95, color="#2f6f8f")
        axes.set_xticks(np.arange(len(self.edges)) - 0.5, [f"{edge:,}" for edge in self.edges], rotation=45)
        for place, count in zip(places, self.counts, strict=True):
            if count:
                axes.annotate(f"{count:,}", (place, count), ha="center", va="bottom", fontsize=7)
        if self.truncated_share:
            # Bars are one apart, and their edges, powers of two, halfway between them.
            place = math.log2(self.context_length / self.edges[0]) - 0.5
            axes.axvline(place, color="#b00020", linestyle="--", label=f"context_length {self.context_length:,}")
            axes.legend()
        axes.set_xlabel("tokens per sample")
        axes.set_ylabel("samples")
        # Without parse_math=False, `$` in a path would start a formula.
        axes.set_title(printable(self.source), fontsize=10, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    def _repr_html_(self) -> str:
        text = html.escape("\n".join(self.lines()))
        sink = io.BytesIO()
        self._figure().savefig(sink, dpi=120)
        image = base64.b64encode(sink.getvalue()).decode()
        table = f'<pre style="font-family: monospace">{text}</pre>'
        return f'{table}<img alt="tokens per sample" src="data:image/png;base64,{image}">'


@dataclass(slots=True)
class _Drawn:
    """Totals of the drawn chunks; each list has one number per chunk."""

    size: list[int]
    samples: list[int]
    tokens: list[int]
    target_tokens: int = 0
    truncated: int = 0
    refused: int = 0
    whole: int = 0
    """Size of all chunks, drawn or not."""

    def add(self, chunk: EncodedChunk) -> None:
        self.size.append(chunk.size)
        self.samples.append(chunk.samples)
        self.tokens.append(int(chunk.lengths.sum()))
        self.target_tokens += chunk.target_tokens
        self.truncated += chunk.truncated
        self.refused += chunk.problems.count

    @property
    def factor(self) -> float:
        """How many times as much data there is as was drawn."""
        return self.whole / sum(self.size)

    def margin(self) -> float:
        """Relative margin of the total number of tokens, at 95 % confidence."""
        count, share = len(self.size), 1 / self.factor
        if share >= 1:
            return 0.0
        size, tokens = np.array(self.size, float), np.array(self.tokens, float)
        # Against the tokens that a chunk of this size has on average: chunks differ in size.
        residuals = tokens - tokens.sum() / size.sum() * size
        deviation = math.sqrt((1 - share) * residuals.var(ddof=1) / count)
        return float(Z_95 * deviation / tokens.mean())


def estimate(source: Source, job: Job, steps: Steps, duration: str, progress: Progress) -> Estimate:
    """Estimate what a run trains on.

    Args:
        source: the training data.
        job: how its samples are encoded.
        steps: batch size and steps of the run.
        duration: of the run, for the report.
        progress: called with the number of chunks that are done, and of all.

    Raises:
        DataError: what was read has no valid sample, or compressed data is damaged.
    """
    drawn, lengths, pieces = _Drawn([], [], []), list[NDArray[np.int32]](), list[NDArray[np.int32]]()
    job.prove(first_samples(source))
    chunks = _draw(source, drawn)
    with Workers() as workers:
        for done, chunk in enumerate(encode_chunks(job, source, chunks, lambda: None, workers), 1):
            drawn.add(chunk)
            lengths.append(chunk.sample_lengths)
            pieces.append(chunk.lengths)
            progress(done, len(chunks))
    if not sum(drawn.samples):
        raise DataError(f"{source.place.source}: holds no valid sample. `tundish validate` explains why.")
    tokens = round(sum(drawn.tokens) * drawn.factor)
    packed = pack(np.concatenate(pieces), job.context_length)
    fill = sum(drawn.tokens) / (len(packed) * job.context_length)
    rows = max(1, round(len(packed) * drawn.factor))
    batch_size, count = steps(rows, tokens)
    edges, counts = _histogram(np.concatenate(lengths))
    return Estimate(
        source=source.place.source, context_length=job.context_length, tokens=tokens, rows=rows, fill=fill,
        samples=round(sum(drawn.samples) * drawn.factor), target_tokens=round(drawn.target_tokens * drawn.factor),
        truncated_share=drawn.truncated / sum(drawn.samples), batch_size=batch_size, steps=count, duration=duration,
        refused=drawn.refused, sampled_share=1 / drawn.factor, margin=drawn.margin(), edges=edges, counts=counts,
    )  # fmt: skip


def _draw(source: Source, drawn: _Drawn) -> list[tuple[int, Chunk]]:
    """Up to SAMPLED_CHUNKS chunks of a source, each drawn with the same probability (Vitter's algorithm R)."""
    kept, chance = list[tuple[int, Chunk]](), random.Random(SEED)
    for number, (start, chunk) in enumerate(numbered(source.chunks())):
        drawn.whole += chunk.size
        place = number if number < SAMPLED_CHUNKS else chance.randrange(number + 1)
        if place < SAMPLED_CHUNKS:
            # Replaces the chunk at this place, or appends: the first chunks have places behind the last one.
            kept[place : place + 1] = [(start, chunk)]
    return kept


def _histogram(lengths: NDArray[np.int32]) -> tuple[list[int], list[int]]:
    """Edges at powers of two, and the number of samples between each two."""
    first, last = int(math.log2(lengths.min())), int(math.log2(lengths.max())) + 1
    edges = [2**power for power in range(first, last + 1)]
    counts, _ = np.histogram(lengths, bins=edges)
    return edges, counts.tolist()
