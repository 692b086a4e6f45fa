"""cli/watching.py: logs and metrics on a terminal."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tundish.base import events
from tundish.base.run_folder import RunFolder
from tundish.cli import main
from tundish.tracking.experiment import open_tracking

Capture = pytest.CaptureFixture[str]
MakeRun = Callable[..., RunFolder]


@pytest.fixture
def run(make_run: MakeRun) -> RunFolder:
    """A run that failed while it trained on two ranks."""
    paths = make_run("chat-1", ("CREATED", "waits"), ("FAILED", "in train"))
    paths.logs.mkdir()
    logs = {"prepare": "prepared\n", "train": "rank 0\n", "train-rank1": "rank 1\n", "supervisor": "started\n"}
    for age, (name, text) in enumerate(logs.items()):
        paths.log(name).write_text(text)
        os.utime(paths.log(name), ns=(age, age))
    return paths


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ([], "rank 0"),
        (["--stage", "prepare"], "prepared"),
        (["--rank", "0"], "rank 0"),
        (["--rank", "1"], "rank 1"),
        (["--stage", "train", "--rank", "1"], "rank 1"),
        (["--stage", "supervisor"], "started"),
    ],
)
def test_the_log_of_a_stage_or_rank_is_shown(run: RunFolder, options: list[str], shown: str, capsys: Capture) -> None:
    """The user would have to know the names in a run's folder."""
    assert main(["logs", "chat-1", *options]) == 0
    output = capsys.readouterr()
    assert output.out == f"{shown}\n" and output.err.startswith(f"==> {run.logs}/")


def test_a_log_that_is_not_there_is_told_with_those_that_are(run: RunFolder, capsys: Capture) -> None:
    """An empty answer would read as an empty log."""
    for options, found in ((["--stage", "tain"], "of tain"), (["--rank", "7"], "of train-rank7")):
        assert main(["logs", "chat-1", *options]) == 2
        shown = capsys.readouterr().err
        assert (
            f"no log {found}; it has logs of prepare, supervisor, train, train-rank1." in shown
            and "Did you mean" in shown
        )
    assert main(["logs", "chat-1", "--lines", "0"]) == 2
    assert main(["logs", "chat-1", "--rank", "-1"]) == 2


def test_the_end_of_a_long_log_is_shown_as_a_terminal_would(run: RunFolder, capsys: Capture) -> None:
    """A progress bar would be a thousand lines long, a gigabyte be read, or a log's bytes command the terminal."""
    with open(run.log("train"), "wb") as file:
        file.seek(3 << 30)  # a hole, which takes no room
        file.write(b"\nold\n" + b"10%\r50%\r100%\r\n" + "größe\n".encode() + b"\x1b]0;title\x07\xff\n")
    assert main(["logs", "chat-1", "-n", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == ["100%", "größe", "\\x1b]0;title\\x07\N{REPLACEMENT CHARACTER}"]
    assert main(["logs", "chat-1", "--json", "--lines", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["log"] == str(run.log("train"))


def test_a_run_that_has_no_log_yet_says_so(make_run: MakeRun, capsys: Capture) -> None:
    """A traceback, or nothing at all."""
    make_run("chat-2", ("CREATED", "waits"))
    assert main(["logs", "chat-2"]) == 0
    assert capsys.readouterr().out == "Run chat-2 has no log yet. `tundish logs chat-2 --follow` waits for it.\n"
    assert main(["logs", "chat-2", "--json"]) == 0 and json.loads(capsys.readouterr().out)["lines"] == []


def test_following_shows_the_stages_that_come_and_all_to_the_end(
    make_run: MakeRun, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines would be lost, shown twice or cut in two; the end of the run be missed."""
    paths = make_run("chat-1", ("CREATED", "waits"))
    paths.logs.mkdir()
    paths.log("prepare").write_text("one\nha")
    steps = [
        lambda: _append(paths.log("prepare"), "lf\nthree\n"),
        lambda: _append(paths.log("train"), "epoch 1\n"),
        lambda: _append(paths.log("train"), "epoch 2\nthe e"),
        lambda: (_append(paths.log("train"), "nd"), events.append(paths.events, "FAILED", "in train")),
    ]
    monkeypatch.setattr("tundish.cli.watching.time.sleep", lambda _: steps.pop(0)())
    assert main(["logs", "chat-1", "--follow"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["one", "half", "three", "epoch 1", "epoch 2", "the end"]


def _append(log: Path, text: str) -> None:
    with open(log, "a") as file:
        file.write(text)
    stamp = max(path.stat().st_mtime_ns for path in log.parent.iterdir()) + 1_000_000
    os.utime(log, ns=(stamp, stamp))


def test_metrics_are_shown_drawn_and_given_as_json(
    make_run: MakeRun, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses could only be seen in a notebook."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())  # files: no database is made
    paths = make_run("chat-1", ("CREATED", "waits"), ("FAILED", "in train"))
    open_tracking("chat-1", "/Users/me/chat-1", {}).write(paths)
    assert main(["metrics", "chat-1", "--plot", str(tmp_path / "none.png")]) == 0
    assert capsys.readouterr().out.startswith("Run chat-1 has no metrics: it ended before its first step.")
    assert not (tmp_path / "none.png").exists()
    tracking = paths.read_tracking()
    for step, loss in enumerate([3.0, 2.0, 1.5]):
        MlflowClient(tracking.tracking_uri).log_metric(tracking.run_id, "loss/train/total", loss, step=step)
    picture = tmp_path / "loss.png"
    assert main(["metrics", "chat-1", "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split() == ["loss/train/total", "3", "2", "3", "1.5"] and shown[2] == f"Plot: {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["metrics", "chat-1", "--key", "loss/train/total", "--json"]) == 0
    assert [point["value"] for point in json.loads(capsys.readouterr().out)] == [3.0, 2.0, 1.5]
    assert main(["metrics", "chat-1", "--plot", str(tmp_path / "loss.foo")]) == 2
    assert "end in one of .png, .svg" in capsys.readouterr().err
    assert main(["metrics", "chat-1", "--key", "loss"]) == 2
