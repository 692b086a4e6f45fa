"""How results are printed: one row per measurement, for a terminal or as the README's Markdown."""

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

HEAD = ("measure", "ours", "theirs", "ratio", "target")
WIDTHS = (58, 38, 40, 7, 16)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result."""

    measure: str
    ours: str
    theirs: str = ""
    ratio: str = ""
    target: str = ""


def machine(cores: int, packages: Sequence[str]) -> str:
    """The CPU, and the versions of the packages that take part."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{model}, {cores} cores; Python {platform.python_version()}; {versions}."


def show(measures: Mapping[int, Callable[[], Iterator[Row]]], names: Mapping[int, str], *, markdown: bool) -> None:
    """Run the measurements and print each row when it is ready."""
    print(_line(HEAD, markdown=markdown))
    if markdown:
        print(_line(["---"] * len(HEAD), markdown=True))
    for number, measure in measures.items():
        print(f"[{number}: {names[number]}]", file=sys.stderr, flush=True)
        for row in measure():
            first, *others = astuple(row)
            print(_line([f"{number}. {first}", *others], markdown=markdown), flush=True)


def options(description: str, measures: Mapping[int, Callable[..., Any]]) -> argparse.ArgumentParser:
    """The command line that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    names = ", ".join(f"{number} {measure.__name__}" for number, measure in measures.items())
    parser.add_argument("--only", default="", metavar="1,3", help=f"measurements to run: {names}")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side; medians are compared (default: 3)")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown, for the README")
    return parser


def show_chosen(measures: Mapping[int, Callable[..., Iterator[Row]]], bench: Any, given: argparse.Namespace) -> None:
    """Run and print the measurements that the command line names."""
    wanted = [int(number) for number in given.only.split(",") if number] or list(measures)
    names = {number: measure.__name__ for number, measure in measures.items()}
    show({number: partial(measures[number], bench) for number in wanted}, names, markdown=given.markdown)


def promised(met: bool, text: str) -> str:
    """The target, and whether it was missed."""
    return text if met else f"{text}, missed"


def _line(cells: Sequence[str], *, markdown: bool) -> str:
    if markdown:
        return f"| {' | '.join(cells)} |"
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()
