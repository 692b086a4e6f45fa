"""train/resuming.py and train/saving.py: a run refuses a checkpoint that was tampered with, and ends on a full disk."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish.checkpoints import list_checkpoints
from tundish.paths import CHECKPOINT_LINK

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # PyTorch's own, on saving
Plan = Callable[..., Path]


class RunsCode:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


def _saved(content: Any) -> bytes:
    import torch

    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _tamper(checkpoint: Path, name: str, content: bytes, path: tuple[Any, ...] | None = None) -> None:
    """Make an entry hold other bytes, or add one; everything else fits, and there is no manifest to tell."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    kept = {index: info for index, info in metadata.storage_data.items() if index.fqn != name}
    kept[MetadataIndex(name)] = _StorageInfo("__99_0.distcp", 0, len(content))
    if path is not None:
        metadata.planner_data[name] = path
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
    metadata.storage_data = kept
    (checkpoint / "__99_0.distcp").write_bytes(content)
    for shard in checkpoint.glob("__*_0.distcp"):
        os.truncate(shard, max(info.offset + info.length for info in kept.values() if info.relative_path == shard.name))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    (checkpoint / "manifest.json").unlink()


def _algorithm(checkpoint: Path, marker: Path) -> None:
    """An algorithm that Composer has not loaded, whose description it would evaluate."""
    description = f"GatedLinearUnits.__class__.__base__.__subclasses__() or __import__('os').system('touch {marker}')"
    _tamper(checkpoint, "state.algorithms.0.0", _saved("GatedLinearUnits"), ("state", "algorithms", 0, 0))
    (checkpoint / "manifest.json").write_text("{}")
    shard = checkpoint / "__99_0.distcp"
    shard.rename(checkpoint / "__98_0.distcp")
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = info.relative_path.replace("__99_", "__98_")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    _tamper(checkpoint, "state.algorithms.0.1.repr", _saved(description), ("state", "algorithms", 0, 1, "repr"))


def _metadata(checkpoint: Path, marker: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data["x"] = RunsCode(marker)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    (checkpoint / "manifest.json").unlink()


def _entry(name: str, content: Callable[[Path], Any]) -> Callable[[Path, Path], None]:
    return lambda checkpoint, marker: _tamper(checkpoint, name, _saved(content(marker)))


BATCH = "state.timestamp.Timestamp.batch"
TAMPERED: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "code in the metadata": (_metadata, "names posix.system, which no checkpoint needs"),
    "code in the clock": (_entry(BATCH, RunsCode), "names posix.system, which no checkpoint needs"),
    "an algorithm": (_algorithm, "was trained with the algorithms ['GatedLinearUnits'], this run has []"),
    "a text for the batch": (_entry(BATCH, lambda _: "many"), "cannot be gone on from"),
    "a text for the random state": (_entry("rng.0.python", lambda _: "x"), "cannot be gone on from"),
}


@pytest.fixture(scope="module")
def finished() -> dict[str, Path]:
    """The folder of a run with checkpoints, made once."""
    return {}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_run_does_not_go_on_from_a_tampered_checkpoint(
    ranks: Any, plan: Plan, tmp_path: Path, tmp_path_factory: Any, finished: dict[str, Path], how: str
) -> None:
    """Whoever may write to the checkpoints would run programs on every node, or the run end in a traceback."""
    if not finished:
        first = plan("first", samples=12, training_duration="1ep")
        trained = ranks.train(first, 1, tmp_path / "first out")
        assert trained.ok, trained.log[-3000:]
        finished["checkpoints"] = tmp_path_factory.mktemp("finished") / "checkpoints"
        shutil.copytree(first.parent / "checkpoints", finished["checkpoints"])
    file = plan("tampered", samples=12, training_duration="2ep")
    shutil.copytree(finished["checkpoints"], file.parent / "checkpoints")
    checkpoint, marker = list_checkpoints(file.parent / "checkpoints")[-1], tmp_path / "ran"
    change, said = TAMPERED[how]
    change(checkpoint, marker)
    trained = ranks.train(file, 1, tmp_path / "out")
    assert trained.codes == [1] and not marker.exists()
    assert said in json.loads((file.parent / "results" / "train.json").read_text())["error"]
    if "code" in how:
        for content in (checkpoint / ".metadata", checkpoint / "__99_0.distcp"):
            if content.exists():
                _free(content)
        assert marker.exists(), "the payload does nothing, so the test would show nothing"


def _free(content: Path) -> None:
    """Load as PyTorch does without `weights_only`."""
    import torch

    if content.name == ".metadata":
        pickle.loads(content.read_bytes())
    else:
        torch.load(content, weights_only=False)


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_ends_the_run_with_a_sentence(ranks: Any, plan: Plan, tmp_path: Path, world: int) -> None:
    """A rank would wait for the other for two hours, and the checkpoint before be lost."""
    file = plan("full", world, training_duration="4ep")
    trained = ranks.train(file, world, tmp_path / "out", FULL_RANK=world - 1, FULL_AT=5)
    assert any(trained.codes)
    error = json.loads((file.parent / "results" / "train.json").read_text())["error"]
    assert "cannot be written (File too large); " in error and "Earlier checkpoints are untouched." in error
    folder = file.parent / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == ["ep1-ba3"]
    assert Path((folder / CHECKPOINT_LINK).read_text()).name == "ep1-ba3"
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]
