"""Output of the commands: JSON and tables; arguments that several commands share."""

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

RUN_HELP = "name of a run, its first letters, or @last"
PICTURES = (".png", ".svg", ".pdf", ".jpg")
LEAST_COLUMN = 8
"""Characters; columns are not made narrower than this."""


def add_json(command: argparse.ArgumentParser) -> None:
    """Give a command the option `--json`."""
    command.add_argument("--json", action="store_true", help="print one JSON document")


def add_run(command: argparse.ArgumentParser) -> None:
    """Give a command the argument RUN."""
    complete_runs(command.add_argument("run", metavar="RUN", help=RUN_HELP))


def complete_runs(action: argparse.Action) -> None:
    """Let the shell complete names of runs."""
    offer(action, lambda: [LAST, *run_names()])


def new_file(option: str, given: str | None, kinds: Sequence[str] = ()) -> Path | None:
    """The file that an option names, checked before the work that it is to hold.

    Raises:
        SpecError: its folder does not exist or is not writable, it is a folder, or its suffix is not one of `kinds`.
    """
    if given is None:
        return None
    file = local_path(given, option)
    if not file.parent.is_dir():
        raise SpecError(f"{option}: the folder {file.parent} does not exist. Create it, or choose another one.")
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise SpecError(f"{option}: {file} is not writable. Choose a file in a folder that you can write to.")
    if kinds and file.suffix.lower() not in kinds:
        raise SpecError(f"{option} must end in one of {', '.join(kinds)}, not {given!r}.")
    return file


def print_json(content: Any) -> int:
    """Print one JSON document; returns exit code 0."""
    text = json.dumps(content, indent=2, default=plain, ensure_ascii=False)
    print(text if streams.can_encode(text) else json.dumps(content, indent=2, default=plain))
    return 0


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value


def record(run: RunRecord) -> dict[str, Any]:
    """All fields of a run, as JSON can hold them."""
    values = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    values["events"] = [dataclasses.asdict(event) for event in run.events or ()]
    values |= {"export_dir": run.export_dir, "model_uri": run.model_uri, "mlflow_url": run.mlflow_url}
    return {name: plain(value) for name, value in values.items() if name != "submitted_config"}


def print_table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table that fits the terminal; in a pipe or file nothing is cut, and the first column never is."""
    lines = [list(titles), *([_cell_text(cell) for cell in row] for row in rows)]
    widths = [max(cell_len(line[i]) for line in lines) for i in range(len(titles))]
    room = shutil.get_terminal_size().columns - 2 * (len(titles) - 1) if sys.stdout.isatty() else sum(widths)
    # Shrink from the right: columns are in order of importance.
    for column in reversed(range(1, len(widths))):
        widths[column] = max(min(widths[column], LEAST_COLUMN), widths[column] - max(0, sum(widths) - room))
    for line in lines:
        print("  ".join(_fitted(cell, width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell_text(cell: object) -> str:
    """A cell on one line; file names may hold line breaks and control characters."""
    return "-" if cell in (None, "") else printable(str(cell)).replace("\n", "\\n")


def _fitted(cell: str, width: int) -> str:
    """A cell of this width; of a long path the end is kept, of other text the beginning."""
    if cell_len(cell) > width and cell.startswith("/"):
        cell = f"…{set_cell_size(cell[::-1], width - 1)[::-1]}"
    elif cell_len(cell) > width:
        cell = f"{set_cell_size(cell, width - 1)}…"
    return set_cell_size(cell, width)
