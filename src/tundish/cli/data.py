"""The commands for data: validate, estimate, prepare."""

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from tundish.base.files import new_folder
from tundish.base.progress_bar import progress_bar
from tundish.cli.arguments import DATA_USAGE, add_create_options, create_arguments
from tundish.cli.output import PICTURES, add_json, new_file, print_json
from tundish.cli.parsing import Command
from tundish.errors import DataError, SpecError
from tundish.plan.address import local_path
from tundish.runs import planning

if TYPE_CHECKING:
    from tundish.data.report import Report, Validation


def validate_options(command: argparse.ArgumentParser) -> None:
    """What `tundish validate` takes."""
    add_json(command)
    command.add_argument("--report", metavar="FILE", help="write the report as JSON, with line numbers (up to 2 MB)")
    _add_data_options(command)


def validate(arguments: argparse.Namespace) -> int:
    """`tundish validate`."""
    file = new_file("--report", arguments.report)
    validation = planning.validate(_data_arguments(arguments), progress_bar)
    if file:
        validation.save(file)
    if arguments.json:
        print_json(validation.to_dict())
    else:
        _show(validation, file)
    return 0 if validation.ok else 1


def estimate_options(command: argparse.ArgumentParser) -> None:
    """What `tundish estimate` takes."""
    add_json(command)
    command.add_argument(
        "--plot", metavar="FILE", help="draw a histogram of the sample lengths (.png, .svg, .pdf, .jpg)"
    )
    _add_data_options(command)


def estimate(arguments: argparse.Namespace) -> int:
    """`tundish estimate`."""
    file = new_file("--plot", arguments.plot, PICTURES)
    data = planning.estimate(_data_arguments(arguments), progress_bar)
    if file:
        data.plot(file)
    if arguments.json:
        return print_json(dataclasses.asdict(data))
    print(data)
    if file:
        print(f"\nHistogram: {file}")
    return 0


def prepare_options(command: argparse.ArgumentParser) -> None:
    """What `tundish prepare` takes."""
    add_json(command)
    command.add_argument("--out", metavar="DIR", help="copy the shards to DIR/train and DIR/eval")
    _add_data_options(command)


def prepare(arguments: argparse.Namespace) -> int:
    """`tundish prepare`."""
    out = local_path(arguments.out, "--out") if arguments.out else None
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SpecError(f"--out: {out} already exists. Choose a new folder.")
    validation = planning.validate(_data_arguments(arguments), progress_bar)
    if not validation.ok:
        raise DataError([message for report in validation.reports for message in report.messages])
    folders = {_split(report): _folder(report) for report in validation.reports}
    if out is not None:
        folders = _published(folders, out)
    if arguments.json:
        return print_json({split: str(folder) for split, folder in folders.items()})
    for report in validation.reports:
        print("\n".join(report.lines()))
        print(f"  {folders[_split(report)]}")
    return 0


def _add_data_options(command: argparse.ArgumentParser) -> None:
    add_create_options(command, optional={"register_to"}, leave_out={"validate_inputs"})


def _data_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `create()`. It requires `register_to`; these commands do not use it."""
    values = create_arguments(arguments)
    return {**values, "register_to": values["register_to"] or "main.default"}


def _split(report: "Report") -> str:
    return report.argument.removesuffix("_data_path")


def _folder(report: "Report") -> Path:
    assert report.prepared is not None
    return Path(report.prepared.folder)


def _published(folders: Mapping[str, Path], out: Path) -> dict[str, Path]:
    """Copy prepared folders to `out`: all of them, or nothing."""
    try:
        with new_folder(out) as folder_to_fill:
            for split, folder in folders.items():
                shutil.copytree(folder, folder_to_fill / split)
    except shutil.Error as error:
        raise OSError(error.args[0][0][2]) from error
    return {split: out / split for split in folders}


def _show(validation: "Validation", report_file: Path | None) -> None:
    if not sys.stdout.isatty():
        print(validation)
    else:
        console = Console(highlight=False, soft_wrap=True)
        for report in validation.reports:
            _show_report(console, report)
    print("\nThe data is valid." if validation.ok else "\nThe data has problems; create() would reject it.")
    if report_file:
        print(f"Report: {report_file}")
    elif not validation.ok:
        print("--report FILE writes the line numbers.")


def _show_report(console: Console, report: "Report") -> None:
    head, *rest = report.lines()
    console.print(Text(head, style="bold"))
    for line in rest:
        kind = line.split(":")[0].strip()
        console.print(Text(line, style={"problem": "red", "warning": "yellow"}.get(kind, "")))
    if report.preview:
        console.print(
            Text("  The first sample as the model sees it; tokens that are trained on are green.", style="dim")
        )
        console.print(Text.assemble(*((text, "green" if trained else "dim") for text, trained in report.preview)))


COMMANDS = {
    "validate": Command(
        options=validate_options,
        action=validate,
        usage=DATA_USAGE,
        examples=[
            "tundish validate --model ./my-model --train-data-path ./train.jsonl",
            "tundish validate --model ./my-model --train-data-path ./train.jsonl --report report.json",
        ],
    ),
    "estimate": Command(
        options=estimate_options,
        action=estimate,
        usage=DATA_USAGE,
        examples=[
            "tundish estimate --model ./my-model --train-data-path ./train.jsonl --training-duration 3ep",
            "tundish estimate --model ./my-model --train-data-path ./train.jsonl --plot lengths.png",
        ],
    ),
    "prepare": Command(
        options=prepare_options,
        action=prepare,
        usage=DATA_USAGE,
        examples=[
            "tundish prepare --model ./my-model --train-data-path ./train.jsonl",
            "tundish prepare --model ./my-model --train-data-path ./train.jsonl --out ./prepared",
        ],
    ),
}
