"""runs/stage.py: what the stage that prepares a run's data tells of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish import events
from tundish.checkpoints.manifest import FileFacts, write_manifest
from tundish.run_folder import RunFolder
from tundish.runs.stage import main, prepare_stage

MakeRun = Callable[..., RunFolder]


def _prepared(paths: RunFolder) -> events.Event:
    """The event of the stage."""
    prepare_stage(paths, paths.read_spec(), paths.read_tracking())
    (event,) = [event for event in events.read(paths.events) if event.type == "DATA_VALIDATED"]
    return event


def test_the_batch_size_is_told(make_run: MakeRun, tiny_model: Path) -> None:
    """Nobody would know why two runs that are compared differ."""
    paths = make_run("chat-1", ("STARTED", "…"), model=str(tiny_model), training_duration="3ep")
    assert main("prepare", str(paths.folder)) == 0
    result: dict[str, Any] = json.loads(paths.result("prepare").read_text())
    assert (result["batch_size"], result["steps"]) == (1, 3)
    (event,) = [event for event in events.read(paths.events) if event.type == "DATA_VALIDATED"]
    assert event.message.endswith("A step takes 1 row(s), the run 3 step(s).")
    assert (event.facts["batch_size"], event.facts["steps"], event.facts["rows"]) == (1, 3, 1)


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model: Path) -> Path:
    """A folder with the tiny model's weights."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.distributed.checkpoint as dcp
        from safetensors.torch import load_file

        folder = tmp_path / "first" / "checkpoints" / "ep1-ba10"
        weights = load_file(tiny_model / "model.safetensors").items()
        dcp.save({f"state.model.model.{name}": tensor for name, tensor in weights}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize("said_by", ["manifest", "run"])
@pytest.mark.parametrize("same", [True, False])
def test_weights_that_were_trained_from_another_base_are_told(
    make_run: MakeRun, tiny_model: Path, checkpoint: Path, said_by: str, same: bool, tmp_path: Path
) -> None:
    """Shapes match between many models: the run would train weights that do not know its vocabulary."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    base = str(tiny_model if same else other)
    if said_by == "manifest":
        files = {path.name: FileFacts.of(path) for path in checkpoint.iterdir()}
        write_manifest(checkpoint, files, base)
    else:
        first = make_run("first", model=base)
        tracking = json.loads(first.result("tracking").read_text()) | {"save_folder": str(checkpoint.parent)}
        first.result("tracking").write_text(json.dumps(tracking))
    paths = make_run("chat-2", ("STARTED", "…"), model=str(tiny_model), custom_weights_path=str(checkpoint))
    message = _prepared(paths).message
    told = f"WARNING: the checkpoint of custom_weights_path was trained from {base}, not from {tiny_model}."
    assert (told in message) is not same and ("WARNING" in message) is not same
