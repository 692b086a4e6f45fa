"""train/resuming.py and train/saving.py: a run refuses a checkpoint that was tampered with, and ends on a full disk."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tundish.checkpoints.folder import CHECKPOINT_LINK, list_checkpoints

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),  # PyTorch's own, on saving
]
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


def _tamper(checkpoint: Path, name: str, content: bytes) -> None:
    """Make an entry hold other bytes; everything else fits, and there is no manifest to tell."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    ends: dict[str, int] = {}
    for index, info in metadata.storage_data.items():
        if index.fqn == name:
            info.relative_path, info.offset, info.length = "__99_0.distcp", 0, len(content)
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    (checkpoint / "__99_0.distcp").write_bytes(content)
    for shard, end in ends.items():
        os.truncate(checkpoint / shard, end)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    (checkpoint / "manifest.json").unlink()


def _algorithms(marker: Path) -> list[Any]:
    """An algorithm that the run does not have; Composer would build it by `eval("algorithms." + its description)`."""
    return [("GatedLinearUnits", {"repr": f"GatedLinearUnits if __import__('os').system('touch {marker}') else 0"})]


def _metadata(checkpoint: Path, marker: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data["x"] = RunsCode(marker)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    (checkpoint / "manifest.json").unlink()


def _entry(name: str, content: Callable[[Path], Any]) -> Callable[[Path, Path], None]:
    return lambda checkpoint, marker: _tamper(checkpoint, name, _saved(content(marker)))


BATCH = "state.timestamp.Timestamp.batch"
TAMPERED: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "code in the clock": (_entry(BATCH, RunsCode), "names posix.system, which no checkpoint needs"),
    "code in an algorithm": (
        _entry("state.algorithms", _algorithms),
        "was trained with the algorithms ['GatedLinearUnits'], but this run has []",
    ),
    "a text for the batch": (_entry(BATCH, lambda _: "many"), "cannot be resumed"),
    "a text for the random state": (_entry("rng.0.python", lambda _: "x"), "cannot be resumed"),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints of a finished run are kept for all tests."""
    return tmp_path_factory.mktemp("finished") / "checkpoints"


@pytest.fixture
def finished(ranks: Any, plan: Plan, tmp_path: Path, kept: Path) -> Path:
    """The checkpoints of a finished run; trained once."""
    if not kept.exists():
        file = plan("first", samples=12, training_duration="1ep")
        trained = ranks.train(file, 1, tmp_path / "first out")
        assert trained.ok, trained.log[-3000:]
        shutil.copytree(file.parent / "checkpoints", kept)
    return kept


@pytest.mark.parametrize("how", TAMPERED)
def test_a_run_does_not_go_on_from_a_tampered_checkpoint(
    ranks: Any, plan: Plan, tmp_path: Path, finished: Path, how: str
) -> None:
    """Whoever may write to the checkpoints would run programs on every node, or the run end in a traceback."""
    import torch

    file = plan("tampered", samples=12, training_duration="2ep")
    shutil.copytree(finished, file.parent / "checkpoints")
    checkpoint, marker = list_checkpoints(file.parent / "checkpoints")[-1], tmp_path / "ran"
    change, said = TAMPERED[how]
    change(checkpoint, marker)
    trained = ranks.train(file, 1, tmp_path / "out")
    assert trained.codes == [1] and not marker.exists()
    assert said in json.loads((file.parent / "results" / "train.json").read_text())["error"]
    if "code" in how:
        loaded = torch.load(checkpoint / "__99_0.distcp", weights_only=False)
        if how == "code in an algorithm":
            eval(f"algorithms.{loaded[0][1]['repr']}", {"algorithms": SimpleNamespace(GatedLinearUnits=1)})
        assert marker.exists(), "the payload does nothing, so the test would show nothing"


def test_code_in_the_metadata_is_not_run(ranks: Any, plan: Plan, tmp_path: Path, finished: Any) -> None:
    """A run would begin with it: the metadata is what is read first. What cannot be read is kept, and not used."""
    file, marker = plan("tampered", samples=12, training_duration="1ep"), tmp_path / "ran"
    shutil.copytree(finished, file.parent / "checkpoints")
    checkpoint = list_checkpoints(file.parent / "checkpoints")[-1]
    _metadata(checkpoint, marker)
    trained = ranks.train(file, 1, tmp_path / "out")
    assert trained.ok and not marker.exists()
    assert f"{checkpoint} is damaged or unsafe and is not used" in trained.log
    pickle.loads((checkpoint.with_name(f"{checkpoint.name}.damaged1") / ".metadata").read_bytes())
    assert marker.exists(), "the payload does nothing, so the test would show nothing"


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_ends_the_run_with_a_sentence(ranks: Any, plan: Plan, tmp_path: Path, world: int) -> None:
    """A rank would wait for the other for two hours, and the checkpoint before be lost."""
    file = plan("full", world, training_duration="4ep")
    trained = ranks.train(file, world, tmp_path / "out", FULL_RANK=world - 1, FULL_AT=5)
    assert any(trained.codes)
    error = json.loads((file.parent / "results" / "train.json").read_text())["error"]
    assert "cannot be written (File too large); " in error and "Earlier checkpoints are untouched." in error
    folder = file.parent / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == ["ep0-ba3"]
    assert Path((folder / CHECKPOINT_LINK).read_text()).name == "ep0-ba3"
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]
