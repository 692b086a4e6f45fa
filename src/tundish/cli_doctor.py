"""The command that looks at the machine: doctor."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from tundish.cli_arguments import print_json
from tundish.data.findings import printable
from tundish.doctor import examine
from tundish.doctor.finding import Finding

MARKS = {"ok": "OK", "problem": "!!", "absent": "--"}
STYLES = {"ok": "green", "problem": "bold red", "absent": "dim"}


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
