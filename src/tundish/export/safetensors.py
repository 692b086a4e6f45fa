"""A checkpoint's weights → a Hugging Face folder, one output shard in memory at a time.

No model is built and no process group is started: the metadata says where each tensor's bytes lie.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tundish.checkpoints import StoredTensor
from tundish.data.tokenizer import load_tokenizer
from tundish.paths import write_atomic
from tundish.spec import TaskType
from tundish.weights import check_shapes, expected_shapes, model_config, read_weights

ExportDtype = Literal["bfloat16", "float32"]
BYTES = {"bfloat16": 2, "float32": 4}
SHARD_BYTES = 2_000_000_000
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file and the tensors that go into it."""

    name: str
    tensors: tuple[tuple[str, StoredTensor], ...]
    """Hugging Face name and source, in the order of the checkpoint."""


def export(checkpoint: Path, model: str, task_type: TaskType, out: Path, dtype: ExportDtype = "bfloat16") -> None:
    """Write `out` from the weights of `checkpoint`; it is there complete, or not at all.

    Args:
        checkpoint: an `ep#-ba#` folder of any world size.
        model: name or folder that the run started from; gives config and tokenizer.
        task_type: decides whether a missing chat template is added.
        out: the folder to make; replaced if it exists.
        dtype: of the weights written.

    Raises:
        CheckpointError: the checkpoint is damaged, or lacks weights that the model's config asks for.
    """
    tokenizer = load_tokenizer(model, task_type)
    weights, config = read_weights(checkpoint), model_config(model)
    config.torch_dtype = dtype
    expected = expected_shapes(config)
    check_shapes(checkpoint, {name: tensor.shape for name, tensor in weights.items()}, expected)
    shards = plan({name: weights[name] for name in expected}, BYTES[dtype], SHARD_BYTES)
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        tokenizer.save_pretrained(beside)
        _write_configs(model, config, beside)
        for shard in shards:
            _write_shard(shard, beside, dtype)
        _write_index(shards, beside, BYTES[dtype])
        shutil.rmtree(out, ignore_errors=True)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def plan(weights: Mapping[str, StoredTensor], bytes_each: int, limit: int) -> list[Shard]:
    """Tensors in their order, cut into shards of at most `limit` bytes (a larger tensor has one of its own)."""
    groups: list[list[tuple[str, StoredTensor]]] = []
    room = 0
    for name, tensor in weights.items():
        size = math.prod(tensor.shape) * bytes_each
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append((name, tensor))
        room -= size
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    ]


def _write_configs(model: str, config: Any, folder: Path) -> None:
    from transformers import GenerationConfig
    from transformers.utils import cached_file

    config.save_pretrained(folder)
    name = "generation_config.json"
    try:
        given = cached_file(model, name)
    except OSError:
        given = None
    if given is None:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    else:
        # As it stands: transformers refuses to save settings that contradict each other, which base models have.
        shutil.copyfile(given, folder / name)


def _write_shard(shard: Shard, folder: Path, dtype: ExportDtype) -> None:
    import torch
    from safetensors.torch import save_file

    target = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    save_file({name: tensor.read(target) for name, tensor in shard.tensors}, folder / shard.name, {"format": "pt"})
    # safetensors makes its files readable for their owner only.
    (folder / shard.name).chmod(0o644)


def _write_index(shards: Sequence[Shard], folder: Path, bytes_each: int) -> None:
    tensors = [(name, shard.name, tensor) for shard in shards for name, tensor in shard.tensors]
    total = sum(math.prod(tensor.shape) * bytes_each for _, _, tensor in tensors)
    weight_map = {name: shard for name, shard, _ in tensors}
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomic(folder / INDEX, json.dumps(content, indent=2) + "\n")
