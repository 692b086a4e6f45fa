"""The sides of `make bench-checkpoint`, one per process, like those of `benchmarks.sides`."""

import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from benchmarks.sides import Facts

RANKS = 4
BLOCK = 8 << 20


def make(folder: str, model: str) -> Facts:
    """A checkpoint of RANKS ranks, weights and Lion's momentum in float32, as PyTorch's own writer lays it out.

    Each part is drawn when it is written, so no more than one is in memory.
    """
    import torch
    from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan
    from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

    from tundish.model.architecture import architecture_of

    shapes = {f"state.model.model.{name}": shape for name, shape in architecture_of(model).shapes.items()}
    shapes |= {f"state.optimizers.DecoupledLionW.{name[6:]}.exp_avg": shape for name, shape in list(shapes.items())}
    properties = TensorProperties(dtype=torch.float32)
    entries: dict[str, Any] = {}
    plans: list[SavePlan] = [SavePlan([]) for _ in range(RANKS)]
    for name, shape in shapes.items():
        items = list(_rows(name, shape, properties))
        entries[name] = TensorStorageMetadata(properties, torch.Size(shape), [item.tensor_data.chunk for item in items])
        for plan, item in zip(plans, items, strict=False):
            plan.items.append(item)
    writer = FileSystemWriter(folder)
    writer.prepare_local_plan(plans[0])
    drawn: Any = _Drawn()
    results = [writer.write_data(plan, drawn).wait() for plan in writer.prepare_global_plan(plans)]
    writer.finish(Metadata(entries, planner_data={name: tuple(name.split(".")) for name in shapes}), results)
    return {"bytes": _size(Path(folder))}


class _Drawn:
    """The part of PyTorch's planner that a writer gets its data from."""

    def resolve_data(self, item: Any) -> Any:
        import torch

        sizes = item.tensor_data.chunk.sizes
        return torch.randn(sizes, generator=torch.Generator().manual_seed(len(item.index.fqn))) / 50


def _rows(name: str, shape: tuple[int, ...], properties: Any) -> Iterator[Any]:
    """The tensor's parts, as FSDP2 cuts them."""
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    most = -(-shape[0] // RANKS)
    for number, start in enumerate(range(0, shape[0], most)):
        offsets = torch.Size([start] + [0] * (len(shape) - 1))
        chunk = ChunkStorageMetadata(offsets, torch.Size([min(most, shape[0] - start), *shape[1:]]))
        data = TensorWriteData(chunk, properties, torch.Size(shape))
        yield WriteItem(MetadataIndex(name, offsets, number), WriteItemType.SHARD, tensor_data=data)


def ours(checkpoint: str, model: str, out: str) -> Facts:
    """Our export: written, flushed to disk and compared with the checkpoint."""
    from tundish.export.safetensors import export

    _import_all(model)
    _cool(checkpoint)
    before = _reset_peak()
    start = time.perf_counter()
    export(Path(checkpoint), model, "INSTRUCTION_FINETUNE", Path(out))
    seconds = time.perf_counter() - start
    facts = {"seconds": seconds, "extra": _peak() - before, "written": _size(Path(out))}
    shutil.rmtree(out)
    return facts


def plain(checkpoint: str) -> Facts:
    """Plain Python reading the same bytes as our export: each file from its start, each range once."""
    from tundish.model.weights import read_weights

    ranges = [part for tensor in read_weights(Path(checkpoint)).values() for part in tensor.parts]
    _cool(checkpoint)
    start, buffer, count = time.perf_counter(), bytearray(BLOCK), 0
    for file in sorted({part.file for part in ranges}):
        with open(file, "rb", buffering=0) as opened:
            for part in sorted((part for part in ranges if part.file == file), key=lambda part: part.start):
                opened.seek(part.start)
                left = part.length
                while left:
                    left -= opened.readinto(memoryview(buffer)[:left])
                count += part.length
    return {"seconds": time.perf_counter() - start, "bytes": count}


def stock(checkpoint: str, model: str, out: str) -> Facts:
    """PyTorch's `dcp_to_torch_save`, then transformers' `save_pretrained`, in bfloat16 too."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    warnings.simplefilter("ignore")
    _import_all(model)
    _cool(checkpoint)
    before = _reset_peak()
    start = time.perf_counter()
    file = Path(f"{out}.pt")
    dcp_to_torch_save(checkpoint, file)
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["state"]["model"]["model"]
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    built.load_state_dict(_flat(content), assign=True)
    built.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    facts = {"seconds": time.perf_counter() - start, "extra": _peak() - before, "written": _size(Path(out))}
    file.unlink()
    shutil.rmtree(out)
    return facts


def _import_all(model: str) -> None:
    """Import what each side imports on first use, and load a tokenizer once for its memory."""
    import safetensors.torch
    import transformers.modeling_utils
    import transformers.models.llama.modeling_llama
    from transformers import AutoTokenizer

    assert safetensors.torch and transformers.modeling_utils and transformers.models.llama.modeling_llama
    AutoTokenizer.from_pretrained(model)


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, as they were before `make` split them."""
    if not isinstance(content, dict):
        return {prefix[:-1]: content}
    return {name: tensor for key, below in content.items() for name, tensor in _flat(below, f"{prefix}{key}.").items()}


def steps(file: str, saver: str, batches: int) -> Facts:
    """How long each save pauses a run, for the saver `ours` or `composer`; without the last."""
    from composer import Callback
    from composer.callbacks import CheckpointSaver
    from omegaconf import OmegaConf

    from tundish.train import trainer as training

    cfg: Any = OmegaConf.load(file)
    cfg.max_duration = f"{batches}ba"
    if saver == "composer":

        def composers_own(place: Any, interval: Any, *_: Any) -> CheckpointSaver:
            return CheckpointSaver(str(place.local), save_interval=interval, ignore_keys=["state/integrations"])

        setattr(training, "Saver", composers_own)  # noqa: B010  of a module
    trainer = training.build_trainer(cfg)
    stalls: list[float] = []

    class Clock(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            self.at = time.perf_counter()

        def batch_checkpoint(self, state: Any, logger: Any) -> None:
            stalls.append(time.perf_counter() - self.at)

    trainer.state.callbacks.append(Clock())
    trainer.fit()
    trainer.close()
    written = _size(Path(cfg.save_folder))
    shutil.rmtree(cfg.save_folder)
    # Batches without a save take almost no time there.
    return {"stalls": sorted(stalls[:-1])[-(batches // int(cfg.save_interval[:-2]) - 1) :], "bytes": written}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _cool(folder: str) -> None:
    """Drop files from the page cache, so that they are read from disk."""
    for file in Path(folder).iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _reset_peak() -> int:
    """Bytes that this process has now; resets its peak."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


SIDES = {side.__name__: side for side in (make, ours, plain, stock, steps)}

if __name__ == "__main__":
    _, name, arguments, result = sys.argv
    Path(result).write_bytes(orjson.dumps(SIDES[name](**orjson.loads(arguments))))
