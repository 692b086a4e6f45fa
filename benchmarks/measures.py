"""The measures: what is run, how often, and what the README promises of it.

Both sides of a comparison run by turns, each time in a fresh process, on the same files and the same cores; medians
are compared. Files are read once before, so that no side finds them colder than the other.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.corpus import write_chats, write_texts
from benchmarks.models import save_llama, save_mistral
from benchmarks.processes import Lab, spark_cluster
from benchmarks.sides import CONTEXT_LENGTH, Facts
from benchmarks.table import Row, promised

CHATS, TEXTS_MB, SPARK_MB = 20_000, 40, 256
LOADER_NEED = 12_000
"""Tokens per second that one H100 trains on with a model of 8 billion parameters."""
Side = Callable[[], Facts]


@dataclass(frozen=True)
class Bench:
    """The data, generated when first needed, and how to measure with it."""

    lab: Lab
    runs: int
    scale: float
    """Scales the size of all data; less than 1 for a quick try."""
    memory_gb: float

    @cached_property
    def llama(self) -> str:
        """Folder of Llama 3's tokenizer."""
        return str(save_llama(self.lab.scratch / "llama"))

    @cached_property
    def mistral(self) -> str:
        """Folder of Mistral v3's tokenizer."""
        return str(save_mistral(self.lab.scratch / "mistral"))

    @cached_property
    def chats(self) -> str:
        """A chat file."""
        return str(write_chats(self.lab.scratch / "chats.jsonl", chats=int(CHATS * self.scale)))

    @cached_property
    def many_chats(self) -> str:
        """A chat file for several machines."""
        return str(write_chats(self.lab.scratch / "many.jsonl", size=int((SPARK_MB << 20) * self.scale)))

    @cached_property
    def texts(self) -> str:
        """A folder of .txt files."""
        return str(write_texts(self.lab.scratch / "texts", int(TEXTS_MB * 1e6 * self.scale)))

    @cached_property
    def many_texts(self) -> str:
        """Four times as many of them."""
        return str(write_texts(self.lab.scratch / "many_texts", int(4 * TEXTS_MB * 1e6 * self.scale)))

    def prepare_chats(self, **more: Any) -> Facts:
        """Our preparation of the chat file."""
        given: dict[str, Any] = {"path": self.chats, "model": self.llama, "task": "CHAT_COMPLETION"}
        return self.lab.run("prepare", **given | more)

    def prepare_texts(self, **more: Any) -> Facts:
        """Our preparation of the .txt files."""
        given: dict[str, Any] = {"path": self.texts, "model": self.llama, "task": "CONTINUED_PRETRAIN"}
        return self.lab.run("prepare", **given | more)

    def by_turns(self, path: str, *sides: Side) -> list[list[Facts]]:
        """The results of all runs of each side on the same data."""
        results: list[list[Facts]] = [[] for _ in sides]
        for turn in range(self.runs):
            _warm(Path(path))
            # The sides take turns in going first, so that a slow phase of the machine hits both.
            for number in range(len(sides))[:: -1 if turn % 2 else 1]:
                results[number].append(sides[number]())
                self.lab.clear()
        return results


def _warm(path: Path) -> None:
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as opened:
                while opened.read(1 << 24):
                    pass


def _megabytes(path: str) -> float:
    files = Path(path).rglob("*") if Path(path).is_dir() else [Path(path)]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def _middle(runs: Sequence[Facts], name: str = "seconds") -> float:
    return median(facts[name] for facts in runs)


def _speed(runs: Sequence[Facts]) -> float:
    """Tokens per second."""
    return median(facts["tokens"] / facts["seconds"] for facts in runs)


def _same(what: str, ours: int, theirs: int, *, tails: int = 0) -> None:
    """Stop unless both sides did the same work; LLM Foundry drops remainders that do not fill a row."""
    if abs(ours - theirs) > 0.01 * theirs + tails * CONTEXT_LENGTH:
        raise SystemExit(f"the sides are not comparable: {what}, ours {ours:,.0f} and theirs {theirs:,.0f}")


def _times(measure: str, ours: Sequence[Facts], theirs: Sequence[Facts], least: float) -> Iterator[Row]:
    """Two rows: seconds without imports, to which the target applies, and of the whole process."""
    for name, text in (("seconds", measure), ("wall", "the same, with imports")):
        mine, other = _middle(ours, name), _middle(theirs, name)
        target = promised(other / mine >= least, f"≥ {least:g}×") if name == "seconds" else ""
        yield Row(text, f"{mine:.1f} s", f"LLM Foundry {other:.1f} s", f"{other / mine:.1f}×", target)


def _speeds(measure: str, ours: Sequence[Facts], limit: Sequence[Facts], name: str, least: float) -> Row:
    share = _speed(ours) / _speed(limit)
    theirs = f"{name} {_speed(limit) / 1e6:.2f} M tokens/s"
    mine = f"{_speed(ours) / 1e6:.2f} M tokens/s"
    return Row(measure, mine, theirs, f"{share:.2f}", promised(share >= least, f"≥ {least:g}"))


def chats(bench: Bench) -> Iterator[Row]:
    """A chat file, against LLM Foundry; loading the tokenizer counts on both sides."""
    theirs = partial(bench.lab.run, "foundry_chats", path=bench.chats, model=bench.llama)
    mine, other = bench.by_turns(bench.chats, bench.prepare_chats, theirs)
    _same("samples", mine[0]["samples"], other[0]["samples"])
    title = f"{mine[0]['samples']:,} chats ({_megabytes(bench.chats):.0f} MB) → packed MDS"
    yield from _times(title, mine, other, 6)


