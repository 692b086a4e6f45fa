"""cli/data.py: validate, estimate and prepare on a terminal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish.cli import main
from tundish.cli.output import PICTURES

Capture = pytest.CaptureFixture[str]
WriteLines = Callable[[Path, Any], Path]
USER = {"role": "user", "content": "2 + 2?"}


@pytest.fixture
def options(arguments: dict[str, Any]) -> list[str]:
    """Of a good call, without --register-to."""
    return ["--model", arguments["model"], "--train-data-path", arguments["train_data_path"]]


def test_good_data_is_exit_code_0(options: list[str], capsys: Capture) -> None:
    """CI would refuse good data."""
    assert main(["validate", *options]) == 0
    shown = capsys.readouterr().out
    assert "train.jsonl, 3 lines, 3 samples" in shown and "The data is valid." in shown
    assert "<|assistant|>[[4</s>" in shown


def test_bad_data_is_exit_code_1_with_a_report(
    options: list[str], capsys: Capture, tmp_path: Path, write_lines: WriteLines
) -> None:
    """CI would train on it."""
    write_lines(Path(options[3]), [{"messages": [USER]}])
    assert main(["validate", *options, "--report", str(tmp_path / "r.json")]) == 1
    shown = capsys.readouterr()
    assert "train.jsonl, line 1: the last message is from 'user'" in shown.out and "Traceback" not in shown.err
    assert json.loads((tmp_path / "r.json").read_text())["reports"][0]["problems"][0]["where"] == [1]
    assert main(["validate", *options, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize("command", ["validate", "estimate", "prepare"])
def test_wrong_arguments_are_exit_code_2(options: list[str], capsys: Capture, command: str) -> None:
    """A script could not tell its own mistake from bad data."""
    assert main([command, *options[:2], "--train-data-path", "/no/such.jsonl", "--context-length", "3"]) == 2
    shown = capsys.readouterr().err
    assert (
        "context_length: must be an integer of at least 8, not 3" in shown
        and "/no/such.jsonl: there is no such file" in shown
    )


def test_estimates_are_printed_and_drawn(options: list[str], capsys: Capture, tmp_path: Path) -> None:
    """The picture would be missing, or the numbers."""
    assert main(["estimate", *options, "--plot", str(tmp_path / "lengths.png")]) == 0
    shown = capsys.readouterr().out
    assert "samples        3" in shown and "█" in shown and (tmp_path / "lengths.png").stat().st_size > 1000
    assert main(["estimate", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 3


def test_a_picture_is_of_the_kind_that_its_name_promises(options: list[str], tmp_path: Path) -> None:
    """A page would refuse the .svg that is a PNG."""
    kinds = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".jpg": b"\xff\xd8"}
    assert set(kinds) == set(PICTURES)
    for kind, beginning in kinds.items():
        file = tmp_path / f"lengths{kind}"
        assert main(["estimate", *options, "--plot", str(file)]) == 0
        assert file.read_bytes().startswith(beginning)


def test_an_option_that_is_no_integer_is_one_of_all_problems(options: list[str], capsys: Capture) -> None:
    """The user would mend one after the other; an integer that is too large be called none."""
    wrong = ["--context-length", "12x", "--devices", "1.5", "--learning-rate", "-3"]
    assert main(["estimate", *options[:2], "--train-data-path", "/no/such.jsonl", *wrong]) == 2
    shown = capsys.readouterr().err
    assert "context_length: must be an integer of at least 8, not '12x'." in shown
    assert "compute: devices_per_node must be an integer of at least 1, not '1.5'." in shown
    assert "learning_rate: must be" in shown and "/no/such.jsonl: there is no such file" in shown
    assert main(["estimate", *options, "--context-length", "100000000000000"]) == 2
    assert "context_length: must be at most" in capsys.readouterr().err


@pytest.mark.filterwarnings(r"ignore:unclosed file .*index\.json:ResourceWarning")  # Streaming leaves it open
def test_prepared_shards_are_copied_where_asked(options: list[str], capsys: Capture, tmp_path: Path) -> None:
    """Another tool would find half a folder, or one that is no data set."""
    from streaming import LocalDataset

    out = tmp_path / "out"
    assert main(["prepare", *options, "--eval-data-path", options[3], "--out", str(out), "--json"]) == 0
    folders = json.loads(capsys.readouterr().out)
    assert folders == {"train": str(out / "train"), "eval": str(out / "eval")}
    rows = LocalDataset(str(out / "train"))
    assert sum(len(rows[number]["segments"]) for number in range(len(rows))) == 3
    assert main(["prepare", *options, "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_bad_data_is_not_prepared(options: list[str], capsys: Capture, tmp_path: Path, write_lines: WriteLines) -> None:
    """The good part of it would be trained."""
    write_lines(Path(options[3]), ["{"])
    assert main(["prepare", *options, "--out", str(tmp_path / "out")]) == 1
    assert "line 1: not JSON" in capsys.readouterr().err and not (tmp_path / "out").exists()
