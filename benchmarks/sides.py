"""What is measured, one side a process: `python -m benchmarks.sides SIDE ARGUMENTS RESULT`.

A side imports what it needs before it measures (`seconds`), so that its caller knows the time both with and
without imports. It writes its results as JSON.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

CONTEXT_LENGTH = 8192
Facts = dict[str, Any]


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def _import_all() -> None:
    """Import what preparation imports on first use."""
    import jinja2
    import joblib
    import streaming
    import transformers.models.auto
    import zstandard

    import tundish.data.bpe  # noqa: F401

    assert all((jinja2, joblib, streaming, transformers.AutoTokenizer, zstandard))


def prepare(path: str, model: str, task: str, *, loaded: bool = False, cluster: str | None = None) -> Facts:
    """Our preparation; `loaded`: with the tokenizer in memory and its ids already checked."""
    from tundish.data.encoding import Job
    from tundish.data.opening import open_source
    from tundish.data.prepare import prepare as prepare_data

    _import_all()
    job = Job(model=model, task_type=task, context_length=CONTEXT_LENGTH)  # pyright: ignore[reportArgumentType]
    facts: Facts = {}
    if loaded:
        assert job.encoder
        facts["loaded_bytes"] = memory_of(os.getpid())

    def work() -> Any:
        source = open_source(path, job.task_type, system_message=True)
        return prepare_data(source, job, cluster)

    seconds, prepared = _timed(work)
    facts |= {name: getattr(prepared, name) for name in ("folder", "samples", "tokens", "rows", "fill", "engine")}
    return facts | {"seconds": seconds}


def memory_of(process: int) -> int:
    """PSS of a process in bytes: its own memory and its part of shared memory; 0 if it no longer exists."""
    import psutil

    try:
        return psutil.Process(process).memory_full_info().pss
    except psutil.Error:
        return 0


def foundry_chats(path: str, model: str) -> Facts:
    """LLM Foundry's conversion of a chat file, which tokenizes and does not pack."""
    from llmfoundry.command_utils.data_prep.convert_finetuning_dataset import convert_finetuning_dataset_from_args
    from scipy import io  # noqa: F401 (datasets imports it when it reads the first line)

    out = tempfile.mkdtemp()
    seconds, _ = _timed(
        lambda: convert_finetuning_dataset_from_args(
            dataset="json", data_subset=None, splits=["train"], preprocessor=None, data_files=[path],
            skip_preprocessing=True, out_root=out, local=None, compression=None, num_workers=None, tokenizer=model,
            tokenizer_kwargs=None, max_seq_len=CONTEXT_LENGTH, target_prompts="none", target_responses="all",
            encoder_decoder=False,
        )
    )  # fmt: skip
    return {"seconds": seconds, "samples": _written(Path(out) / "train")}


def foundry_texts(path: str, model: str, processes: int) -> Facts:
    """LLM Foundry's conversion of a folder of .txt files."""
    from llmfoundry.command_utils.data_prep.convert_text_to_mds import convert_text_to_mds_from_args

    out = tempfile.mkdtemp()
    seconds, _ = _timed(
        lambda: convert_text_to_mds_from_args(
            output_folder=out, input_folder=path, compression="", concat_tokens=CONTEXT_LENGTH, tokenizer_name=model,
            bos_text=None, eos_text=None, use_tokenizer_eos=True, no_wrap=False, processes=processes, reprocess=True,
            trust_remote_code=False, logging_level="WARNING",
        )
    )  # fmt: skip
    return {"seconds": seconds, "tokens": _written(Path(out)) * CONTEXT_LENGTH}


def _written(folder: Path) -> int:
    """Rows of an MDS folder, and of the folders that its index merges."""
    return sum(shard["samples"] for shard in orjson.loads((folder / "index.json").read_bytes())["shards"])


def _read(path: str) -> list[str]:
    return [file.read_text() for file in sorted(Path(path).rglob("*.txt"))]


def bare_tiktoken(path: str, threads: int) -> Facts:
    """The limit for byte-level tokenizers: tiktoken on texts in memory."""
    from benchmarks.models import llama_encoding

    texts, encoding = _read(path), llama_encoding()
    seconds, ids = _timed(lambda: encoding.encode_ordinary_batch(texts, num_threads=threads))
    return {"seconds": seconds, "tokens": sum(map(len, ids))}


def bare_tokenizers(path: str, model: str) -> Facts:
    """The limit for all others: tokenizers on texts in memory."""
    from tokenizers import Tokenizer

    texts, tokenizer = _read(path), Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    seconds, encodings = _timed(lambda: tokenizer.encode_batch_fast(texts))
    return {"seconds": seconds, "tokens": sum(len(encoding.ids) for encoding in encodings)}


def structure(path: str) -> Facts:
    """The check of a chat file without a tokenizer, on one core."""
    from tundish.data.opening import open_source
    from tundish.data.structure import check_structure

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    source = open_source(path, "CHAT_COMPLETION", system_message=True)
    seconds, outcome = _timed(lambda: check_structure(source))
    assert not outcome.problems
    return {"seconds": seconds, "samples": outcome.samples}


def loader(prepared: str, model: str) -> Facts:
    """One epoch of the loader over prepared rows, in batches of eight."""
    from transformers import AutoTokenizer

    from tundish.train.loader import build_packed_dataloader

    dataset = {"local": prepared, "max_seq_len": CONTEXT_LENGTH, "shuffle": True}
    batches = build_packed_dataloader(AutoTokenizer.from_pretrained(model), 8, dataset).dataloader
    seconds, counts = _timed(lambda: [sum(batch["total_tokens"]) for batch in batches])
    return {"seconds": seconds, "tokens": sum(counts)}


def packing(samples: int) -> Facts:
    """Packing of samples with log-normal lengths into rows."""
    import numpy as np

    from tundish.data.pack import pack

    drawn = np.random.default_rng(samples).lognormal(6, 1, samples)
    lengths = np.clip(drawn, 1, CONTEXT_LENGTH).astype(np.int32)
    seconds, rows = _timed(lambda: pack(lengths, CONTEXT_LENGTH))
    return {"seconds": seconds, "fill": int(lengths.sum()) / (len(rows) * CONTEXT_LENGTH)}


SIDES = {
    side.__name__: side
    for side in (
        *(prepare, foundry_chats, foundry_texts, bare_tiktoken, bare_tokenizers),
        *(structure, loader, packing),
    )
}

if __name__ == "__main__":
    _, name, arguments, result = sys.argv
    Path(result).write_bytes(orjson.dumps(SIDES[name](**orjson.loads(arguments))))
