"""Runs on a real Slurm of two nodes on this machine: they complete, are preempted, canceled, and come to their limit.

`make test-slurm` runs this; it needs Slurm's and munge's programs, and root to start them.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.launch.slurm_cluster import missing, slurm_cluster

from tundish import foundation_model as fm
from tundish.base.run_folder import RunFolder
from tundish.foundation_model import TrainingRun

WriteLines = Callable[[Path, Iterable[object]], Path]

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        os.geteuid() != 0 or bool(missing()), reason=f"needs root, and {', '.join(missing()) or 'nothing else'}"
    ),
]


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster; its configuration."""
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture
def given(
    conf: Path, tiny_model: Path, tmp_path: Path, write_lines: WriteLines, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Any]]:
    """Arguments of a run on both nodes; no job is left for the next test."""
    monkeypatch.setenv("SLURM_CONF", str(conf))
    pairs = [{"prompt": f"{n}: ", "response": "fox " * 20} for n in range(40)]
    compute = {"nodes": 2, "devices_per_node": 1, "device": "cpu", "launcher": "slurm", "time_limit": "00:30:00"}
    yield {
        "model": str(tiny_model),
        "train_data_path": str(write_lines(tmp_path / "train.jsonl", pairs)),
        "register_to": "main.lab",
        "task_type": "INSTRUCTION_FINETUNE",
        "context_length": 64,
        "training_duration": "200ba",
        "learning_rate": 1e-4,
        "compute": compute | {"sbatch": {"cpus-per-task": 2}},
        "overrides": {"global_train_batch_size": 4, "save_interval": "100ba", "dist_timeout": 300},
    }
    for job in _slurm("squeue", "--noheader", "--format=%i").split():
        subprocess.run(["scancel", "--full", "--signal=KILL", job], capture_output=True)
        subprocess.run(["scancel", job], capture_output=True)


def test_a_run_on_two_nodes_is_preempted_twice_and_completes(given: dict[str, Any]) -> None:
    """Hours of training would be lost with each preemption, and people have to watch their runs."""
    run = fm.create(**given)
    _wait(run, lambda: "TRAIN_UPDATED" in _types(run))
    _slurm("scancel", "--batch", "--signal=USR1", _job(run))  # as at the end of its time
    _wait(run, lambda: "REQUEUED" in _types(run))
    assert _types(run)[-2:] == ["CHECKPOINT_SAVED", "REQUEUED"]
    _wait(run, lambda: _types(run).count("TRAIN_STARTED") == 2 and _types(run)[-1] == "TRAIN_UPDATED")
    _slurm("scancel", "--signal=TERM", _job(run))  # to the ranks, as where a cluster preempts
    _wait(run, lambda: _types(run).count("REQUEUED") == 2)
    assert _types(run)[-2:] == ["CHECKPOINT_SAVED", "REQUEUED"], _types(run)
    done = run.wait(timeout=600)
    assert done.status.display_name == "Completed", done.details
    started = [event.message for event in fm.get_events(run) if event.type == "TRAIN_STARTED"]
    assert len(started) == 3 and all("on 2 devices" in text for text in started)
    assert all("resumes from batch" in text for text in started[1:])
    assert "Registered as version 1 of" in str(done.details)


def test_a_run_that_waits_is_queued_and_canceled(given: dict[str, Any]) -> None:
    """It would start a day later, when nobody wants it any more."""
    blocker = _slurm(
        "sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 600"
    ).strip()
    try:
        run = fm.create(**given)
        _wait(run, lambda: "Resources" in str(run.refresh().details) or "Priority" in str(run.refresh().details))
        assert run.refresh().status.display_name == "Queued"
        assert _cancel(run) < 10
        assert "STARTED" not in _types(run)
    finally:
        _slurm("scancel", blocker)


def test_a_run_that_trains_is_canceled_with_all_its_processes(given: dict[str, Any]) -> None:
    """Nodes would be held for Slurm's KillWait or longer, or a rank be left on one of them."""
    run = fm.create(**given)
    _wait(run, lambda: "TRAIN_UPDATED" in _types(run))
    assert _cancel(run) < 10
    found = subprocess.run(["pgrep", "-f", str(run.run_dir)], capture_output=True, text=True).stdout
    assert found == "", found


def test_a_job_that_somebody_else_ends_is_stopped(given: dict[str, Any]) -> None:
    """An administrator's scancel would leave a run that looks alive."""
    run = fm.create(**given)
    _wait(run, lambda: "STARTED" in _types(run))
    _slurm("scancel", _job(run))
    _wait(run, lambda: run.refresh().status.is_terminal())
    assert run.refresh().status.display_name == "Stopped", run.refresh().details


def test_a_limit_that_is_too_short_is_told(given: dict[str, Any]) -> None:
    """The run would go back into the queue for ever and never train a batch."""
    compute = given["compute"] | {"time_limit": "00:01:00", "grace_s": 55}
    run = fm.create(**{**given, "compute": compute})
    done = run.wait(timeout=300)
    assert done.status.display_name == "Failed" and "Raise compute's time_limit" in str(done.details), done.details


def _types(run: TrainingRun) -> list[str]:
    return [event.type for event in fm.get_events(run)]


def _job(run: TrainingRun) -> str:
    assert run.run_dir is not None
    return json.loads(RunFolder(run.run_dir).supervisor.read_text())["job"]


def _cancel(run: TrainingRun) -> float:
    """Cancel, and see that the run and its job are gone; the seconds that it took."""
    begun = time.monotonic()
    assert fm.cancel(run) == 1
    seconds = time.monotonic() - begun
    assert run.refresh().status.display_name == "Stopped" and _types(run)[-1] == "CANCELED"
    assert "CANCELLED" in _slurm("scontrol", "show", "job", _job(run))
    return seconds


def _slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _wait(run: TrainingRun, condition: Callable[[], object], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {run.refresh().details} {_types(run)}"
        time.sleep(0.2)
