"""What the commands print: JSON, records, tables."""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from tundish.cli import streams
from tundish.runs.records import ObjectList, TrainingRun


def add_json(command: argparse.ArgumentParser) -> None:
    """Give a command the option `--json`."""
    command.add_argument("--json", action="store_true", help="print one JSON document")


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


def record(run: TrainingRun) -> dict[str, Any]:
    """All that is known of a run, as JSON can say it."""
    found = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    found["events"] = [dataclasses.asdict(event) for event in run.events or ()]
    found["export_dir"] = run.export_dir
    return {name: plain(value) for name, value in found.items() if name != "submitted_config"}


def print_table(items: ObjectList[Any], columns: Mapping[str, str]) -> None:
    """A line an item: attribute name → title."""
    rows = [tuple(columns.values()), *(tuple(str(getattr(item, name) or "-") for name in columns) for item in items)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
