"""`make bench-train`: how fast a training step is, against a bare PyTorch loop and stock LLM Foundry.

Model, tokenizer and data are generated in a scratch folder that is removed at the end.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks.corpus import write_chats
from benchmarks.processes import Lab
from benchmarks.sides import Facts
from benchmarks.table import Row, machine, options, promised, show_chosen

PACKAGES = ("tundish", "llm-foundry", "mosaicml", "transformers", "torch", "numpy")
LEAST_SHARE = 0.95
"""Of a bare loop's tokens per second."""
SHAPE: Mapping[str, int] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
}
VOCABULARY, CONTEXT_LENGTH, ROWS, MICROBATCH = 4_000, 512, 8, 4


@dataclass(frozen=True, slots=True)
class Bench:
    """The runs, and how often each is made."""

    lab: Lab
    runs: int
    file: Path
    """The file of our run."""


def make_run(
    scratch: Path, chats: int, shape: Mapping[str, int] = SHAPE, rows: int = ROWS, save_interval: str | None = None
) -> Path:
    """The file of a run of ours: a model with random weights, and chats that are packed for it."""
    from tundish.base.run_folder import RunFolder
    from tundish.data.encoding import Job
    from tundish.data.opening import open_source
    from tundish.data.prepare import prepare
    from tundish.plan.foundry import render
    from tundish.plan.run_plan import RunPlan
    from tundish.plan.spec import parse_spec
    from tundish.tiny import make_base_model

    data = write_chats(scratch / "chats.jsonl", chats=chats)
    texts = [message["content"] for line in data.open() for message in json.loads(line)["messages"]]
    model = make_base_model(scratch / "model", texts, vocabulary=VOCABULARY, **shape)
    settings = {"global_train_batch_size": rows, "device_train_microbatch_size": min(rows, MICROBATCH)}
    spec, card = parse_spec(
        {
            "model": str(model), "train_data_path": str(data), "register_to": "main.bench", "learning_rate": 1e-4,
            "task_type": "CHAT_COMPLETION", "context_length": CONTEXT_LENGTH, "training_duration": "1ep",
            "experiment_path": "bench",
            "compute": {"device": "cpu", "devices_per_node": 1}, "overrides": settings,
        },
        created_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    source = open_source(str(data), spec.task_type, system_message=True)
    prepared = prepare(source, Job(model=spec.model, task_type=spec.task_type, context_length=CONTEXT_LENGTH))
    paths = RunFolder(scratch / "run")
    paths.data("train").parent.mkdir(parents=True)
    paths.data("train").symlink_to(prepared.folder)
    plan = RunPlan.of(
        spec, card, save_folder="unused", tracking_uri=f"sqlite:///{scratch}/mlflow.db", registry_uri=None
    )  # fmt: skip
    content = yaml.safe_load(render(plan.completed({"train": prepared.facts}), paths))
    if save_interval:
        content |= {"save_folder": str(scratch / "checkpoints"), "save_interval": save_interval}
        del content["loggers"]
    else:
        # A checkpoint is not a step.
        del content["save_folder"], content["save_interval"]
    paths.foundry_yaml.write_text(yaml.safe_dump(content))
    return paths.foundry_yaml


def make_stock_run(file: Path, packing_ratio: str | None) -> Path:
    """The file of the same run for `llmfoundry train`, with its own model, optimizer and loader of chats."""
    content, scratch = yaml.safe_load(file.read_text()), file.parents[1]
    dataset: dict[str, Any] = {
        "hf_name": "json", "hf_kwargs": {"data_files": str(scratch / "chats.jsonl")}, "split": "train",
        "max_seq_len": content["max_seq_len"], "decoder_only_format": True, "shuffle": True,
        "target_prompts": "none", "target_responses": "all",
    }  # fmt: skip
    if packing_ratio:
        dataset["packing_ratio"] = packing_ratio
    content["train_loader"] = {
        "name": "finetuning", "dataset": dataset, "drop_last": False, "num_workers": 0, "prefetch_factor": None,
        "persistent_workers": False,
    }  # fmt: skip
    content["model"]["name"], content["optimizer"]["name"] = "hf_causal_lm", "decoupled_lionw"
    content["callbacks"] = {"speed_monitor": {"window_size": 10}, "lr_monitor": {}, "clock": {}}
    content["run_name"] = f"stock-{packing_ratio or 'padded'}"
    stock = scratch / f"{content['run_name']}.yaml"
    stock.write_text(yaml.safe_dump(content))
    return stock


def _speed(facts: Facts, what: str) -> float:
    return facts[what] / facts["seconds"]


def bare(bench: Bench) -> Iterator[Row]:
    """Our step and a bare loop, an epoch of each by turns in one process."""
    epochs = bench.lab.run("by_turns", file=str(bench.file), epochs=3 * bench.runs)["epochs"]
    bench.lab.clear()
    ours, theirs = (median(_speed(each[side], "tokens") for each in epochs) for side in ("ours", "bare"))
    share = median(_speed(each["ours"], "tokens") / _speed(each["bare"], "tokens") for each in epochs)
    measure, other = f"tokens per second, rows of {CONTEXT_LENGTH}", f"bare PyTorch loop {theirs:,.0f}"
    met = promised(share >= LEAST_SHARE, f"≥ {LEAST_SHARE}")
    yield Row(measure, f"{ours:,.0f}", other, f"{share:.2f}", met)


def stock(bench: Bench) -> Iterator[Row]:
    """Whole runs of ours and of stock LLM Foundry by turns, a process each."""
    sides = {"tundish": partial(bench.lab.run, "ours", file=str(bench.file))}
    for name, ratio in (("packing off", None), ("packing_ratio: auto", "auto")):
        sides[name] = partial(bench.lab.run, "foundry", file=str(make_stock_run(bench.file, ratio)))
    results: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(bench.runs):
        for name in sorted(sides, reverse=bool(turn % 2)):
            results[name].append(_speed(sides[name](), "targets"))
            bench.lab.clear()
    ours = median(results.pop("tundish"))
    for name, speeds in results.items():
        theirs = median(speeds)
        other = f"LLM Foundry, {name}, {theirs:,.0f}"
        yield Row("targets a second", f"{ours:,.0f}", other, f"{ours / theirs:.2f}×")


def optimizer(bench: Bench) -> Iterator[Row]:
    """Steps of DecoupledLionW alone, on the weights of models as FSDP2 shards them, by turns in one process."""
    for layers, hidden in ((3, 96), (32, 256)):
        facts = bench.lab.run("optimizers", layers=layers, hidden=hidden, rounds=20 * bench.runs)
        bench.lab.clear()
        ours, theirs = (1e3 * median(facts[side]) for side in ("ours", "foundry"))
        measure = f"DecoupledLionW, {facts['tensors']} tensors, {facts['parameters'] / 1e6:.1f} M parameters"
        yield Row(measure, f"{ours:.1f} ms", f"LLM Foundry {theirs:.1f} ms", f"{theirs / ours:.1f}×")


MEASURES: dict[int, Callable[[Bench], Iterator[Row]]] = dict(enumerate((bare, stock, optimizer), 1))


def main() -> None:
    """Run the measures that the command line names."""
    parser = options("Benchmarks of training.", MEASURES)
    parser.add_argument("--chats", type=int, default=240, help="chats of the data (default: 240)")
    given = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="tundish-bench-"))
    os.environ["TUNDISH_HOME"] = str(scratch / "home")
    try:
        print(machine(len(os.sched_getaffinity(0)), PACKAGES) + "\n", flush=True)
        show_chosen(
            MEASURES, Bench(Lab(scratch, "benchmarks.steps"), given.runs, make_run(scratch, given.chats)), given
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
