"""A checkpoint's weights → a Hugging Face folder, a few blocks of a megabyte in memory at a time.

No model is built and no process group is started: the metadata says where the bytes of each tensor lie, and the config
which tensors the model has. Files are laid out first, then filled by several threads; what was written is read again
before the folder gets its name. The format of the files: https://huggingface.co/docs/safetensors.

Why files are not written by the `safetensors` library: its writer needs all tensors of a file at once, 958 MB above the
imports for a file of 1 GB (safetensors 0.8), where this module takes 59 MB for any size.
"""

import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from tundish.base.files import existing, new_folder, write_atomic
from tundish.base.model_files import is_model_folder, license_files, read_bytes, read_json
from tundish.base.workers import guarded, limited
from tundish.checkpoints.format.archive import BLOCK_BYTES
from tundish.data.tokenizer import LOAD_SECONDS, load_tokenizer
from tundish.errors import CheckpointError, SpecError
from tundish.export.plan import ExportDtype, Shard, Target, plan
from tundish.model.architecture import architecture_in, model_config
from tundish.model.weights import check_shapes, fit_vocabulary, read_weights
from tundish.plan.spec import TaskType

SHARD_BYTES = 2_000_000_000
GENERATION = "generation_config.json"
ELSEWHERE = ("auto_map", "custom_pipelines", "processor_class", "transformers_weights")
"""Keys that name code or files that an export does not contain."""
INDEX = "model.safetensors.index.json"
THREADS = min(8, 2 * (os.cpu_count() or 1))
SAMPLED_TENSORS = 16
SAMPLED_BYTES = 64 << 20
"""Bytes of the output that are compared with the checkpoint again; the last tensor may exceed them."""
BytesWritten = Callable[[int, int], None]
"""Called with the bytes of weights just written and their total; by several threads."""


def export(
    checkpoint: Path,
    model: str,
    task_type: TaskType,
    out: Path,
    dtype: ExportDtype = "bfloat16",
    progress: BytesWritten | None = None,
) -> None:
    """Export the weights of `checkpoint` to the folder `out`, which is complete or absent.

    Args:
        checkpoint: an `ep#-ba#` folder of any world size, tundish's or LLM Foundry's.
        model: name or folder of the model that the run started from; provides config and tokenizer.
        task_type: decides whether a missing chat template is added.
        out: a new folder.
        dtype: of the weights in the export; buffers of integers keep theirs.
        progress: see BytesWritten.

    Raises:
        SpecError: `out` exists already, or the disk is too full for it.
        CheckpointError: the checkpoint is damaged, lacks weights that the model's config needs, or the files that were
            written differ from it.
    """
    if out.exists():
        raise SpecError(
            f"{out}: exists already, and an export overwrites nothing. Remove it, or choose another folder."
        )
    weights, config = read_weights(checkpoint), model_config(model)
    fit_vocabulary(config, weights, guarded(_tokens, model, task_type), checkpoint)
    config.torch_dtype = dtype
    architecture = architecture_in(config)
    config.architectures, expected = [architecture.class_name], architecture.shapes
    check_shapes(checkpoint, {name: tensor.shape for name, tensor in weights.items()}, expected)
    shards = plan({name: weights[name] for name in expected}, dtype, SHARD_BYTES)
    size = sum(target.size for shard in shards for target in shard.targets)
    if (free := shutil.disk_usage(existing(out.absolute().parent)).free) < size:
        raise SpecError(f"{out}: the weights need {size:,} bytes, and {free:,} are free there. Choose another disk.")
    with new_folder(out) as folder:
        guarded(_save_tokenizer, model, task_type, folder)
        _write_configs(model, config, folder)
        _copy_licenses(model, folder)
        write(shards, folder, progress)
        verify(folder, shards)
        _write_index(shards, folder)


def _tokens(model: str, task_type: TaskType) -> int:
    return len(_tokenizer(model, task_type))


def _save_tokenizer(model: str, task_type: TaskType, folder: Path) -> None:
    _tokenizer(model, task_type).save_pretrained(folder)


def _tokenizer(model: str, task_type: TaskType) -> Any:
    with limited(f"model: the tokenizer of {model}", LOAD_SECONDS):
        return load_tokenizer(model, task_type)


def write(shards: Sequence[Shard], folder: Path, progress: BytesWritten | None = None) -> None:
    """Write the files of `shards`, several tensors at a time, and flush them to disk.

    Raises:
        CheckpointError: a tensor is damaged.
    """
    headers = {shard.name: shard.header for shard in shards}
    for shard in shards:
        path = folder / shard.name
        path.write_bytes(headers[shard.name])
        os.truncate(path, len(headers[shard.name]) + sum(target.size for target in shard.targets))
    work = [(target, folder / shard.name, len(headers[shard.name])) for shard in shards for target in shard.targets]
    # The largest first: at the end, one thread would write it while the others wait.
    work.sort(key=lambda item: -item[0].size)
    total = sum(target.size for target, _, _ in work)
    local = threading.local()

    def advance(count: int) -> None:
        if progress is not None:
            progress(count, total)

    def write_one(item: tuple[Target, Path, int]) -> None:
        _write_tensor(*item, local.buffer, advance)

    with ThreadPoolExecutor(THREADS, initializer=_prepare_thread, initargs=(local,)) as pool:
        list(pool.map(write_one, work))
        list(pool.map(_flush, (folder / shard.name for shard in shards)))


