"""The `tundish` command: the verbs of `tundish.foundation_model` for a terminal.

The only place that prints results or exits. Exit codes: 0 done, 1 failed (invalid data, a run that failed), 2 wrong
arguments. A command's options, action and examples are in one of the modules of this package, which is loaded when the
command is chosen: `tundish --help` answers at once.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

from tundish import __version__
from tundish.cli.parsing import Parser, UsageError, add_commands

COMMANDS: Mapping[str, tuple[str, str]] = {
    "create": ("starting", "start a run and return; work goes on in the background"),
    "run": ("starting", "start the run that a YAML file of create() arguments describes, and show its progress"),
    "render": ("starting", "print the LLM-Foundry YAML of a run without running anything"),
    "resume": ("starting", "go on with a run that has failed, was canceled or was killed"),
    "validate": ("data", "check every row of the data as create does, and show a sample"),
    "estimate": ("data", "tell how many samples, tokens, rows and steps a run would have"),
    "prepare": ("data", "tokenize and pack the data, for a run to reuse"),
    "list": ("runs", "show runs, newest first"),
    "get": ("runs", "show one run"),
    "events": ("runs", "show what happened to a run"),
    "cancel": ("runs", "stop runs; checkpoints stay"),
    "checkpoints": ("checkpoints", "list a run's checkpoints, or verify them"),
    "export": ("checkpoints", "write a checkpoint as a Hugging Face folder"),
    "models": ("machine", "list the supported models"),
    "doctor": ("machine", "tell what this machine and its surroundings lack for a run"),
}
"""Name → the module in which it is, and what it does."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    description = "Fine-tune language models on your own machines: from data to a registered model in one call."
    parser = Parser(
        prog="tundish", description=description, epilog="`tundish COMMAND --help` tells a command's options."
    )
    parser.add_argument("--version", action="version", version=f"tundish {__version__}")
    add_commands(parser, COMMANDS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    from tundish.errors import DataError, InputError, RequestError, RunNotFoundError, TundishError

    parser, command = build_parser(), ""
    try:
        arguments = parser.parse_args(argv)
        if arguments.command is None:
            parser.print_help()
            return 0
        command = arguments.command
        return arguments.action(arguments)
    except UsageError as error:
        print(f"tundish: {error.message}\n{error.usage}", file=sys.stderr)
        return 2
    except TundishError as error:
        from tundish.data.findings import printable

        print(f"tundish: {printable(error.message)}", file=sys.stderr)
        wrong_arguments = isinstance(error, InputError | RequestError | RunNotFoundError)
        return 2 if wrong_arguments and not isinstance(error, DataError) else 1
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        print(
            f"tundish: {error}. Check that the path is there and may be written, and that the disk has room.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        watching = command in ("create", "run", "resume", "events")
        goes_on = " watching; a run that was started goes on" if watching else ""
        print(f"\ntundish: stopped{goes_on}.", file=sys.stderr)
        return 130
