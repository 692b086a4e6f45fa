"""runs/reading.py: a run is what its files say, whoever reads them."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tundish import foundation_model as fm
from tundish.base import events
from tundish.base.processes import ProcessId
from tundish.base.run_folder import RunFolder
from tundish.errors import RunNotFoundError
from tundish.runs.reading import find_run, read_run, run_names, wait
from tundish.runs.records import RunStatus

MakeRun = Callable[..., RunFolder]


def _supervised_by(paths: RunFolder, pid: int) -> None:
    paths.supervisor.write_text(json.dumps({"launcher": "local", **asdict(ProcessId.of(pid))}))


def test_a_run_is_read_with_all_that_was_asked_for(make_run: MakeRun, arguments: dict[str, Any]) -> None:
    """A field would be empty, or show another one's value."""
    paths = make_run(
        "ift-1",
        ("CREATED", "waits"),
        ("STARTED", "go"),
        ("COMPLETED", "Registered."),
        task_type="INSTRUCTION_FINETUNE",
        training_duration="3ep",
        learning_rate="1e-4",
        eval_prompts=["What?"],
        experiment_id="42",
    )
    run = read_run("ift-1")
    assert (run.name, run.task_type, run.training_duration, run.learning_rate) == (
        "ift-1",
        "INSTRUCTION_FINETUNE",
        "3ep",
        1e-4,
    )
    assert (run.train_data_path, run.register_to, run.context_length) == (arguments["train_data_path"], "main.lab", 512)
    assert (run.experiment_id, run.run_id, run.eval_prompts) == ("42", "id-of-ift-1", ["What?"])
    assert run.save_folder == str(paths.folder / "artifacts" / "ift-1" / "checkpoints")
    assert (run.run_dir, run.created_at) == (paths.folder, datetime(2026, 11, 21, 10, 0, tzinfo=UTC))
    found = events.read(paths.events)
    assert (run.started_at, run.completed_at) == (found[1].time, found[2].time)
    assert (run.status, run.details) == (RunStatus.COMPLETED, "Registered.")
    assert [event.type for event in run.events or ()] == ["CREATED", "STARTED", "COMPLETED"]


def test_a_run_tells_its_latest_losses_speed_and_version(make_run: MakeRun) -> None:
    """Whoever looks at a run would have to look into MLflow for how it goes, and what came out of it."""
    paths = make_run("ift-1", ("CREATED", "waits"))
    events.append(paths.events, "TRAIN_UPDATED", "half", loss=2.0, eval_loss=1.75, tokens_per_s=1000)
    run = read_run("ift-1")
    assert (run.train_loss, run.eval_loss, run.tokens_per_second) == (2.0, 1.75, 1000)
    assert run.model_uri is None and "loss" not in str(run.details)
    events.append(paths.events, "TRAIN_FINISHED", "done", loss=1.5)
    events.append(paths.events, "COMPLETED", "Registered.", name="main.lab.x", version="3")
    run = read_run("ift-1")
    assert (run.train_loss, run.eval_loss, run.model_uri) == (1.5, 1.75, "models:/main.lab.x/3")
    (listed,) = fm.list()
    assert (listed.eval_loss, listed.registered_version) == (1.75, "3")


@pytest.mark.parametrize("last", ["STARTED", "TRAIN_FINISHED"])
def test_a_stage_that_takes_long_says_how_far_it_is(make_run: MakeRun, last: str) -> None:
    """An export of an hour would look like a run that hangs."""
    paths = make_run("ift-1", ("CREATED", "waits"), (last, "the latest"))
    _supervised_by(paths, os.getpid())
    paths.doing.parent.mkdir(parents=True)
    paths.doing.write_text("Exporting the model: 45% of 16.1 GB.")
    assert read_run("ift-1").details == "Exporting the model: 45% of 16.1 GB."
    events.append(paths.events, "FAILED", "The disk is full.")
    assert read_run("ift-1").details == "The disk is full."


