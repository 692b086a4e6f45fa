"""cli/failures.py: whatever goes wrong is a sentence and an exit code, and one document for `--json`."""

import json
import os
import signal
from pathlib import Path

import pytest

from tundish.base.processes import interrupt_waits
from tundish.cli import main
from tundish.errors import Interrupted

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("line", "kind", "code", "problems"),
    [
        (["get", "none"], "RunNotFoundError", 2, 1),
        (["validate", "--model", "x", "--train-data-path", "/no/such.jsonl"], "SpecError", 2, 2),
        (["cancel"], "RequestError", 2, 1),
        (["list", "--limti", "3"], "UsageError", 2, 1),
        (["lst"], "UsageError", 2, 1),
    ],
)
def test_errors_are_documents_too(line: list[str], kind: str, code: int, problems: int, capsys: Capture) -> None:
    """A script that reads JSON would have to read sentences."""
    assert main([*line, "--json"]) == code
    shown = capsys.readouterr()
    error = json.loads(shown.out)["error"]
    assert (error["type"], error["exit_code"], len(error["problems"])) == (kind, code, problems)
    assert shown.err.startswith(f"tundish: {error['message'].splitlines()[0]}")


@pytest.mark.parametrize(
    ("error", "code", "found"),
    [
        (OSError(13, "Permission denied", "/x/y"), 1, "/x/y: Permission denied. Check that the path"),
        (KeyError("x"), 1, "this is a bug in tundish: KeyError: 'x' ("),
        (RecursionError("deep"), 1, "this is a bug in tundish: RecursionError: deep ("),
        (KeyboardInterrupt(), 130, "interrupted.\n"),
        (Interrupted("ift-1"), 130, "Run ift-1 continues. Follow it with:  tundish events ift-1 --follow\n"),
        (BrokenPipeError(32, "Broken pipe"), 1, "Broken pipe. Check"),
    ],
)
def test_no_error_ends_in_a_traceback(
    error: BaseException, code: int, found: str, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user would read Python; a pipe that broke elsewhere would pass for success."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("tundish.foundation_model.list", fail)
    assert main(["list"]) == code
    shown = capfd.readouterr().err
    assert shown.startswith(f"tundish: {found}") and "Traceback" not in shown


def test_ctrl_c_waits_for_what_belongs_together() -> None:
    """A run would be left with its folder and without its supervisor."""
    done = list[str]()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with pytest.raises(Interrupted, match="Run ift-1 continues"), interrupt_waits(Interrupted("ift-1")):
        os.kill(os.getpid(), signal.SIGINT)
        done.append("all of it")
    assert done == ["all of it"] and signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"a: [1\n", "line 2: expected ',' or ']'"),
        (b"\xff\xfe\x00", "it is not UTF-8 text"),
        (b"a: " + b"[" * 100_000, "it is nested too deeply"),
        (b"#" * (1 << 20 | 1), "it has more than 1,048,576 bytes"),
        (b"a: \x01", "unacceptable character #x0001"),
        (b"a: 2020-99-99", "month must be in 1..12"),
        (None, "Is a directory"),
    ],
    ids=["syntax", "binary", "deep", "large", "control", "no date", "folder"],
)
def test_an_experiment_that_cannot_be_read_is_one_line(
    content: bytes | None, found: str, tmp_path: Path, capsys: Capture
) -> None:
    """A folder, a program or a broken file given as FILE would end in a traceback."""
    file = tmp_path / "x.yaml"
    file.mkdir() if content is None else file.write_bytes(content)
    assert main(["run", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"tundish: {file}: cannot be read ({found}")


def test_a_report_that_could_not_be_written_is_told_first(tmp_path: Path, capsys: Capture) -> None:
    """Hours of validation would end in a message about a folder."""
    for option, command in (("--report", "validate"), ("--plot", "estimate")):
        assert main([command, "--model", "x", "--train-data-path", "y", option, str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith(f"tundish: {option}: {tmp_path} is not writable.")
