"""How results are printed: one row a measure, on a terminal or as the README has it."""

import importlib.metadata
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

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
    """What is measured on: processor, and the versions of what takes part."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{model}, {cores} cores; Python {platform.python_version()}; {versions}."


def show(measures: Mapping[int, Callable[[], Iterator[Row]]], names: Mapping[int, str], *, markdown: bool) -> None:
    """Run the measures and print their rows as they come."""
    print(_line(HEAD, markdown=markdown))
    if markdown:
        print(_line(["---"] * len(HEAD), markdown=True))
    for number, measure in measures.items():
        print(f"[{number}: {names[number]}]", file=sys.stderr, flush=True)
        for row in measure():
            first, *others = astuple(row)
            print(_line([f"{number}. {first}", *others], markdown=markdown), flush=True)


def promised(met: bool, text: str) -> str:
    """The target, and whether it was missed."""
    return text if met else f"{text}, missed"


def _line(cells: Sequence[str], *, markdown: bool) -> str:
    if markdown:
        return f"| {' | '.join(cells)} |"
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()
