"""runs/control.py: cancelling says what it did; following ends with the run."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from tests.runs.processes import wait_until

from tundish import foundation_model as fm
from tundish.base import events
from tundish.base.files import locked
from tundish.base.processes import ProcessId, start
from tundish.base.run_folder import RUN_VARIABLE, RunFolder
from tundish.errors import RequestError, RunDamagedError, SpecError
from tundish.runs import control
from tundish.runs.control import cancel_message

pytestmark = pytest.mark.slow

MakeRun = Callable[..., RunFolder]


@pytest.mark.parametrize("nothing", [None, [], ""])
def test_cancelling_nothing_is_refused(nothing: list[str] | str | None) -> None:
    """`cancel([])` of an empty list would cancel every run, or do nothing in silence."""
    with pytest.raises(RequestError, match=r"^Must provide training run\(s\) or MLflow experiment ID to cancel$"):
        fm.cancel(nothing)


def test_cancelling_in_two_ways_at_once_is_refused() -> None:
    """One of the two would be ignored."""
    with pytest.raises(RequestError, match="Cannot provide both"):
        fm.cancel("ift-1", experiment_id="7")


def test_runs_that_have_ended_or_do_not_exist_are_counted(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ended run would be marked as canceled; an unknown name end the call."""
    paths = make_run("ift-1", ("COMPLETED", "done"))
    assert fm.cancel(["ift-1", "none", "../x"]) == 0
    assert fm.cancel(experiment_id="12345") == 0
    assert capsys.readouterr().out == "No active runs found to cancel.\n" * 2
    assert [event.type for event in events.read(paths.events)] == ["COMPLETED"]


def test_a_slow_mlflow_leaves_no_process_behind(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A notebook that cancels run after run would fill with zombies, and Python warn of each."""
    make_run("ift-1", ("CREATED", "waits to be scheduled"))
    slow = start(["sleep", "1"], tmp_path / "log", {}, tmp_path, detached=True)
    monkeypatch.setattr(control, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(control, "_close_mlflow_run", lambda _: slow)
    assert fm.cancel("ift-1") == 1
    wait_until(lambda: slow.returncode == 0, 20)


def test_the_message_says_what_was_not_canceled() -> None:
    """The caller would believe that all were."""
    assert cancel_message(["a", "b"], 2) == "Canceled a, b successfully."
    assert cancel_message(["a"], 3) == "Canceled a successfully. 2 run(s) were not found or already terminated."


def test_a_run_whose_devices_are_gone_is_not_resumed(make_run: MakeRun) -> None:
    """It would wait in line for ever, and with it all runs behind it, although their devices are free."""
    paths = make_run("ift-1", ("FAILED", "a GPU broke"), compute={"device": "gpu", "devices_per_node": 8})
    with pytest.raises(SpecError, match=r"devices_per_node is 8, but this machine has 0 GPUs to give"):
        fm.resume("ift-1")
    assert [event.type for event in events.read(paths.events)] == ["FAILED"] and not paths.supervisor.exists()


def test_what_outlives_its_supervisor_is_ended(make_run: MakeRun) -> None:
    """Ranks would hold their devices for days after a supervisor was killed, and nobody could cancel them."""
    paths = make_run("ift-1", ("STARTED", "on here"), ("TRAIN_STARTED", "on 1 device"))
    # A supervisor that has ended.
    with subprocess.Popen(["true"]) as ended:
        owner = ProcessId.of(ended.pid)
    paths.supervisor.write_text(json.dumps({"launcher": "local", **asdict(owner)}))
    environment = {**os.environ, RUN_VARIABLE: str(paths.events)}
    with subprocess.Popen(["sleep", "60"], env=environment) as orphan:
        assert fm.get("ift-1").status.display_name == "Failed"
        assert fm.cancel("ift-1") == 1
        assert not psutil.pid_exists(orphan.pid)
    assert fm.get("ift-1").status.display_name == "Stopped"
    assert fm.cancel("ift-1") == 0


def test_a_run_of_a_machine_that_is_gone_can_be_canceled_and_resumed(make_run: MakeRun) -> None:
    """A container that is started anew has another name: its runs would be stuck for ever, alive by an old name."""
    paths = make_run("ift-1", ("STARTED", "on there"), ("TRAIN_STARTED", "on 1 device"))
    owner = {**asdict(ProcessId.of(os.getpid())), "host": "another"}
    paths.supervisor.write_text(json.dumps({"launcher": "local", **owner}))
    paths.lock.touch()
    assert fm.get("ift-1").status.display_name == "Failed"
    with locked(paths.lock):
        assert fm.get("ift-1").status.display_name == "Running"
        with pytest.raises(RequestError, match=r"runs on another, .* Cancel it there"):
            fm.cancel("ift-1")


def test_cancel_answers_whoever_holds_the_run(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cancel` would wait without a word for a `resume` whose MLflow is away, or that somebody has stopped."""
    monkeypatch.setattr(control, "LOCK_SECONDS", 0.05)
    paths = make_run("ift-1", ("CREATED", "waits to be scheduled"))
    ended = make_run("ift-2", ("FAILED", "over"))
    with locked(paths.folder), locked(ended.folder):
        with pytest.raises(
            RequestError, match=rf"ift-1 was not canceled.*lock: is locked by process {os.getpid()} on "
        ):
            fm.cancel(["ift-1", "ift-2"])
        assert fm.cancel("ift-2") == 0
    assert [event.type for event in paths.read_events()] == ["CREATED"]


def test_one_damaged_run_does_not_keep_the_others_from_being_canceled(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ten runs would train on because of a file of the eleventh; and what runs of that one could not be stopped."""
    monkeypatch.setattr(
        control, "_close_mlflow_run", lambda _: start(["true"], tmp_path / "log", {}, tmp_path, detached=True)
    )
    bad, good = make_run("bad", ("TRAIN_STARTED", "go")), make_run("good", ("CREATED", "waits"))
    bad.spec.write_text("{")
    environment = {**os.environ, RUN_VARIABLE: str(bad.events)}
    with subprocess.Popen(["sleep", "60"], env=environment) as rank:
        with pytest.raises(
            RunDamagedError, match=r"spec\.json: is not JSON.* processes have been ended.* Canceled good"
        ):
            fm.cancel(["bad", "good"])
        assert not psutil.pid_exists(rank.pid)
    assert good.read_events()[-1].type == "CANCELED"
