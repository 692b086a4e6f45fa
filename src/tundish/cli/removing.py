"""The commands that make room: rm, clean. Sizes are told first; nothing goes without a yes."""

import argparse
import re
import sys
from datetime import datetime, timedelta

from tundish.base.home import home
from tundish.base.text import size_text
from tundish.cli.output import RUN_HELP, add_json, complete_runs, print_json, print_table
from tundish.cli.parsing import Command
from tundish.errors import RequestError, SpecError
from tundish.runs import cleaning, removing, selecting

UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def rm_options(command: argparse.ArgumentParser) -> None:
    """What `tundish rm` takes."""
    add_json(command)
    named = f"{RUN_HELP}; with --yes its whole name"
    complete_runs(command.add_argument("runs", nargs="*", metavar="RUN", help=named))
    command.add_argument(
        "--older-than", metavar="AGE", help="runs that ended so long ago: 30d, 2w, 12h; of those named, or of all"
    )
    command.add_argument(
        "--local", action="store_true", help="only what is on this machine: do not ask MLflow or an object store"
    )
    _add_asking(command)


def rm(arguments: argparse.Namespace) -> int:
    """`tundish rm RUN…`."""
    names = selecting.all_named(arguments.runs, exactly=arguments.yes)
    if arguments.older_than is not None:
        old = removing.ended_before(datetime.now().astimezone() - _age(arguments.older_than))
        names = old if not names else [name for name in names if name in old]
        if not names:
            return _nothing(arguments, f"No run has ended more than {arguments.older_than} ago.")
    elif not names:
        raise RequestError("Name the runs to remove, or say --older-than.")
    plan = removing.plan(names, local=arguments.local)
    size = sum(one.bytes for one in plan)
    if not arguments.json:
        print_table(
            ["RUN", "STATUS", "ENDED", "SIZE"],
            [
                (
                    one.name,
                    one.status,
                    f"{one.ended_at.astimezone():%Y-%m-%d}" if one.ended_at else "",
                    size_text(one.bytes),
                )
                for one in plan
            ],
        )
        for one in plan:
            for note in one.notes:
                print(f"{one.name}: {note}" if len(plan) > 1 else note)
    if _agreed(arguments, f"Remove {_count(len(plan), 'run')}, {size_text(size)}?"):
        for one in plan:
            removing.remove(one)
            if not arguments.json:
                print(f"Removed {one.name}, {size_text(one.bytes)}.")
    elif not arguments.dry_run:
        return 1
    if arguments.json:
        runs = [{"run": one.name, "bytes": one.bytes, "folders": one.folders, "notes": one.notes} for one in plan]
        return print_json({"removed": not arguments.dry_run, "bytes": size, "runs": runs})
    return 0


def clean_options(command: argparse.ArgumentParser) -> None:
    """What `tundish clean` takes."""
    add_json(command)
    _add_asking(command)


def clean(arguments: argparse.Namespace) -> int:
    """`tundish clean`."""
    found, used = cleaning.leftovers()
    size = sum(one.bytes for one in found)
    if not found:
        return _nothing(arguments, f"There is nothing to remove in {home()}; {size_text(used)} are in use.")
    if not arguments.json:
        print_table(
            ["WHAT", "SIZE", "WHERE"], [(one.kind, size_text(one.bytes), one.path.relative_to(home())) for one in found]
        )
        print(f"In {home()}. Kept, as runs need it or somebody works with it: {size_text(used)}.")
    removed = list[cleaning.Leftover]()
    if _agreed(arguments, f"Remove {_count(len(found), 'folder')}, {size_text(size)}?"):
        removed = [one for one in found if cleaning.remove(one)]
        kept = f" {_count(len(found) - len(removed), 'folder')} came into use meanwhile." if found != removed else ""
        if not arguments.json:
            print(f"Removed {_count(len(removed), 'folder')}, {size_text(sum(one.bytes for one in removed))}.{kept}")
    elif not arguments.dry_run:
        return 1
    if arguments.json:
        shown = found if arguments.dry_run else removed
        folders = [{"kind": one.kind, "path": one.path, "bytes": one.bytes} for one in shown]
        total = sum(one.bytes for one in shown)
        return print_json({"removed": not arguments.dry_run, "bytes": total, "in_use": used, "folders": folders})
    return 0


def _add_asking(command: argparse.ArgumentParser) -> None:
    command.add_argument("-y", "--yes", action="store_true", help="do not ask")
    command.add_argument("--dry-run", action="store_true", help="only tell what would be removed")


def _agreed(arguments: argparse.Namespace, question: str) -> bool:
    """Whether to do it; asked for where somebody can answer."""
    if arguments.dry_run:
        if not arguments.json:
            print(f"{question} Not now: this was a dry run.")
        return False
    if arguments.yes:
        return True
    if arguments.json or not sys.stdin.isatty():
        raise RequestError("nobody can be asked here. --yes removes what is shown, --dry-run only shows it.")
    try:
        answer = input(f"{question} [y/N] ")
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
    """What `30d` means.

    Raises:
        SpecError: it is no age.
    """
    match = re.fullmatch(rf"(\d{{1,5}})([{''.join(UNITS)}])", text)
    if match is None:
        units = ", ".join(f"{unit} ({name})" for unit, name in UNITS.items())
        raise SpecError(f"--older-than: found {text!r}; allowed is a whole number and one of {units}, such as 30d.")
    return timedelta(**{UNITS[match[2]]: int(match[1])})


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


COMMANDS: dict[str, Command] = {
    "rm": Command(
        options=rm_options,
        action=rm,
        interrupted="`tundish list` shows which runs are still there; a half removed one can be removed again.",
        examples=["tundish rm RUN", "tundish rm --older-than 30d --dry-run"],
    ),
    "clean": Command(
        options=clean_options,
        action=clean,
        interrupted="What is half removed goes with the next `tundish clean`.",
        examples=["tundish clean --dry-run", "tundish clean --yes"],
    ),
}
