"""Runs that end early, on the real stack: the cause in one sentence, nothing left running."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.runs.processes import supervisor, wait_until

from tundish import foundation_model as fm
from tundish.cli import main
from tundish.errors import FailureCause
from tundish.foundation_model import TrainingRun

pytestmark = pytest.mark.slow

WriteLines = Callable[[Path, Iterable[object]], Path]


@pytest.fixture
def real_arguments(tiny_model: Path, tmp_path: Path, write_lines: WriteLines) -> dict[str, Any]:
    """Arguments of a run that would work."""
    chats = [
        {"messages": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n + 1)}]}
        for n in range(40)
    ]
    data = write_lines(tmp_path / "train.jsonl", chats)
    return {
        "model": str(tiny_model),
        "train_data_path": str(data),
        "register_to": "main.lab",
        "context_length": 64,
        "training_duration": "2ba",
        "compute": {"device": "cpu", "devices_per_node": 1},
    }


def _family(run: TrainingRun) -> list[psutil.Process]:
    """The run's supervisor and all that it has started, as they are now."""
    assert run.run_dir is not None
    from tundish.base.run_folder import RunFolder

    process = supervisor(RunFolder(run.run_dir))
    return [process, *process.children(recursive=True)] if process else []


def _mlflow_status(run: TrainingRun) -> str:
    from mlflow import MlflowClient

    return MlflowClient(run.tracking_uri).get_run(str(run.run_id)).info.status


def test_data_that_cannot_be_trained_fails_the_run_with_its_line(
    real_arguments: dict[str, Any], write_lines: WriteLines, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sample without targets that is trained on, or a failure that does not say where."""
    chats = [
        {"messages": [{"role": "user", "content": "a" * length}, {"role": "assistant", "content": "b"}]}
        for length in (5, 5, 500)
    ]
    data = write_lines(Path(real_arguments["train_data_path"]), chats)
    run = fm.create(**real_arguments, validate_inputs=False).wait(timeout=900)
    assert run.status.display_name == "Failed"
    assert run.details is not None
    assert f"{data.name}, line 3" in run.details
    assert "raise context_length" in run.details
    assert "prepare.log" in run.details
    assert run.cause is FailureCause.BAD_DATA
    capsys.readouterr()
    assert main(["get", run.name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cause"] == "BAD_DATA"
    assert main(["events", run.name, "--json"]) == 0
    assert [event["cause"] for event in json.loads(capsys.readouterr().out)][-2:] == [None, "BAD_DATA"]
    assert _mlflow_status(run) == "FAILED"


def test_a_training_that_crashes_fails_the_run_with_its_cause(real_arguments: dict[str, Any]) -> None:
    """A crash that shows as a running run, or whose cause is left to be found."""
    run = fm.create(**real_arguments, overrides={"callbacks.layer_freezing.layer_names": ["no_such_layer"]}).wait(
        timeout=900
    )
    assert run.status.display_name == "Failed"
    assert run.details is not None
    assert "no_such_layer" in run.details
    assert "train.log" in run.details
    assert len(run.details.splitlines()) == 1
    # Who looks at MLflow from another machine sees why, too.
    from mlflow import MlflowClient

    for name in ("spec.json", "foundry.yaml", "logs/train.log"):
        text = Path(MlflowClient(run.tracking_uri).download_artifacts(str(run.run_id), name)).read_text()
        assert "no_such_layer" in text, name
    # Its last word is written before it ends.
    end = time.monotonic() + 300
    while _family(run) and time.monotonic() < end:
        time.sleep(0.1)
    assert not _family(run)


def test_cancel_ends_the_whole_family_at_once(real_arguments: dict[str, Any]) -> None:
    """A process that outlives its run, or a run that cannot be told from a failed one."""
    run = fm.create(**real_arguments)
    deadline = time.monotonic() + 600
    while len(family := _family(run)) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(family) >= 2
    assert fm.cancel(run.name) == 1
    psutil.wait_procs(family, timeout=60)
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    run = run.refresh()
    assert run.status.display_name == "Stopped"
    assert fm.get_events(run)[-1].type == "CANCELED"
    assert fm.get_events(run)[-1].message == "Canceled by user."
    wait_until(lambda: _mlflow_status(run) == "KILLED", 120)  # by a process that a busy machine is slow to start
    assert fm.cancel(run.name) == 0
