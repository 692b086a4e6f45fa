"""Runs that are killed at any moment, on the real stack: `make test-kill`, as it takes half an hour.

Prints a table of all kills; with KILL_TABLE, it is written to the file of that name too.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.runs.killing import MOMENTS, TARGETS, Row, Victim, tensors
from tests.runs.processes import stages, supervisor, wait_until

from tundish import foundation_model as fm
from tundish.base import events
from tundish.base.home import prepared_dir
from tundish.base.run_folder import RunFolder
from tundish.checkpoints.folder import verify

WriteLines = Callable[[Path, Iterable[object]], Path]
pytestmark = pytest.mark.kill

RANKS = (1, 2, 1, 2, 1)
"""Of each run that is killed."""
SEED = 20


@pytest.fixture
def arguments(
    tiny_model: Path, tmp_path: Path, write_lines: WriteLines, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Of a run whose stages all take a while; what its data is shows in the run alone."""
    # Threads that wait must not keep a small machine's processors from the threads that they wait for.
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    pairs = [{"prompt": f"{n}: ", "response": "fox " * 20} for n in range(20_000)]
    return {
        "model": str(tiny_model), "train_data_path": str(write_lines(tmp_path / "train.jsonl", pairs)),
        "register_to": "main.lab", "task_type": "INSTRUCTION_FINETUNE", "context_length": 64,
        "training_duration": "100ba", "learning_rate": 1e-4, "validate_inputs": False,
        "overrides": {"global_train_batch_size": 4, "save_interval": "10ba"},
    }  # fmt: skip


def _create(arguments: dict[str, Any], ranks: int) -> RunFolder:
    """A run that prepares its data itself, as if no other had."""
    shutil.rmtree(prepared_dir(), ignore_errors=True)
    run = fm.create(**arguments, compute={"device": "cpu", "devices_per_node": ranks})
    return RunFolder.of(run.name)


def _durations(paths: RunFolder) -> dict[str, float]:
    """Within which a run is killed after it has reached a moment; from one that was left alone."""
    times = {event.type: event.time.timestamp() for event in events.read(paths.events)}
    done = {stage: paths.result(stage).stat().st_mtime for stage in ("train", "export", "register")}
    return {
        "created": 1.0,
        "prepare": times["DATA_VALIDATED"] - times["STARTED"],
        "load": times["TRAIN_STARTED"] - times["DATA_VALIDATED"],
        "train": 1.0,
        "save": 0.05,
        "export": done["export"] - done["train"],
        "register": done["register"] - done["export"],
        "end": 1.1 * (times["COMPLETED"] - done["register"]),
    }


def _check_whole(paths: RunFolder) -> None:
    """What can be seen under its name is complete, whatever was killed."""
    for folder in Path(paths.read_tracking().save_folder).glob("ep*-ba*"):
        assert verify(folder) == []
    if paths.export.exists():
        tensors(paths.export)
    for folder in prepared_dir().glob("[!.]*"):
        shards = json.loads((folder / "index.json").read_text())["shards"]
        assert json.loads((folder / "manifest.json").read_text())["rows"] == sum(shard["samples"] for shard in shards)
        for data in (shard["raw_data"] for shard in shards):
            assert (folder / data["basename"]).stat().st_size == data["bytes"]
    json.loads(paths.spec.read_text())
    for stage in ("prepare", "train", "export", "register"):
        paths.is_done(stage)  # its result can be read


def _check_end(paths: RunFolder, left_alone: RunFolder, home: Path) -> None:
    """As if it had never been killed."""
    from mlflow import MlflowClient

    run = fm.get(paths.folder.name).wait(timeout=400)
    assert run.status.display_name == "Completed", run.details
    wait_until(lambda: supervisor(paths) is None and not stages(paths), 20)
    client = MlflowClient(paths.read_tracking().tracking_uri)
    versions = client.search_model_versions(f"name='{run.submitted_config.registered_name}'")
    assert [version.run_id for version in versions].count(run.run_id) == 1
    assert run.run_id is not None and client.get_run(run.run_id).info.status == "FINISHED"
    trained, expected = tensors(paths.export), tensors(left_alone.export)
    assert trained.keys() == expected.keys() and all(trained[name].equal(expected[name]) for name in expected)
    folders = (home / "runs", paths.folder, paths.folder / "results", Path(paths.read_tracking().save_folder))
    assert not [path for folder in folders for path in folder.iterdir() if path.name.startswith(".")]
    assert not list(prepared_dir().glob(".*.tmp")) and not paths.scratch.exists()
    assert [path.name for path in home.glob("queue/*/*")] == ["lock"]


def test_runs_that_are_killed_at_any_moment_end_as_if_they_were_not(arguments: dict[str, Any], home: Path) -> None:
    """A kill would leave processes that hold the devices, half a file that is taken for whole, or another model."""
    shared, rows = set(Path("/dev/shm").iterdir()), list[Row]()
    left_alone: dict[int, RunFolder] = {}
    for ranks in sorted(set(RANKS)):
        left_alone[ranks] = _create(arguments, ranks)
        assert fm.get(left_alone[ranks].folder.name).wait(timeout=400).status.display_name == "Completed"
    lines = [f"| {' | '.join(Row.COLUMNS)} |", f"|{'---|' * len(Row.COLUMNS)}"]
    print("", *lines, sep="\n", flush=True)
    for number, ranks in enumerate(RANKS):
        paths = _create(arguments, ranks)
        rng = random.Random(SEED + number)
        victim = Victim(paths, ranks, _durations(left_alone[ranks]), rng, _check_whole, rows)
        for place, moment in enumerate(MOMENTS):
            victim.kill(moment, TARGETS[(number + place) % len(TARGETS)])
            lines.append(rows[-1].text(len(rows)))
            print(lines[-1], flush=True)
        _check_end(paths, left_alone[ranks], home)
    wait_until(lambda: not set(Path("/dev/shm").iterdir()) - shared, 60)
    assert sum(not row.killed.startswith("nothing") for row in rows) >= 30
    if path := os.environ.get("KILL_TABLE"):
        Path(path).write_text("\n".join(lines) + "\n")
