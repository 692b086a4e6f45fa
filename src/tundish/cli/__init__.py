"""The `tundish` command: the verbs of `tundish.foundation_model` for a terminal.

The only place that prints results or exits. Exit codes: 0 done, 1 failed (invalid data, a run that failed), 2 wrong
arguments, 130 stopped by Ctrl-C. A command's options, action and examples are in one of the modules of this package,
which is loaded when the command is chosen: `tundish --help` answers at once.
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
"""Environment variable: a shell asks what may come next on its command line."""
COMMANDS: Mapping[str, tuple[str, str]] = {
    "create": ("starting", "start a run in the background"),
    "run": ("starting", "start the run that a YAML file of create() arguments describes, and show its progress"),
    "render": ("starting", "print the LLM-Foundry YAML of a run without running anything"),
    "resume": ("starting", "continue a run that failed, was canceled or was killed"),
    "validate": ("data", "check every row of the data as create does, and show a sample"),
    "estimate": ("data", "show how many samples, tokens, rows and steps a run would have"),
    "prepare": ("data", "tokenize and pack the data, for a run to reuse"),
    "list": ("runs", "show runs, newest first"),
    "get": ("runs", "show one run"),
    "events": ("runs", "show what happened to a run"),
    "logs": ("watching", "show the end of a run's log"),
    "metrics": ("watching", "show a run's metrics, or draw its losses"),
    "cancel": ("runs", "stop runs; checkpoints stay"),
    "rm": ("removing", "remove runs for good, with their checkpoints; registered versions stay"),
    "clean": ("removing", "remove prepared data, downloads and drafts that no run needs"),
    "checkpoints": ("checkpoints", "list a run's checkpoints, or verify them"),
    "export": ("checkpoints", "write a checkpoint as a Hugging Face folder"),
    "example": ("machine", "write a tiny model and data, to try the commands with"),
    "models": ("machine", "list the supported models"),
    "doctor": ("machine", "check what this machine is missing for a run"),
}
"""Name → the module in which it is, and what it does."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    description = "Fine-tune language models on your own machines: from data to a registered model in one call."
    parser = Parser(
        prog="tundish", description=description, epilog="`tundish COMMAND --help` lists a command's options."
    )
    parser.add_argument("--version", action="version", version=f"tundish {__version__}")
    add_commands(parser, COMMANDS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; whatever goes wrong ends in a sentence."""
    streams.prepare()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
    except SystemExit:  # --help, --version
        code = 0
    except BaseException as error:
        return failures.report(error, words)
    # A full disk shows here, not when Python ends.
    return failures.report(lost, words) if (lost := streams.flush()) else code


def entry() -> NoReturn:
    """The `tundish` of a shell: `main` without Python's own end, which takes seconds once torch has been loaded."""
    code = main()
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]  os._exit skips them
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(words: Sequence[str]) -> int:
    if wrong := next((word for word in words if word != word.encode(errors="replace").decode()), None):
        way = (
            "Rename it." if sys.getfilesystemencoding() == "utf-8" else "Set PYTHONUTF8=1: this locale is another one."
        )
        raise UsageError(f"{os.fsencode(wrong)!r} is not UTF-8 here, as all names in a run are. {way}")
    parser = build_parser()
    if COMPLETING in os.environ:
        complete(parser, os.environ.get("COMP_LINE", ""))
    try:
        arguments = parser.parse_args(words)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Nothing was done.") from None
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        return arguments.action(arguments)
    except KeyboardInterrupt as stop:
        raise stop if stop.args else KeyboardInterrupt(arguments.interrupted) from None
