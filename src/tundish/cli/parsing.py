"""The parser: it imports the module of a command when the command is chosen, and suggests corrections of typos."""

import argparse
import importlib
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tundish.errors import did_you_mean

_Commands = argparse._SubParsersAction  # pyright: ignore[reportPrivateUsage]  argparse has no public name for it


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command, as its module describes it."""

    options: Callable[[argparse.ArgumentParser], object]
    """Adds its options to a parser."""
    action: Callable[[argparse.Namespace], int]
    """Runs it and returns the exit code."""
    examples: Sequence[str]
    usage: str | None = None
    """The usage line after `tundish COMMAND`, if a list of all options would be too long."""
    interrupted: str = ""
    """What Ctrl-C leaves behind, a sentence; an action may raise KeyboardInterrupt with a better one."""


class UsageError(Exception):
    """The command line cannot be parsed."""

    def __init__(self, message: str, usage: str = "") -> None:
        super().__init__(message)
        self.message, self.usage = message, usage


class _Help(argparse.HelpFormatter):
    """Puts the help text beside names of up to 24 letters, and keeps the lines of a text that has several."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """A parser that suggests corrections, and raises instead of exiting."""

    def __init__(self, **settings: Any) -> None:
        # With abbreviations, adding an option could change the meaning of a script.
        super().__init__(allow_abbrev=False, formatter_class=_Help, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise a UsageError."""
        raise UsageError(message, self.format_usage().strip())

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help; argparse would ignore a full disk or a closed pipe."""
        print(message, end="", file=file)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        if not isinstance(action, _Commands):
            raise argparse.ArgumentError(action, f"must be {' or '.join(known)}, not {value!r}.")
        near = did_you_mean(str(value), known)
        raise argparse.ArgumentError(None, f"unknown command {value!r}.{near} `tundish --help` lists the commands.")


class CommandParser(Parser):
    """The parser of one command; its options are read from the command's module when it parses."""

    def __init__(self, *, module: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._module, self._loaded, self.intermixed = module, False, True

    def load(self) -> None:
        """Add the command's options, action and examples."""
        if self._loaded:
            return
        self._loaded = True
        command: Command = importlib.import_module(self._module).COMMANDS[self.prog.split()[-1]]
        command.options(self)
        self.set_defaults(action=command.action, interrupted=command.interrupted)
        self.usage = command.usage and f"{self.prog} {command.usage}"
        self.epilog = "\n".join(["examples:", *map(_example, command.examples)])

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Options and other arguments in any order; an unknown option is an error."""
        if not self.intermixed:
            return super().parse_known_args(args, namespace)
        self.load()
        self.intermixed = False  # the next call calls this method again, for each of its two passes
        try:
            parsed, extra = self.parse_known_intermixed_args(args, namespace)
        finally:
            self.intermixed = True
        if extra:
            self.error(self._unknown(extra))
        return parsed, extra

    def _unknown(self, words: Sequence[str]) -> str:
        option = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
        if option is None:
            return f"`{self.prog}` takes no argument {' '.join(words)!r}."
        near = did_you_mean(option, self._option_string_actions)
        return f"`{self.prog}` has no option {option}.{near} `{self.prog} --help` lists its options."


def whole(text: str) -> int:
    """Read an integer, as the `type` of an option.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    if not re.fullmatch(r"-?\d{1,18}", text, re.ASCII):
        size = " of at most 18 digits" if text.lstrip("-").isdecimal() else ""
        raise argparse.ArgumentTypeError(f"must be an integer{size}, not {text[:40]!r}.")
    return int(text)


def positive(text: str) -> int:
    """Read an integer of at least 1, as the `type` of an option.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    if whole(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text!r}.")
    return int(text)


def _example(line: str) -> str:
    """A command to copy, on several lines if it is long."""
    return " \\\n".join(
        textwrap.wrap(line, 76, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
    )


def add_commands(parser: argparse.ArgumentParser, commands: Mapping[str, tuple[str, str]]) -> None:
    """Give a parser its commands: name → module and summary."""
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=CommandParser, title="commands")
    for name, (module, summary) in commands.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        parsers.add_parser(name, help=summary, description=description, module=f"tundish.cli.{module}")


def offer(action: argparse.Action, values: Callable[[], Iterable[str]]) -> None:
    """Let the shell complete the value of an option or argument."""

    def completer(**_: Any) -> Iterable[str]:
        return values()

    action.completer = completer  # pyright: ignore[reportAttributeAccessIssue]  argcomplete's attribute


def complete(parser: argparse.ArgumentParser, line: str) -> NoReturn:
    """Print the completions of a line for the shell, and exit."""
    import argcomplete

    for action in parser._actions:
        if isinstance(action, _Commands):
            for name in set(line.split()) & set(action.choices):
                # argcomplete looks at the options before it parses, and parses only once.
                action.choices[name].load()
                action.choices[name].intermixed = False
    argcomplete.autocomplete(parser)
    raise SystemExit(1)  # reached only if the variable was not set by a shell
