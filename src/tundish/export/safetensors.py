"""A checkpoint's weights → a Hugging Face folder, some blocks of a few megabytes in memory at a time.

No model is built and no process group is started: the metadata says where each tensor's bytes lie, and the config where
they go. Files are laid out first, then filled by several threads; what was written is read again before the folder
appears under its name. The format of the files: https://huggingface.co/docs/safetensors.
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
"""Keys that name code or files beside the model, which the export does not have."""
INDEX = "model.safetensors.index.json"
THREADS = min(8, 2 * (os.cpu_count() or 1))
SAMPLED_TENSORS = 16
SAMPLED_BYTES = 64 << 20
"""Of what was written, compared once more with the checkpoint; the last tensor may go beyond."""
Progress = Callable[[int, int], None]
"""Told how many bytes of weights were just written, and how many there are in all; from several threads."""


def export(
    checkpoint: Path,
    model: str,
    task_type: TaskType,
    out: Path,
    dtype: ExportDtype = "bfloat16",
    progress: Progress | None = None,
) -> None:
    """Write `out` from the weights of `checkpoint`; it is there complete, or not at all.

    Args:
        checkpoint: an `ep#-ba#` folder of any world size, tundish's or LLM Foundry's.
        model: name or folder that the run started from; gives config and tokenizer.
        task_type: decides whether a missing chat template is added.
        out: the folder to make.
        dtype: of the weights written; buffers of whole numbers keep theirs.
        progress: is told how far it is.

    Raises:
        SpecError: `out` is there already, or the disk has no room for it.
        CheckpointError: the checkpoint is damaged, lacks weights that the model's config asks for, or what was written
            is not what was read.
    """
    if out.exists():
        raise SpecError(f"{out}: is there already; an export overwrites nothing. Remove it, or choose another folder.")
    weights, config = read_weights(checkpoint), model_config(model)
    fit_vocabulary(config, weights, guarded(_tokens, model, task_type), checkpoint)
    config.torch_dtype = dtype
    architecture = architecture_in(config)
    config.architectures, expected = [architecture.class_name], architecture.shapes
    check_shapes(checkpoint, {name: tensor.shape for name, tensor in weights.items()}, expected)
    shards = plan({name: weights[name] for name in expected}, dtype, SHARD_BYTES)
    _check_room(out, sum(target.size for shard in shards for target in shard.targets))
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


def write(shards: Sequence[Shard], folder: Path, progress: Progress | None = None) -> None:
    """Write the files of `shards`, several tensors at a time, and flush them to the disk.

    Raises:
        CheckpointError: a tensor is damaged.
    """
    headers = {shard.name: shard.header for shard in shards}
    for shard in shards:
        path = folder / shard.name
        path.write_bytes(headers[shard.name])
        os.truncate(path, len(headers[shard.name]) + sum(target.size for target in shard.targets))
    work = [(target, folder / shard.name, len(headers[shard.name])) for shard in shards for target in shard.targets]
    # The largest first: one that comes last would be written alone.
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
            f"{folder}: {', '.join(bad[:5])} is not what the checkpoint holds. Check the disk, and export once more."
        )


def _misshapen(path: Path, shard: Shard) -> list[str]:
    """Names that are missing from a file, or have another shape in it, or do not belong there."""
    from safetensors import SafetensorError, safe_open

    wanted = {target.name: list(target.source.shape) for target in shard.targets}
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read again ({error}). Export once more.") from error
    return [name for name in wanted | found if wanted.get(name) != found.get(name)]


def _equal(target: Target, path: Path) -> bool:
    """Whether a file holds the tensor's values, at the place that the file itself says."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(8 + length + json.loads(file.read(length))[target.name]["data_offsets"][0])
        return all(memoryview(file.read(len(data))) == data for data in _converted(target, bytearray(BLOCK_BYTES)))


def _converted(target: Target, buffer: bytearray) -> Iterator[memoryview]:
    """The bytes of a tensor in the type that it is written with."""
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
    """A buffer that is used again and again, and casts that no team of threads is made for."""
    import torch

    local.buffer = bytearray(BLOCK_BYTES)
    torch.set_num_threads(1)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _check_room(out: Path, size: int) -> None:
    if (free := shutil.disk_usage(existing(out.absolute().parent)).free) < size:
        raise SpecError(f"{out}: the weights take {size:,} bytes, and {free:,} are free there. Choose another disk.")


def _write_configs(model: str, config: Any, folder: Path) -> None:
    """The settings of config, tokenizer and generation; the tokenizer's are there already."""
    from transformers import GenerationConfig

    config.save_pretrained(folder)
    given = _generation_config(model)
    if given is None:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    else:
        # As it stands: transformers refuses to save settings that contradict each other, which base models have.
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
    """Settings without what makes a reader look for code or files that are not there.

    Keys that begin with "_" are the private ones of the transformers that wrote them: where the base model lay, which
    kernels it was loaded with.
    """
    if not isinstance(content, dict):
        return content
    items = cast(dict[str, Any], content).items()
    kept = {name: value for name, value in items if name not in ELSEWHERE and not name.startswith("_")}
    return {name: _self_contained(value, deep=True) for name, value in kept.items()} if deep else kept


def _copy_licenses(model: str, folder: Path) -> None:
    """Most licenses of models must go with every copy."""
    if is_model_folder(model):
        for name in license_files(Path(model)):
            (folder / name).write_bytes(read_bytes(Path(model), name))


def _write_index(shards: Sequence[Shard], folder: Path) -> None:
    weight_map = {target.name: shard.name for shard in shards for target in shard.targets}
    total = sum(target.size for shard in shards for target in shard.targets)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomic(folder / INDEX, json.dumps(content, indent=2) + "\n")
