"""cli/runs.py: runs on a terminal; what Ctrl-C says at which moment."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tundish.base.processes import ProcessId
from tundish.base.run_folder import RunFolder
from tundish.cli import main
from tundish.errors import FailureCause

Capture = pytest.CaptureFixture[str]
MakeRun = Callable[..., RunFolder]


@pytest.fixture
def alive(make_run: MakeRun) -> RunFolder:
    """A run that goes on: this process supervises it."""
    paths = make_run("chat-1", ("CREATED", "waits"), ("STARTED", "on this machine"))
    owner = ProcessId.of(os.getpid())
    record = {"launcher": "local", "pid": owner.pid, "ticks": owner.ticks, "boot": owner.boot, "host": owner.host}
    paths.supervisor.write_text(json.dumps(record))
    return paths


def test_an_empty_list_says_so_and_what_to_do(make_run: MakeRun, home: Path, capsys: Capture) -> None:
    """An empty line, or titles over nothing, would leave open whether all is well."""
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"No runs yet in {home / 'runs'}. `tundish create --help`")
    make_run("chat-1", ("COMPLETED", "done"))
    assert main(["list", "--status", "failed"]) == 0
    assert capsys.readouterr().out == "No run is FAILED. `tundish list` shows all runs.\n"


def test_every_command_knows_a_run_by_its_first_letters(make_run: MakeRun, capsys: Capture) -> None:
    """One of them would want the whole name."""
    make_run("chat-model-1", ("CREATED", "waits"), ("FAILED", "broken"))
    for run in ("chat", "@last"):
        for command in ("get", "events", "checkpoints", "logs"):
            assert main([command, run, "--json"]) == 0, command
        assert main(["cancel", run]) == 0
    assert main(["resume", "cat"]) == main(["export", "cat"]) == main(["metrics", "cat"]) == 2
    assert capsys.readouterr().err.count("there is no run 'cat'") == 3


def test_tables_are_as_wide_as_the_terminal(
    make_run: MakeRun, tmp_path: Path, tiny_model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long paths would break the lines of a table; or names be cut, which are there to be copied."""
    folder = tmp_path / ("deep/" * 30) / "漢字-model"
    shutil.copytree(tiny_model, folder)
    make_run("chat-" + "long" * 10, ("COMPLETED", "done"), model=str(folder))
    assert main(["list"]) == 0
    whole = capsys.readouterr().out
    assert str(folder) in whole
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "110")
    assert main(["list"]) == 0
    titles, row = capsys.readouterr().out.splitlines()
    assert len(row) == 110 - len("漢字") and row.startswith("chat-" + "long" * 10 + "  COMPLETED") and "…" in row
    assert row.endswith("漢字-model") and titles.startswith("NAME")


WATCHES = {
    "events": "main(['events', 'chat-1', '--follow'])",
    # Whether a run is created, or was there before, makes no difference to who watches it.
    "run": "setattr(creating, 'create', lambda *_: fm.get('chat-1')) or main(['run', sys.argv[1]])",
    "logs": "main(['logs', 'chat-1', '--follow'])",
}


@pytest.mark.parametrize("watch", WATCHES)
def test_ctrl_c_while_a_run_goes_on_says_so(alive: RunFolder, tmp_path: Path, watch: str) -> None:
    """The user would believe that the run was stopped, or not know how to see it again."""
    file = tmp_path / "chat.yaml"
    file.write_text("model: x\n")
    alive.log("prepare").parent.mkdir(exist_ok=True)
    alive.log("prepare").write_text("Prepared 10% of the data.\n")
    code = "import sys; from tundish.cli import main; from tundish import foundation_model as fm\n"
    code += f"from tundish.runs import creating\nsys.exit({WATCHES[watch]})"
    command = [sys.executable, "-u", "-c", code, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline()  # so it watches
        if watch == "run":
            assert first == "Run chat-1 was created.\n"
            first = process.stdout.readline()
        assert first.endswith("waits\n" if watch != "logs" else "10% of the data.\n")
        process.send_signal(signal.SIGINT)
        told = process.stderr.read().splitlines()[-1]
        assert process.wait(60) == 130
    assert told == "tundish: Run chat-1 continues. Follow it with:  tundish events chat-1 --follow"


def test_ctrl_c_before_there_is_a_run_says_so(tmp_path: Path, home: Path) -> None:
    """The user would look for a run that is not there."""
    file = tmp_path / "chat.yaml"
    os.mkfifo(file)
    command = [sys.executable, "-m", "tundish", "run", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        limit = threading.Timer(120, process.kill)
        limit.start()
        with open(file, "w"):  # returns when it is read
            process.send_signal(signal.SIGINT)
            shown = process.communicate()
        limit.cancel()
        assert (process.returncode, shown) == (130, ("", "tundish: interrupted. No run was created.\n"))
    assert not home.exists()


def test_why_a_run_failed_is_a_word_for_programs(make_run: MakeRun, capsys: Capture) -> None:
    """A program would have to guess from sentences whether to try again; those of older versions have no word."""
    run = make_run("new", ("STARTED", "on this machine"))
    run.add_event("FAILED", "Stage 'train' failed: CUDA out of memory.", cause=FailureCause.OUT_OF_MEMORY)
    make_run("old", ("FAILED", "broken"))
    make_run("newer", ("STARTED", "…")).add_event("FAILED", "…", cause="EATEN_BY_A_BEAR")
    make_run("good", ("COMPLETED", "done"))
    dead = make_run("dead", ("STARTED", "on this machine"))
    with subprocess.Popen(["true"]) as ended:
        dead.write_supervisor("local", ProcessId.of(ended.pid))
    assert main(["list", "--json"]) == 0
    causes = {record["name"]: record["cause"] for record in json.loads(capsys.readouterr().out)}
    assert causes == {
        "new": "OUT_OF_MEMORY", "old": "UNKNOWN", "newer": "UNKNOWN", "good": None, "dead": "KILLED",
    }  # fmt: skip
    assert main(["get", "new", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cause"] == "OUT_OF_MEMORY"
    assert main(["events", "new", "--json"]) == 0
    assert [event["cause"] for event in json.loads(capsys.readouterr().out)] == [None, "OUT_OF_MEMORY"]
