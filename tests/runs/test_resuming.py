"""Runs that are killed, on the real stack: once more by themselves, and again when they are resumed."""

import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.runs.processes import supervisor

from tundish import foundation_model as fm
from tundish.base.run_folder import RUN_VARIABLE, RunFolder
from tundish.errors import RequestError
from tundish.foundation_model import TrainingRun
from tundish.model.weights import fetch_weights, find_weights

pytestmark = pytest.mark.slow

WriteLines = Callable[[Path, Iterable[object]], Path]


def _ranks(paths: RunFolder) -> list[psutil.Process]:
    """The processes that train the run."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.environ().get(RUN_VARIABLE) == str(paths.events) and "RANK" in process.environ()
        except psutil.Error:
            continue
        if mine:
            found.append(process)
    return found


def _wait(condition: Callable[[], object], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def _count(run: TrainingRun, type: str) -> int:
    return sum(event.type == type for event in fm.get_events(run))


def test_a_run_survives_the_death_of_all_its_processes(
    tiny_model: Path, tmp_path: Path, write_lines: WriteLines, bucket: Any
) -> None:
    """Days of training would be lost, or a version be registered twice; with checkpoints in an object store too."""
    pairs = [{"prompt": f"{n}: ", "response": "fox " * 20} for n in range(40)]
    data = write_lines(tmp_path / "train.jsonl", pairs)
    run = fm.create(
        model=str(tiny_model), train_data_path=str(data), register_to="main.lab", task_type="INSTRUCTION_FINETUNE",
        context_length=64, training_duration="120ba", learning_rate=1e-4, compute={"device": "cpu"},
        overrides={"global_train_batch_size": 4, "save_interval": "10ba", "save_folder": bucket.uri("kept"),
                   "save_num_checkpoints_to_keep": 2},
    )  # fmt: skip
    assert run.run_dir is not None
    paths = RunFolder(run.run_dir)
    with pytest.raises(RequestError, match="Cancel it first, or wait for its end"):
        fm.resume(run)

    # A rank dies: the supervisor tries once more by itself.
    _wait(lambda: _count(run, "CHECKPOINT_SAVED") >= 2)
    for process in _ranks(paths):
        process.kill()
    _wait(lambda: _count(run, "REQUEUED") == 1)
    assert not fm.get(run).status.is_terminal()

    # Everything dies: the run says so, and goes on when it is asked to.
    _wait(lambda: _count(run, "TRAIN_STARTED") == 2)
    process = supervisor(paths)
    assert process is not None
    for one in [process, *process.children(recursive=True)]:
        one.send_signal(signal.SIGKILL)
    _wait(lambda: fm.get(run).status.display_name == "Failed")
    assert "without reporting a result" in str(fm.get(run).details)
    done = fm.resume(run).wait(timeout=900)
    assert done.status.display_name == "Completed", done.details

    messages = [event.message for event in fm.get_events(run) if event.type == "TRAIN_STARTED"]
    assert len(messages) == 3 and "resumes from batch" not in messages[0]
    assert all("resumes from batch" in message for message in messages[1:])
    assert _count(run, "DATA_VALIDATED") == 1, "what was done is not done again"
    assert "Registered as version 1 of main.lab." in str(done.details)
    assert not _ranks(paths)
    kept = fm.get_checkpoints(run)
    assert [path.rpartition("-ba")[2] for path in kept] == ["110", "120"], "complete ones of all three processes count"
    assert all(path.startswith(bucket.uri(f"kept/{run.name}/checkpoints/ep")) for path in kept)
    assert fetch_weights(find_weights(kept[0])).name == kept[0].rpartition("/")[2]
    with pytest.raises(RequestError, match=r"is completed; .* Give a longer training_duration"):
        fm.resume(run)
    _train_longer(run)


def _train_longer(run: TrainingRun) -> None:
    """The finished run, once more: a version of its own, and the old one as it was."""
    import mlflow
    from tests.runs.killing import tensors

    assert run.run_dir is not None
    paths = RunFolder(run.run_dir)
    client = mlflow.MlflowClient(paths.read_tracking().tracking_uri)
    first, name = tensors(paths.export), f"main.lab.{run.name}"
    done = fm.resume(run, training_duration="125ba").wait(timeout=900)
    assert done.status.display_name == "Completed", done.details
    assert done.training_duration == "125ba" and f"Registered as version 2 of {name}." in str(done.details)
    started = [event.message for event in fm.get_events(run) if event.type == "TRAIN_STARTED"]
    assert started[-1].endswith("It resumes from batch 120.")
    assert fm.get_checkpoints(run)[-1].endswith("-ba125")
    second = tensors(paths.export)
    assert first.keys() == second.keys() and any(not first[key].equal(second[key]) for key in first)
    for version, exported in (("1", first), ("2", second)):
        folder = Path(str(client.get_model_version(name, version).source).removeprefix("file://")) / "model"
        kept = tensors(folder)
        assert all(kept[key].equal(exported[key]) for key in exported), version
    assert client.get_run(str(run.run_id)).info.status == "FINISHED"
