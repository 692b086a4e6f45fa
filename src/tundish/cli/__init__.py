"""The `tundish` command: the verbs of `tundish.foundation_model` for a terminal.

Exit codes: 0 success, 1 failure (invalid data, a failed run), 2 wrong arguments, 130 interrupted by Ctrl-C.
A command's options, action and examples are in one of the modules of this package.
"""

import argparse
import atexit
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import NoReturn

from tundish import __version__
from tundish.cli import failures, streams
from tundish.cli.parsing import Parser, UsageError, add_commands, complete

COMPLETING = "_ARGCOMPLETE"
"""Environment variable that a shell sets when it asks for completions."""
COMMANDS: Mapping[str, tuple[str, str]] = {
    "create": ("starting", "start a run in the background"),
    "run": ("starting", "start a run from a YAML file of create() arguments, and show its progress"),
    "render": ("starting", "print the LLM Foundry YAML of a run without starting it"),
    "resume": ("starting", "continue a run that failed, was canceled or was killed"),
    "validate": ("data", "check every row of the data, as create does, and show a sample"),
    "estimate": ("data", "estimate the samples, tokens, rows and steps of a run"),
    "prepare": ("data", "tokenize and pack the data, for a run to reuse"),
    "list": ("runs", "list runs, newest first"),
    "get": ("runs", "show one run"),
    "events": ("runs", "show the events of a run"),
    "logs": ("watching", "show the end of a log of a run"),
    "metrics": ("watching", "show the metrics of a run, or plot its losses"),
    "cancel": ("runs", "stop runs; their checkpoints are kept"),
    "rm": ("removing", "remove runs with their checkpoints; registered model versions are kept"),
    "clean": ("removing", "remove prepared data, downloads and drafts that no run needs"),
    "checkpoints": ("checkpoints", "list or verify the checkpoints of a run"),
    "export": ("checkpoints", "export a checkpoint as a Hugging Face model folder"),
    "example": ("machine", "create a tiny model and dataset to try the commands with"),
    "models": ("machine", "list the supported models"),
    "doctor": ("machine", "check whether this machine is ready to train"),
}
"""Name → module and summary. A module is imported when its command is chosen, which keeps `tundish --help` fast."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    description = "Fine-tune language models on your own machines, from data to a registered model in one call."
    parser = Parser(
        prog="tundish", description=description, epilog="`tundish COMMAND --help` shows the options of a command."
    )
    parser.add_argument("--version", action="version", version=f"tundish {__version__}")
    add_commands(parser, COMMANDS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; every error becomes a message on standard error."""
    streams.prepare()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
    except SystemExit:  # --help, --version
        code = 0
    except BaseException as error:
        return failures.report(error, words)
    # Output is buffered: a full disk is noticed here.
    return failures.report(error, words) if (error := streams.flush()) else code


def entry() -> NoReturn:
    """The `tundish` executable."""
    code = main()
    # What Python does at exit, without freeing all objects: after importing torch that takes seconds.
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]  os._exit skips them
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(words: Sequence[str]) -> int:
    if wrong := next((word for word in words if word != word.encode(errors="replace").decode()), None):
        advice = "Rename it." if sys.getfilesystemencoding() == "utf-8" else "Set PYTHONUTF8=1 to use UTF-8."
        raise UsageError(f"{os.fsencode(wrong)!r} is not valid {sys.getfilesystemencoding()}. {advice}")
    parser = build_parser()
    if COMPLETING in os.environ:
        complete(parser, os.environ.get("COMP_LINE", ""))
    try:
        arguments = parser.parse_args(words)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Nothing was changed.") from None
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        return arguments.action(arguments)
    except KeyboardInterrupt as stop:
        raise stop if stop.args else KeyboardInterrupt(arguments.interrupted) from None
