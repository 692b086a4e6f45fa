"""cli/removing.py: nothing goes without a yes; sizes are told before."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tundish.base.home import prepared_dir
from tundish.base.run_folder import RunFolder
from tundish.cli import main

Capture = pytest.CaptureFixture[str]
MakeRun = Callable[..., RunFolder]


@pytest.fixture
def run(make_run: MakeRun) -> RunFolder:
    """A run that failed, in a folder of about half a megabyte."""
    paths = make_run("chat-1", ("CREATED", "waits"), ("FAILED", "in train"))
    paths.logs.mkdir()
    paths.log("train").write_bytes(bytes(500_000))
    return paths


def _answer(monkeypatch: pytest.MonkeyPatch, text: str) -> list[str]:
    """Somebody at the terminal says this; returns what was asked."""
    asked = list[str]()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or text)
    return asked


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("YES ", 0), ("", 1), ("n", 1), ("all", 1)])
def test_a_run_is_removed_after_a_yes(
    run: RunFolder, answer: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """One wrong word would cost a run."""
    asked = _answer(monkeypatch, answer)
    assert main(["rm", "cha", "--local"]) == code
    shown = capsys.readouterr().out
    assert asked[0].startswith("Remove 1 run, 5") and asked[0].endswith(" kB? [y/N] ")
    assert "Its MLflow run id-of-chat-1 is kept." in shown and ("Removed chat-1" in shown) == (code == 0)
    assert run.folder.exists() == (code == 1)


def test_where_nobody_can_answer_yes_must_be_said(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A job would hang at a question, or remove without one; a beginning mean another run tomorrow."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    assert main(["rm", "chat-1", "--local"]) == 2
    assert main(["rm", "cha", "--local", "--yes"]) == 2
    assert main(["rm", "chat-1", "--local", "--dry-run"]) == 0
    assert run.folder.exists()
    assert main(["rm", "chat-1", "--local", "--yes", "--json"]) == 0
    assert not run.folder.exists()
    shown = capsys.readouterr()
    assert "cannot ask for confirmation here" in shown.err and "Did you mean chat-1?" in shown.err
    assert json.loads(shown.out[shown.out.index("{") :])["runs"][0]["run"] == "chat-1"


@pytest.mark.parametrize("age", ["30", "d", "3y", "-3d", "1.5d", "999999d"])
def test_an_age_that_is_none_is_refused(age: str, run: RunFolder, capsys: Capture) -> None:
    """All runs would be old enough."""
    assert main(["rm", f"--older-than={age}", "--yes"]) == 2
    assert (
        f"--older-than must be an integer and a unit, such as 30d, not {age!r}. Units: m (" in capsys.readouterr().err
    )


def test_old_runs_are_chosen_by_their_end(run: RunFolder, capsys: Capture) -> None:
    """A run of today would be removed."""
    assert main(["rm", "--older-than", "30d", "--yes"]) == 0
    assert capsys.readouterr().out == "No run ended more than 30d ago.\n" and run.folder.exists()
    assert main(["rm", "--older-than", "0m", "--local", "--yes"]) == 0 and not run.folder.exists()
    assert main(["rm", "--yes"]) == 2


def test_clean_shows_what_goes_and_what_stays(
    home: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The user would not know what the disk is full of."""
    assert main(["clean"]) == 0
    assert capsys.readouterr().out == f"Nothing to remove in {home}; 0 bytes are in use.\n"
    unused = prepared_dir() / ("a" * 24)
    unused.mkdir(parents=True)
    (unused / "shard.mds").write_bytes(bytes(3_000_000))
    assert main(["clean", "--dry-run"]) == 0 and unused.exists()
    shown = capsys.readouterr().out
    assert f"prepared data  3.0 MB  prepared/{unused.name}" in shown
    assert "Dry run: this would remove 1 folder, 3.0 MB." in shown and "?" not in shown
    asked = _answer(monkeypatch, "n")
    assert main(["clean"]) == 1 and unused.exists() and asked == ["Remove 1 folder, 3.0 MB? [y/N] "]
    assert main(["clean", "--yes", "--json"]) == 0 and not unused.exists()
    shown = capsys.readouterr().out
    assert json.loads(shown[shown.index("{") :])["folders"][0]["kind"] == "prepared data"
    assert run.folder.exists()