@pytest.mark.parametrize(
    ("last", "status"),
    [
        ("CREATED", RunStatus.PENDING),
        ("STARTED", RunStatus.STARTING),
        ("DATA_VALIDATED", RunStatus.RUNNING),
        ("TRAIN_UPDATED", RunStatus.RUNNING),
        ("TRAIN_FINISHED", RunStatus.RUNNING),
        ("COMPLETED", RunStatus.COMPLETED),
        ("CANCELED", RunStatus.STOPPED),
        ("FAILED", RunStatus.FAILED),
    ],
)
def test_the_status_is_what_the_last_event_means(make_run: MakeRun, last: str, status: RunStatus) -> None:
    """A notebook that polls would see another state than the run is in."""
    paths = make_run("ift-1", ("CREATED", "waits"), (last, "the latest"))
    _supervised_by(paths, os.getpid())
    run = read_run("ift-1")
    assert (run.status, run.details) == (status, "the latest")
    assert (run.completed_at is not None) == status.is_terminal()


def test_a_run_whose_supervisor_died_has_failed(make_run: MakeRun) -> None:
    """A run that nobody works on any more would be RUNNING for ever."""
    paths = make_run("ift-1", ("CREATED", "waits"), ("TRAIN_STARTED", "go"))
    with subprocess.Popen(["sleep", "60"]) as process:
        _supervised_by(paths, process.pid)
        assert read_run("ift-1").status is RunStatus.RUNNING
        process.kill()
    run = read_run("ift-1")
    assert run.status is RunStatus.FAILED
    assert "The supervisor exited after TRAIN_STARTED without reporting a result" in (run.details or "")


def test_a_run_that_ended_stays_ended_when_its_supervisor_is_gone(make_run: MakeRun) -> None:
    """Every completed run would turn into a failed one."""
    make_run("ift-1", ("COMPLETED", "done"))
    assert read_run("ift-1").status is RunStatus.COMPLETED


@pytest.mark.parametrize(("seconds", "shown"), [(45.9, "45s"), (330, "5min"), (7260, "2hr"), (100_000, "1d")])
def test_the_time_left_is_told_in_its_largest_unit(make_run: MakeRun, seconds: float, shown: str) -> None:
    """The ETA would be unreadable or wrong."""
    paths = make_run("ift-1", ("STARTED", "go"))
    _supervised_by(paths, os.getpid())
    events.append(paths.events, "TRAIN_UPDATED", "half", eta_s=seconds)
    run = read_run("ift-1")
    assert run.formatted_eta == shown
    assert run.estimated_end_time == events.read(paths.events)[-1].time + timedelta(seconds=seconds)


@pytest.mark.parametrize("last", ["TRAIN_FINISHED", "COMPLETED", "FAILED"])
def test_there_is_no_eta_once_training_is_over(make_run: MakeRun, last: str) -> None:
    """An ended run would promise an end."""
    paths = make_run("ift-1", ("STARTED", "go"))
    _supervised_by(paths, os.getpid())
    events.append(paths.events, "TRAIN_UPDATED", "half", eta_s=100)
    events.append(paths.events, last, "over")
    run = read_run("ift-1")
    assert run.formatted_eta is run.estimated_end_time is None


def test_what_is_hidden_is_no_run(make_run: MakeRun, home: Path) -> None:
    """A run that is just being made or removed would be listed as a damaged one."""
    make_run("ift-1", ("CREATED", "waits"))
    (home / "runs" / ".half").mkdir()
    assert run_names() == ["ift-1"] and [run.name for run in fm.list()] == ["ift-1"]


def test_an_unknown_run_is_answered_with_near_names(make_run: MakeRun) -> None:
    """The caller would have to list all runs to find a typo."""
    with pytest.raises(RunNotFoundError, match=r"there is no run 'ift-1' in .*`tundish list` shows the runs"):
        find_run("ift-1")
    make_run("ift-tiny-abc123")
    with pytest.raises(RunNotFoundError, match=r"there is no run 'ift-tiny-abc124' .*Did you mean ift-tiny-abc123"):
        fm.get("ift-tiny-abc124")
    for name in ("../runs/ift-tiny-abc123", "", "."):
        with pytest.raises(RunNotFoundError):
            find_run(name)


def test_waiting_ends_with_the_run_or_the_timeout(make_run: MakeRun) -> None:
    """`run.wait()` would hang on an ended run, or a timeout be ignored."""
    make_run("ift-1", ("COMPLETED", "done"))
    assert wait("ift-1").status is RunStatus.COMPLETED
    paths = make_run("ift-2", ("TRAIN_STARTED", "go"))
    _supervised_by(paths, os.getpid())
    with pytest.raises(TimeoutError, match=r"ift-2: still RUNNING after 0 s \(go\)\. It continues"):
        wait("ift-2", timeout=0)
