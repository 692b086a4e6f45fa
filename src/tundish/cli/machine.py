"""The commands to start with: models, doctor, example."""

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
    known = fm.get_models()
    if arguments.json:
        return print_json([dataclasses.asdict(model) for model in known])
    print_table(
        ["NAME", "MODEL", "MAX CONTEXT"],
        [(model.name, model.display_name, model.max_context_length) for model in known],
    )
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """`tundish doctor`."""
    findings = examine()
    if arguments.json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    elif sys.stdout.isatty():
        _show(findings)
    else:
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            print(f"{MARKS[finding.state]}  {finding.check:<{width}}  {_text(finding)}")
    return 1 if any(finding.state == "problem" for finding in findings) else 0


def example_options(command: argparse.ArgumentParser) -> None:
    """What `tundish example` takes."""
    command.add_argument(
        "folder", nargs="?", default=".", metavar="DIR", help="folder to create them in (default: the current one)"
    )


def example(arguments: argparse.Namespace) -> int:
    """`tundish example`."""
    from tundish.tiny import write_example

    paths = write_example(arguments.folder)
    texts = [
        "a language model with 0.4 million random weights",
        "2,000 chats: a date in words, answered by the date in ISO format",
        "100 more chats, for evaluation",
        "arguments of create() for these files",
    ]
    width = max(len(str(path)) for path in paths)
    print("\n".join(f"{path!s:<{width}}  {text}" for path, text in zip(paths, texts, strict=True)))
    print(f"\nTo train it: tundish run {shlex.quote(str(paths[-1]))}")
    return 0


def _show(findings: Sequence[Finding]) -> None:
    """On a terminal: in color, long texts wrapped within their column."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for finding in findings:
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