def texts(bench: Bench) -> Iterator[Row]:
    """Folders of .txt files, against LLM Foundry."""
    cores = len(os.sched_getaffinity(0))
    for folder in (bench.texts, bench.many_texts):
        theirs = partial(bench.lab.run, "foundry_texts", path=folder, model=bench.llama, processes=cores)
        mine, other = bench.by_turns(folder, partial(bench.prepare_texts, path=folder), theirs)
        _same("tokens", mine[0]["tokens"], other[0]["tokens"], tails=cores)
        title = f"{mine[0]['samples']:,} .txt files ({_megabytes(folder):.0f} MB) → packed MDS"
        yield from _times(title, mine, other, 5)


def byte_level(bench: Bench) -> Iterator[Row]:
    """The whole preparation of .txt files, against tiktoken alone."""
    limit = partial(bench.lab.run, "bare_tiktoken", path=bench.texts, threads=len(os.sched_getaffinity(0)))
    mine, other = bench.by_turns(bench.texts, partial(bench.prepare_texts, loaded=True), limit)
    _same("tokens", mine[0]["tokens"], other[0]["tokens"])
    yield _speeds("the .txt files, Llama 3, tokenizer loaded", mine, other, "tiktoken alone", 0.75)


def sentencepiece(bench: Bench) -> Iterator[Row]:
    """The whole preparation of .txt files, against tokenizers alone."""
    limit = partial(bench.lab.run, "bare_tokenizers", path=bench.texts, model=bench.mistral)
    ours = partial(bench.prepare_texts, model=bench.mistral, loaded=True)
    mine, other = bench.by_turns(bench.texts, ours, limit)
    _same("tokens", mine[0]["tokens"], other[0]["tokens"])
    yield _speeds("the .txt files, Mistral v3, tokenizer loaded", mine, other, "tokenizers alone", 0.85)


def spark(bench: Bench) -> Iterator[Row]:
    """A larger chat file on Spark clusters with one worker and with two; one run each; session and imports count."""
    if shutil.which("java") is None:
        yield Row("Spark, 2 workers", "left out: there is no java")
        return
    results: list[Facts] = []
    for workers in (1, 2):
        _warm(Path(bench.many_chats))
        with spark_cluster(Path(bench.lab.fresh("run-")), workers) as cluster:
            results.append(bench.prepare_chats(path=bench.many_chats, cluster=cluster))
        bench.lab.clear()
    one, two = (facts["seconds"] for facts in results)
    title = f"Spark, 2 workers of one core, {_megabytes(bench.many_chats):.0f} MB of chats"
    yield Row(title, f"{two:.1f} s", f"1 worker {one:.1f} s", f"{one / two:.2f}×", promised(one / two >= 1.7, "≥ 1.7×"))


def loader(bench: Bench) -> Iterator[Row]:
    """The loader in one process, against what a GPU consumes."""
    rows = bench.prepare_texts()["folder"]
    mine = [bench.lab.run("loader", prepared=rows, model=bench.llama) for _ in range(bench.runs)]
    bench.lab.clear()
    times = _speed(mine) / LOADER_NEED
    need = f"one H100 at 8B takes {LOADER_NEED / 1e6:g} M tokens/s"
    speed = f"{_speed(mine) / 1e6:.2f} M tokens/s"
    yield Row("loader, one process", speed, need, f"{times:.0f}×", promised(times >= 100, "≥ 100×"))


def structure(bench: Bench) -> Iterator[Row]:
    """The check of a chat file's lines, without a tokenizer."""
    (mine,) = bench.by_turns(bench.chats, partial(bench.lab.run, "structure", path=bench.chats))
    speed = _megabytes(bench.chats) / _middle(mine)
    yield Row("structure of the chats, one core", f"{speed:.0f} MB/s", target=promised(speed >= 150, "≥ 150 MB/s"))


def packing(bench: Bench) -> Iterator[Row]:
    """Packing alone: how full the rows are, and how long it takes."""
    for samples, most, least in ((1_000_000, 2, 0), (100_000, None, 0.995)):
        mine = [bench.lab.run("packing", samples=samples) for _ in range(bench.runs)]
        seconds, fill = _middle(mine), mine[0]["fill"]
        target = f"≤ {most} s" if most else f"≥ {least:.1%} full"
        met = seconds <= most if most else fill >= least
        title = f"packing of {samples:,} samples into rows of {CONTEXT_LENGTH:,}"
        yield Row(title, f"{seconds:.2f} s, {fill:.2%} full", target=promised(met, target))


def memory(bench: Bench) -> Iterator[Row]:
    """Peak PSS of all processes of a preparation, above that of imports and tokenizer; one run."""
    path = bench.lab.scratch / "huge.jsonl"
    with open(path, "wb") as file:
        while file.tell() < bench.memory_gb * 1e9:
            file.write(Path(bench.many_chats).read_bytes())
    size = _megabytes(str(path))
    facts = bench.prepare_chats(path=str(path), loaded=True, watch=True)
    path.unlink()
    bench.lab.clear()
    extra, speed = (facts["peak"] - facts["loaded_bytes"]) / 1e9, size / facts["seconds"]
    title = f"memory for {size / 1e3:.1f} GB of chats"
    ours = f"{extra:.2f} GB above {facts['loaded_bytes'] / 1e9:.2f} GB, {speed:.1f} MB/s"
    yield Row(title, ours, target=promised(extra <= 1.5, "≤ 1.5 GB"))


MEASURES: dict[int, Callable[[Bench], Iterator[Row]]] = dict(
    enumerate((chats, texts, byte_level, sentencepiece, spark, loader, structure, packing, memory), 1)
)
SPARK = next(number for number, measure in MEASURES.items() if measure is spark)
