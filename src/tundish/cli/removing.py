"""The commands that free disk space: rm, clean. They show sizes first, and remove nothing without confirmation."""

import argparse
import re
import sys
from datetime import datetime, timedelta

from tundish.base.home import home
from tundish.base.text import counted, size_text
from tundish.cli.output import RUN_HELP, add_json, complete_runs, print_json, print_table
from tundish.cli.parsing import Command
from tundish.errors import RequestError, SpecError
from tundish.runs import cleaning, removing, selecting

UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def rm_options(command: argparse.ArgumentParser) -> None:
    """What `tundish rm` takes."""
    add_json(command)
    text = f"{RUN_HELP}; with --yes, the whole name"
    complete_runs(command.add_argument("runs", nargs="*", metavar="RUN", help=text))
    command.add_argument(
        "--older-than",
        metavar="AGE",
        help="only runs that ended at least this long ago: 30d, 2w, 12h; of RUN…, or of all runs",
    )
    command.add_argument(
        "--local",
        action="store_true",
        help="remove only what is on this machine: do not contact MLflow or an object store",
    )
    _add_confirmation(command)


def rm(arguments: argparse.Namespace) -> int:
    """`tundish rm RUN…`."""
    names = selecting.all_named(arguments.runs, exactly=arguments.yes)
    if arguments.older_than is not None:
        old = removing.ended_before(datetime.now().astimezone() - _age(arguments.older_than))
        names = old if not names else [name for name in names if name in old]
        if not names:
            return _nothing(arguments, f"No run ended more than {arguments.older_than} ago.")
    elif not names:
        raise RequestError("no runs given. Name the runs to remove, or use --older-than.")
    plan = removing.plan(names, local=arguments.local)
    size = sum(removal.bytes for removal in plan)
    if not arguments.json:
        print_table(
            ["RUN", "STATUS", "ENDED", "SIZE"],
            [
                (
                    removal.name,
                    removal.status,
                    f"{removal.ended_at.astimezone():%Y-%m-%d}" if removal.ended_at else "",
                    size_text(removal.bytes),
                )
                for removal in plan
            ],
        )
        for removal in plan:
            for note in removal.notes:
                print(f"{removal.name}: {note}" if len(plan) > 1 else note)
    if _agreed(arguments, f"{counted(len(plan), 'run')}, {size_text(size)}"):
        for removal in plan:
            removing.remove(removal)
            if not arguments.json:
                print(f"Removed {removal.name}, {size_text(removal.bytes)}.")
    elif not arguments.dry_run:
        return 1
    if arguments.json:
        runs = [{"run": run.name, "bytes": run.bytes, "folders": run.folders, "notes": run.notes} for run in plan]
        return print_json({"removed": not arguments.dry_run, "bytes": size, "runs": runs})
    return 0


def clean_options(command: argparse.ArgumentParser) -> None:
    """What `tundish clean` takes."""
    add_json(command)
    _add_confirmation(command)


def clean(arguments: argparse.Namespace) -> int:
    """`tundish clean`."""
    leftovers, used = cleaning.leftovers()
    size = sum(leftover.bytes for leftover in leftovers)
    if not leftovers:
        return _nothing(arguments, f"Nothing to remove in {home()}; {size_text(used)} are in use.")
    if not arguments.json:
        print_table(
            ["WHAT", "SIZE", "WHERE"],
            [(item.kind, size_text(item.bytes), item.path.relative_to(home())) for item in leftovers],
        )
        print(f"In {home()}; another {size_text(used)} are in use and stay.")
    removed = list[cleaning.Leftover]()
    if _agreed(arguments, f"{counted(len(leftovers), 'folder')}, {size_text(size)}"):
        removed = [leftover for leftover in leftovers if cleaning.remove(leftover)]
        kept = len(leftovers) - len(removed)
        note = f" {counted(kept, 'folder')} came into use in the meantime." if kept else ""
        if not arguments.json:
            freed = size_text(sum(leftover.bytes for leftover in removed))
            print(f"Removed {counted(len(removed), 'folder')}, {freed}.{note}")
    elif not arguments.dry_run:
        return 1
    if arguments.json:
        shown = leftovers if arguments.dry_run else removed
        folders = [{"kind": folder.kind, "path": folder.path, "bytes": folder.bytes} for folder in shown]
        total = sum(folder.bytes for folder in shown)
        return print_json({"removed": not arguments.dry_run, "bytes": total, "in_use": used, "folders": folders})
    return 0


def _add_confirmation(command: argparse.ArgumentParser) -> None:
    command.add_argument("-y", "--yes", action="store_true", help="do not ask for confirmation")
    command.add_argument("--dry-run", action="store_true", help="only show what would be removed")


def _agreed(arguments: argparse.Namespace, what: str) -> bool:
    """Whether to remove `what`; on a terminal, the user is asked."""
    if arguments.dry_run:
        if not arguments.json:
            print(f"Dry run: this would remove {what}.")
        return False
    if arguments.yes:
        return True
    if arguments.json or not sys.stdin.isatty():
        raise RequestError(
            "cannot ask for confirmation here. Use --yes to remove, or --dry-run to only show what would be removed."
        )
    try:
        answer = input(f"Remove {what}? [y/N] ")
    except EOFError:
        print()
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        print("Nothing was removed.")
        return False
    return True


def _nothing(arguments: argparse.Namespace, sentence: str) -> int:
    if arguments.json:
        return print_json({"removed": not arguments.dry_run, "bytes": 0})
    print(sentence)
    return 0


def _age(text: str) -> timedelta:
    """Read an age such as `30d`.

    Raises:
        SpecError: it is not one.
    """
    match = re.fullmatch(rf"(\d{{1,5}})([{''.join(UNITS)}])", text)
    if match is None:
        units = ", ".join(f"{unit} ({name})" for unit, name in UNITS.items())
        raise SpecError(f"--older-than must be an integer and a unit, such as 30d, not {text!r}. Units: {units}.")
    return timedelta(**{UNITS[match[2]]: int(match[1])})


COMMANDS: dict[str, Command] = {
    "rm": Command(
        options=rm_options,
        action=rm,
        interrupted="`tundish list` shows the remaining runs; a partly removed one can be removed again.",
        examples=["tundish rm RUN", "tundish rm --older-than 30d --dry-run"],
    ),
    "clean": Command(
        options=clean_options,
        action=clean,
        interrupted="The next `tundish clean` removes the rest.",
        examples=["tundish clean --dry-run", "tundish clean --yes"],
    ),
}
