"""What the commands print: JSON, records, tables."""

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size

from tundish.base.text import printable
from tundish.cli import streams
from tundish.cli.parsing import offer
from tundish.errors import SpecError
from tundish.plan.address import local_path
from tundish.runs.reading import run_names
from tundish.runs.records import RunRecord
from tundish.runs.selecting import LAST

RUN_HELP = "a run's name, its first letters, or @last"
PICTURES = (".png", ".svg", ".pdf", ".jpg")
LEAST_COLUMN = 8
"""Letters; no column of a table becomes narrower."""


def add_json(command: argparse.ArgumentParser) -> None:
    """Give a command the option `--json`."""
    command.add_argument("--json", action="store_true", help="print one JSON document")


def add_run(command: argparse.ArgumentParser) -> None:
    """Give a command the argument RUN."""
    complete_runs(command.add_argument("run", metavar="RUN", help=RUN_HELP))


def complete_runs(action: argparse.Action) -> None:
    """Let the shell complete the names of runs."""
    offer(action, lambda: [LAST, *run_names()])


def new_file(option: str, given: str | None, kinds: Sequence[str] = ()) -> Path | None:
    """The file that an option names; what cannot be written in the end is refused before hours are spent on it.

    Raises:
        SpecError: its folder is not there or not writable, it is a folder, or its name does not end in one of `kinds`.
    """
    if given is None:
        return None
    file = local_path(given, option)
    if not file.parent.is_dir():
        raise SpecError(f"{option}: there is no folder {file.parent}. Make it, or name another one.")
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise SpecError(f"{option}: {file} cannot be written. Name a file in a folder of yours.")
    if kinds and file.suffix.lower() not in kinds:
        raise SpecError(f"{option}: found {given!r}; allowed is a name that ends in {' or '.join(kinds)}.")
    return file


def print_json(content: Any) -> int:
    """Print one JSON document; returns exit code 0."""
    text = json.dumps(content, indent=2, default=plain, ensure_ascii=False)
    print(text if streams.takes(text) else json.dumps(content, indent=2, default=plain))
    return 0


def plain(value: Any) -> Any:
    """What JSON can say of a value."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value


def record(run: RunRecord) -> dict[str, Any]:
    """All that is known of a run, as JSON can say it."""
    found = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    found["events"] = [dataclasses.asdict(event) for event in run.events or ()]
    found["export_dir"] = run.export_dir
    found["model_uri"], found["mlflow_url"] = run.model_uri, run.mlflow_url
    return {name: plain(value) for name, value in found.items() if name != "submitted_config"}


def print_table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Lines as wide as the terminal, or as wide as they are where nobody looks; the first column is never cut."""
    lines = [list(titles), *([_told(cell) for cell in row] for row in rows)]
    widths = [max(cell_len(line[i]) for line in lines) for i in range(len(titles))]
    room = shutil.get_terminal_size().columns - 2 * (len(titles) - 1) if sys.stdout.isatty() else sum(widths)
    # The last column is the least important one.
    for column in reversed(range(1, len(widths))):
        widths[column] = max(min(widths[column], LEAST_COLUMN), widths[column] - max(0, sum(widths) - room))
    for line in lines:
        print("  ".join(_fitted(cell, width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _told(cell: object) -> str:
    """A cell's text, on one line: names of files may hold anything."""
    return "-" if cell in (None, "") else printable(str(cell)).replace("\n", "\\n")


def _fitted(cell: str, width: int) -> str:
    """A cell of that width: a path that is too long keeps its end, any other text its beginning."""
    if cell_len(cell) > width and cell.startswith("/"):
        cell = f"…{set_cell_size(cell[::-1], width - 1)[::-1]}"
    elif cell_len(cell) > width:
        cell = f"{set_cell_size(cell, width - 1)}…"
    return set_cell_size(cell, width)
