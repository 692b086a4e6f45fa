"""cli/parsing.py: mistyped words, help, and what the shell completes."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tundish.cli import COMMANDS, build_parser, main

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("craete", "unknown command 'craete'. Did you mean create? `tundish --help` lists the commands."),
        ("create --modle x", "`tundish create` has no option --modle. Did you mean --model"),
        ("create --train-data x", "`tundish create` has no option --train-data. Did you mean --train-data-path"),
        ("export RUN --dtype half", "argument --dtype: must be bfloat16 or float32, not 'half'."),
        ("list chat-1", "`tundish list` takes no argument 'chat-1'."),
        ("logs RUN --rank 12x", "argument --rank: must be an integer, not '12x'."),
        (f"logs RUN -n {'9' * 19}", f"argument -n/--lines: must be an integer of at most 18 digits, not '{'9' * 19}'."),
        ("list --limit 0", "argument --limit: must be an integer of at least 1, not '0'."),
        ("get", "the following arguments are required: RUN"),
    ],
)
def test_a_mistyped_word_is_told_with_what_may_have_been_meant(line: str, told: str, capsys: Capture) -> None:
    """The user would read through all of the help for a missing letter."""
    assert main(line.split()) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith(f"tundish: {told}") and shown[1].startswith("usage: tundish")


def test_options_stand_anywhere_in_the_line() -> None:
    """`tundish run FILE --detach key=value` would refuse the last word."""
    parse = build_parser().parse_args
    found = parse(["run", "--json", "x.yaml", "a=1", "--detach", "b=2", "--devices", "2", "c=3"])
    assert (found.file, found.arguments, found.detach, found.devices_per_node) == (
        "x.yaml",
        ["a=1", "b=2", "c=3"],
        True,
        2,
    )
    assert parse(["cancel", "a", "--json", "b"]).runs == ["a", "b"]
    assert parse(["logs", "-n", "3", "chat-1", "-f"]).run == "chat-1"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal_marks_what_is_required_and_has_two_examples(
    command: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines would break, and nobody see what must be given."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    examples = shown[shown.index("\nexamples:\n") :]
    assert examples.count("  tundish ") >= 2
    if command in ("create", "render"):
        assert shown.count("(required)") == 3
    elif command in ("validate", "estimate", "prepare"):
        assert shown.count("(required)") == 2
    for text in ("None", "`", ". ("):
        assert text not in shown.partition("\nexamples:")[0].replace("...", "")


def test_tundish_alone_shows_its_help_and_help_answers_at_once(capsys: Capture) -> None:
    """A first try would end in an error."""
    assert main([]) == 0
    alone = capsys.readouterr().out
    assert main(["--help"]) == 0 and capsys.readouterr().out == alone and "tundish COMMAND --help" in alone


COMPLETED: Mapping[str, set[str]] = {
    "tundish re": {"render", "resume"},
    "tundish create --mo": {"--model"},
    "tundish create --model x --device ": {"gpu", "cpu"},
    "tundish get ": {"@last", "chat-1", "chat-2"},
    "tundish rm chat-1 ch": {"chat-1", "chat-2"},
}


@pytest.mark.parametrize("line", COMPLETED)
def test_the_shell_completes_commands_options_and_runs(line: str, make_run: Callable[..., Any]) -> None:
    """Tab would do nothing, or print a traceback into the line."""
    for name in ("chat-1", "chat-2"):
        make_run(name, ("FAILED", "x"))
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1", "COMP_LINE": line}
    command = ["bash", "-c", f'exec "{sys.executable}" -m tundish 8>&1 9>&2 >/dev/null']
    environment = {**os.environ, **asked, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert set(done.stdout.split()) - {"-h", "--help", "--json"} == COMPLETED[line] and done.stderr == ""
