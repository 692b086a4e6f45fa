"""Checkpoints → a sharded state dict, by PyTorch's planner and readers that run no code.

`dcp.load` decides which rank needs which part of which tensor. What it would unpickle (`.metadata`, and entries that
are not tensors) is read by `format/` instead.
"""

import io
from abc import abstractmethod
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan, LoadPlanner, Metadata, StorageReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future
from typing_extensions import override

from tundish.checkpoints.folder import MODEL_PREFIX, read_checkpoint
from tundish.checkpoints.format.metadata import Layout, Part
from tundish.checkpoints.format.objects import load_file, read_object
from tundish.checkpoints.format.tensors import read_part
from tundish.errors import CheckpointError, TundishError


def load(state_dict: dict[str, Any], path: Path) -> None:
    """Fill `state_dict` in place from a checkpoint's folder, or its model from a `.pt` file; called on every rank.

    Args:
        state_dict: nested; its keys are loaded, into its tensors (which may be DTensors).
        path: an `ep#-ba#` folder written on any number of ranks, or a `.pt` file of Composer.

    Raises:
        CheckpointError: it is incomplete, damaged or unsafe, or lacks an entry.
    """
    reader = FolderReader(path) if path.is_dir() else FileReader(path)
    try:
        dcp.load(state_dict, storage_reader=reader, planner=_Planner())
    except CheckpointException as error:
        raise _cause(path, error) from error


def _cause(path: Path, error: CheckpointException) -> CheckpointError:
    """The first rank's error, instead of the collection of all ranks' tracebacks."""
    causes = [wrapped[0] for wrapped in error.failures.values()]
    message = next((cause.message for cause in causes if isinstance(cause, TundishError)), None)
    first = f"{type(causes[0]).__name__}: {causes[0]}" if causes else str(error)
    return CheckpointError(message or f"{path}: cannot be loaded ({first}). Use a checkpoint of the same model.")


class _Planner(DefaultLoadPlanner):
    """PyTorch's planner, given objects instead of pickles."""

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise TypeError("pickles are never handed to the planner")

    def take(self, read_item: ReadItem, value: Any) -> None:
        """Put an object that is not a tensor where the state dict has one."""
        name = read_item.dest_index.fqn
        if isinstance(self.state_dict[name], torch.Tensor):
            raise CheckpointError(f"{name}: is not a tensor in the checkpoint. Use a checkpoint of the same model.")
        set_element(self.original_state_dict, self.mappings[name], value)


class _Reader(StorageReader):
    """What folders and files have in common."""

    @abstractmethod
    def tensor(self, index: MetadataIndex) -> torch.Tensor:
        """One part of a tensor."""

    @abstractmethod
    def object(self, fqn: str) -> Any:
        """An object that is not a tensor."""

    @override
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                cast(_Planner, planner).take(item, self.object(item.storage_index.fqn))
                continue
            source = self.tensor(item.storage_index)
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                source = source.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(source)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @override
    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @override
    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        pass

    @override
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    @override
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    @override
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class FolderReader(_Reader):
    """Reads an `ep#-ba#` folder."""

    def __init__(self, folder: Path) -> None:
        self.layout: Layout = read_checkpoint(folder)
        tensors = self.layout.tensors.items()
        self._parts: dict[tuple[str, tuple[int, ...]], Part] = {
            (name, part.offsets): part for name, (_, _, parts) in tensors for part in parts
        }

    @override
    def read_metadata(self) -> Metadata:
        entries: dict[str, Any] = {name: BytesStorageMetadata() for name in self.layout.objects}
        for name, (dtype, shape, parts) in self.layout.tensors.items():
            entries[name] = _entry(getattr(torch, dtype), shape, [(part.offsets, part.sizes) for part in parts])
        return Metadata(entries, planner_data=dict(self.layout.paths))

    @override
    def tensor(self, index: MetadataIndex) -> torch.Tensor:
        return read_part(self._parts[index.fqn, tuple(index.offset or ())], self.layout.tensors[index.fqn][0])

    @override
    def object(self, fqn: str) -> Any:
        return read_object(self.layout.objects[fqn])


class FileReader(_Reader):
    """Reads the model of a Composer `.pt` file; its tensors stay on disk until they are used."""

    def __init__(self, path: Path) -> None:
        self._tensors = read_model_file(path)

    @override
    def read_metadata(self) -> Metadata:
        tensors = self._tensors.items()
        return Metadata({name: _entry(t.dtype, t.shape, [((0,) * t.ndim, t.shape)]) for name, t in tensors})

    @override
    def tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._tensors[index.fqn]

    @override
    def object(self, fqn: str) -> Any:
        raise CheckpointError(f"{fqn}: only weights are read from a .pt file.")


def read_model_file(path: Path) -> dict[str, torch.Tensor]:
    """The model's tensors of a `.pt` file, by the names that they have in a folder.

    Raises:
        CheckpointError: it is damaged or unsafe, or not a Composer checkpoint.
    """
    content = load_file(path)
    try:
        model = content["state"]["model"]
        return {f"{MODEL_PREFIX}{name}": value for name, value in model.items() if isinstance(value, torch.Tensor)}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a Composer checkpoint, as it has no 'state' with a 'model'. Use an ep…-ba… folder or a .pt "
            "file that Composer wrote."
        ) from error


def _entry(dtype: torch.dtype, shape: Any, chunks: list[tuple[Any, Any]]) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        torch.Size(shape),
        [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks],
    )
