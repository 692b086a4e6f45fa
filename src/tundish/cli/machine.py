"""The commands for a start: models, doctor, example."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence

from tundish import foundation_model as fm
from tundish.base.text import printable
from tundish.cli.output import add_json, print_json, print_table
from tundish.cli.parsing import Command
from tundish.doctor import examine
from tundish.doctor.finding import Finding

MARKS = {"ok": "OK", "problem": "!!", "absent": "--"}
STYLES = {"ok": "green", "problem": "bold red", "absent": "dim"}


def models(arguments: argparse.Namespace) -> int:
    """`tundish models`."""
    found = fm.get_models()
    if arguments.json:
        return print_json([dataclasses.asdict(model) for model in found])
    print_table(
        ["NAME", "MODEL", "MAX CONTEXT"], [(one.name, one.display_name, one.max_context_length) for one in found]
    )
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """`tundish doctor`."""
    found = examine()
    if arguments.json:
        print_json([dataclasses.asdict(finding) for finding in found])
    elif sys.stdout.isatty():
        _show(found)
    else:
        width = max(len(finding.check) for finding in found)
        for finding in found:
            print(f"{MARKS[finding.state]}  {finding.check:<{width}}  {_text(finding)}")
    return 1 if any(finding.state == "problem" for finding in found) else 0


def example_options(command: argparse.ArgumentParser) -> None:
    """What `tundish example` takes."""
    command.add_argument("folder", nargs="?", default=".", metavar="DIR", help="where (default: this folder)")


def example(arguments: argparse.Namespace) -> int:
    """`tundish example`."""
    from tundish.tiny import write_example

    made = write_example(arguments.folder)
    texts = [
        "a language model of 0.4 million random weights",
        "2,000 chats: a written date, and the date in ISO form",
        "100 others, to evaluate on",
        "the arguments of create() for them",
    ]
    width = max(len(str(path)) for path in made)
    print("\n".join(f"{path!s:<{width}}  {text}" for path, text in zip(made, texts, strict=True)))
    print(f"\nTo train it: tundish run {shlex.quote(str(made[-1]))}")
    return 0


def _show(found: Sequence[Finding]) -> None:
    """For a terminal: in colours, long texts wrapped in their column."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for finding in found:
        style = STYLES[finding.state]
        table.add_row(Text(MARKS[finding.state], style), Text(finding.check), Text(_text(finding)))
    Console(highlight=False).print(table)


def _text(finding: Finding) -> str:
    return printable(f"{finding.found}. {finding.advice}".strip())


COMMANDS = {
    "models": Command(options=add_json, action=models, examples=["tundish models", "tundish models --json"]),
    "doctor": Command(options=add_json, action=doctor, examples=["tundish doctor", "tundish doctor --json"]),
    "example": Command(options=example_options, action=example, examples=["tundish example", "tundish example ./try"]),
}
