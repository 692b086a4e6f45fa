"""Checkpoints as PyTorch writes them, and payloads that an attacker would put into them."""

import io
import os
import pickle
import resource
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Change = Callable[[Path, Callable[[Any], None]], None]
PutEntry = Callable[[Path, str, bytes], None]


class RunsCode:
    """Creates a file when it is unpickled, like an attacker's payload."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.fixture
def runs_code(tmp_path: Path) -> RunsCode:
    """A payload; `.marker` is the file that it creates."""
    return RunsCode(tmp_path / "ran")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint as PyTorch writes it, in `ep1-ba10`, with three tensors and two other entries."""
    import torch
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "checkpoints" / "ep1-ba10"
    state = {
        "state": {
            "model": {
                "model.embed": torch.arange(24, dtype=torch.float32).reshape(6, 4),
                "model.norm": torch.tensor([0.5, -2.0, 3.25], dtype=torch.bfloat16),
            },
            "optimizers": {"step": torch.tensor(7.0)},
            "timestamp": {"Timestamp": {"batch": 10}},
            "run_name": "ift-1",
        }
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def change() -> Change:
    """Rewrites a checkpoint's metadata after a change."""

    def apply(folder: Path, how: Callable[[Any], None]) -> None:
        path = folder / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        how(metadata)
        path.write_bytes(pickle.dumps(metadata))

    return apply


@pytest.fixture
def put_entry(change: Change) -> PutEntry:
    """`put_entry(folder, name, content)`: replaces the bytes of an entry and adapts the metadata."""

    def put(folder: Path, name: str, content: bytes) -> None:
        shard = folder / f"__9_{len(list(folder.iterdir()))}.distcp"
        shard.write_bytes(content)

        def point(metadata: Any) -> None:
            (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == name]
            info.relative_path, info.offset, info.length = shard.name, 0, len(content)
            _trim(folder, metadata)

        change(folder, point)

    return put


def _trim(folder: Path, metadata: Any) -> None:
    """Cut every file after its last entry."""
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        os.truncate(folder / name, end)


@pytest.fixture
def state() -> Callable[[], dict[str, Any]]:
    """Creates the state dict that `checkpoint` is loaded into."""
    import torch

    def make() -> dict[str, Any]:
        model = {"model.embed": torch.zeros(6, 4), "model.norm": torch.zeros(3, dtype=torch.bfloat16)}
        return {"state": {"model": model, "timestamp": {"Timestamp": {"batch": 0}}, "run_name": ""}}

    return make


@pytest.fixture
def archived() -> Callable[[Any], bytes]:
    """What `torch.save` writes."""
    import torch

    def save(content: Any) -> bytes:
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(content, file)
        return file.getvalue()

    return save


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Limits memory, so that code that allocates before it checks fails here."""
    import torch.distributed.checkpoint  # noqa: F401  its libraries are mapped before the limit

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
