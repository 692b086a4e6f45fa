"""`make bench-checkpoint`: exporting against plain reading and PyTorch's own tools, and what a save costs a run.

Models, checkpoints and data are generated in a scratch folder (12 GB) that is removed at the end.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.models import save_mistral
from benchmarks.processes import Lab
from benchmarks.sides import Facts
from benchmarks.table import Row, machine, options, promised, show_chosen
from benchmarks.train import make_run

PACKAGES = ("tundish", "torch", "safetensors", "transformers", "mosaicml")
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "0.25B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
}
"""Llamas with four key-value heads and a vocabulary of 32,768."""
MOST_EXTRA = 2.0e9 + 300e6
"""Bytes: one output shard and a constant."""
STEPS_SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
STEPS, INTERVAL = 20, 4


@dataclass(frozen=True, slots=True)
class Bench:
    """The checkpoints, and how often each side runs."""

    lab: Lab
    runs: int

    def made(self, size: str) -> dict[str, str]:
        """Model and checkpoint of a size."""
        model, checkpoint = self.lab.scratch / f"model-{size}", self.lab.scratch / f"checkpoint-{size}"
        if not checkpoint.exists():
            from transformers import LlamaConfig

            save_mistral(model)
            LlamaConfig(vocab_size=32_768, num_key_value_heads=4, **SHAPES[size]).save_pretrained(model)
            self.lab.run("make", folder=str(checkpoint), model=str(model))
        return {"checkpoint": str(checkpoint), "model": str(model)}

    def by_turns(self, size: str, *sides: str) -> list[list[Facts]]:
        """The results of all runs of each side."""
        results: list[list[Facts]] = [[] for _ in sides]
        for turn in range(self.runs):
            for number in range(len(sides))[:: -1 if turn % 2 else 1]:
                given: dict[str, Any] = {**self.made(size)}
                if sides[number] == "plain":
                    del given["model"]
                else:
                    given["out"] = str(self.lab.scratch / "out")
                results[number].append(self.lab.run(sides[number], **given))
                self.lab.clear()
        return results


def _middle(runs: Sequence[Facts], name: str = "seconds") -> float:
    return median(facts[name] for facts in runs)


def reading(bench: Bench) -> Iterator[Row]:
    """The export against plain Python that reads the same bytes; memory above the imports."""
    for size in SHAPES:
        mine, other = bench.by_turns(size, "ours", "plain")
        count, seconds = other[0]["bytes"], _middle(mine)
        share = median(theirs["seconds"] / ours["seconds"] for ours, theirs in zip(mine, other, strict=True))
        title = f"export of {size}: {count / 1e9:.1f} GB read, cast, written, flushed, compared"
        rate = f"plain reading {count / _middle(other) / 1e9:.2f} GB/s"
        target = promised(share >= 0.6, "≥ 0.6") if size == "1B" else ""
        yield Row(title, f"{count / seconds / 1e9:.2f} GB/s", rate, f"{share:.2f}", target)
        extra = _middle(mine, "extra")
        yield Row(f"the same, peak memory above imports, {size}", f"{extra / 1e6:.0f} MB", target=_fits(extra))


def _fits(extra: float) -> str:
    return promised(extra <= MOST_EXTRA, "≤ 1 shard + 300 MB")


def whole(bench: Bench) -> Iterator[Row]:
    """The export against PyTorch's `dcp_to_torch_save` and transformers' `save_pretrained`."""
    for size in SHAPES:
        mine, other = bench.by_turns(size, "ours", "stock")
        times = _middle(other) / _middle(mine)
        theirs = f"{_middle(other):.1f} s, {_middle(other, 'extra') / 1e9:.1f} GB"
        ours = f"{_middle(mine):.1f} s, {_middle(mine, 'extra') / 1e9:.2f} GB"
        yield Row(
            f"{size} → Hugging Face folder, time and memory",
            ours,
            theirs,
            f"{times:.1f}×",
            promised(times >= 3, "≥ 3×"),
        )


def stall(bench: Bench) -> Iterator[Row]:
    """What a save costs a run of one rank on this machine's CPU."""
    file = make_run(bench.lab.scratch, 120, STEPS_SHAPE, rows=2, save_interval=f"{INTERVAL}ba")
    results: dict[str, list[Facts]] = {"ours": [], "composer": []}
    for turn in range(bench.runs):
        for saver in sorted(results, reverse=bool(turn % 2)):
            results[saver].append(bench.lab.run("steps", file=str(file), saver=saver, batches=STEPS))
            bench.lab.clear()
    stops = {saver: median(stop for run in runs for stop in run["stalls"]) for saver, runs in results.items()}
    size = results["ours"][0]["bytes"] / (STEPS // INTERVAL) / 1e6
    times = stops["composer"] / stops["ours"]
    theirs = f"Composer's saver {stops['composer']:.2f} s"
    yield Row(f"training paused for a save of {size:.0f} MB", f"{stops['ours']:.2f} s", theirs, f"{times:.1f}×")


MEASURES: dict[int, Callable[[Bench], Iterator[Row]]] = dict(enumerate((reading, whole, stall), 1))


def main() -> None:
    """Run the measurements that the command line names."""
    parser = options("Benchmarks of checkpoints.", MEASURES)
    given = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="tundish-bench-"))
    os.environ["TUNDISH_HOME"] = str(scratch / "home")
    try:
        print(machine(len(os.sched_getaffinity(0)), PACKAGES) + "\n", flush=True)
        show_chosen(MEASURES, Bench(Lab(scratch, "benchmarks.checkpoint_sides"), given.runs), given)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