def verify(folder: Path, shards: Sequence[Shard]) -> None:
    """Read what was written: every name and shape, and the values of some tensors.

    Raises:
        CheckpointError: a file differs from what went into it.
    """
    targets = [(target, folder / shard.name) for shard in shards for target in shard.targets]
    bad = [name for shard in shards for name in _misshapen(folder / shard.name, shard)]
    compared = 0
    for target, path in random.Random(0).sample(targets, min(SAMPLED_TENSORS, len(targets))):
        if compared < SAMPLED_BYTES and not _equal(target, path):
            bad.append(target.name)
        compared += target.size
    if bad:
        raise CheckpointError(
            f"{folder}: {', '.join(bad[:5])} differs from the checkpoint. Check the disk, and export again."
        )


def _misshapen(path: Path, shard: Shard) -> list[str]:
    """Names of tensors that a file lacks, has in another shape, or must not have."""
    from safetensors import SafetensorError, safe_open

    expected = {target.name: list(target.source.shape) for target in shard.targets}
    try:
        with safe_open(path, framework="pt") as file:
            written = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read back ({error}). Export again.") from error
    return [name for name in expected | written if expected.get(name) != written.get(name)]


def _equal(target: Target, path: Path) -> bool:
    """Whether a file has the tensor's values, where its own header says."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(8 + length + json.loads(file.read(length))[target.name]["data_offsets"][0])
        return all(memoryview(file.read(len(data))) == data for data in _converted(target, bytearray(BLOCK_BYTES)))


def _converted(target: Target, buffer: bytearray) -> Iterator[memoryview]:
    """The bytes of a tensor in its output type."""
    import torch

    dtype = getattr(torch, target.dtype)
    for block in target.source.blocks(buffer):
        yield memoryview(cast(Any, block.to(dtype).view(torch.uint8).numpy()))


def _write_tensor(target: Target, path: Path, header: int, buffer: bytearray, advance: Callable[[int], None]) -> None:
    at = header + target.start
    with open(path, "r+b", buffering=0) as file:
        for data in _converted(target, buffer):
            advance(len(data))
            while data:
                count = os.pwrite(file.fileno(), data, at)
                data, at = data[count:], at + count


def _prepare_thread(local: threading.local) -> None:
    """Give each thread one buffer, and no threads of PyTorch's own for its casts."""
    import torch

    local.buffer = bytearray(BLOCK_BYTES)
    torch.set_num_threads(1)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_configs(model: str, config: Any, folder: Path) -> None:
    """Write the files of settings; the tokenizer's exist already."""
    from transformers import GenerationConfig

    config.save_pretrained(folder)
    given = _generation_config(model)
    if given is None:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    else:
        # A plain copy: transformers refuses to save contradicting settings, which some base models have.
        write_atomic(folder / GENERATION, json.dumps(given))
    for name in ("config.json", GENERATION, "tokenizer_config.json"):
        content = _self_contained(json.loads((folder / name).read_text()), deep=name != "tokenizer_config.json")
        write_atomic(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _generation_config(model: str) -> dict[str, Any] | None:
    if is_model_folder(model):
        return read_json(Path(model), GENERATION) if (Path(model) / GENERATION).exists() else None
    from transformers.utils import cached_file

    try:
        given = cached_file(model, GENERATION)
    except OSError:
        return None
    return json.loads(Path(given).read_text()) if given else None


def _self_contained(content: Any, *, deep: bool) -> Any:
    """Settings without keys that refer to code or files outside of the export."""
    # Keys that start with "_" are private to the transformers that wrote them: the base model's path, its kernels.
    if not isinstance(content, dict):
        return content
    items = cast(dict[str, Any], content).items()
    kept = {name: value for name, value in items if name not in ELSEWHERE and not name.startswith("_")}
    return {name: _self_contained(value, deep=True) for name, value in kept.items()} if deep else kept


def _copy_licenses(model: str, folder: Path) -> None:
    """Copy license files, as most licenses require."""
    if is_model_folder(model):
        for name in license_files(Path(model)):
            (folder / name).write_bytes(read_bytes(Path(model), name))


def _write_index(shards: Sequence[Shard], folder: Path) -> None:
    weight_map = {target.name: shard.name for shard in shards for target in shard.targets}
    total = sum(target.size for shard in shards for target in shard.targets)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomic(folder / INDEX, json.dumps(content, indent=2) + "\n")
