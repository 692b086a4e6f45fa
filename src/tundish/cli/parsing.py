"""The parser: a command's module is loaded when the command is chosen; mistyped words get suggestions."""

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
    """What a module of commands says of one of them."""

    options: Callable[[argparse.ArgumentParser], object]
    """Adds its options to a parser."""
    action: Callable[[argparse.Namespace], int]
    """Does it, and returns the exit code."""
    examples: Sequence[str]
    usage: str | None = None
    """What comes after `tundish COMMAND`, where a list of all options would be too long."""
    interrupted: str = ""
    """What is true after Ctrl-C, where the action itself says nothing."""


class UsageError(Exception):
    """The command line makes no sense."""

    def __init__(self, message: str, usage: str = "") -> None:
        super().__init__(message)
        self.message, self.usage = message, usage


class _Help(argparse.HelpFormatter):
    """Names up to 24 letters have their text beside them; text that has lines of its own keeps them."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """A parser that suggests what may have been meant, and does not end the process."""

    def __init__(self, **settings: Any) -> None:
        # An option that is added later must not change what a script means.
        super().__init__(allow_abbrev=False, formatter_class=_Help, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise a UsageError."""
        raise UsageError(message, self.format_usage().strip())

    def _print_message(self, message: str, file: Any = None) -> None:
        """Help goes to a full disk or a closed pipe as everything else: with an error."""
        print(message, end="", file=file)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        if not isinstance(action, _Commands):
            raise argparse.ArgumentError(action, f"found {value!r}; allowed is {' or '.join(known)}.")
        near = did_you_mean(str(value), known)
        raise argparse.ArgumentError(None, f"there is no command {value!r}.{near} `tundish --help` lists them.")


class CommandParser(Parser):
    """The parser of one command; what it takes is read from its module once it is asked to parse."""

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
        self.intermixed = False  # what is called next calls this method for each of its two passes
        try:
            found, extra = self.parse_known_intermixed_args(args, namespace)
        finally:
            self.intermixed = True
        if extra:
            self.error(self._unknown(extra))
        return found, extra

    def _unknown(self, words: Sequence[str]) -> str:
        option = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
        if option is None:
            return f"found {' '.join(words)!r}, which `{self.prog}` does not take."
        near = did_you_mean(option, self._option_string_actions)
        return f"`{self.prog}` has no option {option}.{near} `{self.prog} --help` lists its options."


def whole(text: str) -> int:
    """The type of an option that is a whole number.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not re.fullmatch(r"-?\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed is a whole number.")
    return int(text)


def positive(text: str) -> int:
    """The type of an option that counts something.

    Raises:
        argparse.ArgumentTypeError: it is no whole number from 1.
    """
    if whole(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed is a whole number from 1.")
    return int(text)


def _example(line: str) -> str:
    """A command as people copy it, on several lines where it is long."""
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
    """Tell the shell what may come next in a line, and end the process."""
    import argcomplete

    for action in parser._actions:
        if isinstance(action, _Commands):
            for name in set(line.split()) & set(action.choices):
                # argcomplete must see the options before it parses, and parses once.
                action.choices[name].load()
                action.choices[name].intermixed = False
    argcomplete.autocomplete(parser)
    raise SystemExit(1)  # not asked by a shell, in spite of its variable
