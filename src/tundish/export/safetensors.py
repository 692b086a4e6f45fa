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

from tundish.checkpoints import MODEL_PREFIX, StoredTensor, read_tensors
from tundish.data.tokenizer import load_tokenizer
from tundish.errors import CheckpointError
from tundish.paths import write_atomic
from tundish.spec import TaskType

ExportDtype = Literal["bfloat16", "float32"]
BYTES = {"bfloat16": 2, "float32": 4}
SHARD_BYTES = 2_000_000_000
INDEX = "model.safetensors.index.json"
WEIGHT_PREFIX = f"{MODEL_PREFIX}model."
"""Composer's name of the Hugging Face model inside its state dict."""


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
    weights = _weights(checkpoint)
    config = _load_config(model, dtype)
    expected = _expected_shapes(config)
    weights = _checked(checkpoint, weights, expected)
    shards = plan(weights, BYTES[dtype], SHARD_BYTES)
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


def _weights(checkpoint: Path) -> dict[str, StoredTensor]:
    # Activation checkpointing wraps layers, and the wrapper's name may stand inside theirs.
    return {
        name.removeprefix(WEIGHT_PREFIX).replace("_checkpoint_wrapped_module.", ""): tensor
        for name, tensor in read_tensors(checkpoint).items()
        if name.startswith(WEIGHT_PREFIX)
    }


def _load_config(model: str, dtype: ExportDtype) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    config.torch_dtype = dtype
    return config


def _expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that the config asks for, tied ones once; nothing is allocated."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set[str]()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _checked(
    checkpoint: Path, weights: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredTensor]:
    """The weights that the config asks for, in its order."""
    missing = [name for name in expected if name not in weights]
    other = [
        f"{name} {weights[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    if missing or other:
        raise CheckpointError(
            f"{checkpoint}: not a checkpoint of this model. "
            f"Missing: {_some(missing)}. Of another shape: {_some(other)}."
        )
    return {name: weights[name] for name in expected}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"


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
