"""The commands that look at runs, or stop them: list, get, events, cancel."""

import argparse
import dataclasses

from tundish import foundation_model as fm
from tundish.cli.output import add_json, print_json, print_table, record
from tundish.cli.parsing import Command
from tundish.errors import Interrupted
from tundish.progress import watch


def get_options(command: argparse.ArgumentParser) -> None:
    """What `tundish get` takes."""
    add_json(command)
    command.add_argument("run", metavar="RUN", help="run name")


def get(arguments: argparse.Namespace) -> int:
    """`tundish get`."""
    run = fm.get(arguments.run)
    if arguments.json:
        return print_json(record(run))
    shown = {name: value for name, value in record(run).items() if value not in (None, [], "") and name != "events"}
    width = max(len(name) for name in shown)
    for name, value in shown.items():
        print(f"{name.replace('_', ' '):<{width}}  {value}")
    return 0


def list_options(command: argparse.ArgumentParser) -> None:
    """What `tundish list` takes."""
    add_json(command)
    command.add_argument("--status", action="append", metavar="STATUS", help="only runs with this status (repeatable)")
    command.add_argument("--limit", type=int, default=100, metavar="N", help="at most N runs (default 100)")


def list_runs(arguments: argparse.Namespace) -> int:
    """`tundish list`."""
    runs = fm.list(statuses=arguments.status, limit=arguments.limit)
    if arguments.json:
        return print_json([record(run) for run in runs])
    print_table(runs, {"name": "NAME", "run_progress": "STATUS", "model": "MODEL", "training_duration": "DURATION"})
    for run in runs:
        if run.damaged_file is not None:
            print(f"{run.name}: {run.details}")
    return 0


def cancel_options(command: argparse.ArgumentParser) -> None:
    """What `tundish cancel` takes."""
    add_json(command)
    command.add_argument("runs", nargs="*", metavar="RUN", help="run names")
    command.add_argument("--experiment-id", metavar="ID", help="all runs of an MLflow experiment")


def cancel(arguments: argparse.Namespace) -> int:
    """`tundish cancel`."""
    from tundish.runs import control

    canceled, asked = control.cancel(arguments.runs, arguments.experiment_id)
    if arguments.json:
        return print_json({"canceled": canceled, "asked": asked})
    print(control.cancel_message(canceled, asked))
    return 0


def events_options(command: argparse.ArgumentParser) -> None:
    """What `tundish events` takes."""
    add_json(command)
    command.add_argument("run", metavar="RUN", help="run name")
    command.add_argument("--follow", action="store_true", help="go on until the run has ended")


def events(arguments: argparse.Namespace) -> int:
    """`tundish events [--follow]`."""
    if arguments.follow and not arguments.json:
        try:
            return 1 if watch(arguments.run).status.value == "FAILED" else 0
        except KeyboardInterrupt:
            raise Interrupted(arguments.run) from None
    found = fm.get_events(arguments.run)
    if arguments.json:
        return print_json([dataclasses.asdict(event) for event in found])
    for event in found:
        print(event)
    return 0


COMMANDS = {
    "list": Command(
        options=list_options, action=list_runs, examples=["tundish list", "tundish list --status RUNNING --json"]
    ),
    "get": Command(options=get_options, action=get, examples=["tundish get RUN", "tundish get RUN --json"]),
    "events": Command(
        options=events_options, action=events, examples=["tundish events RUN", "tundish events RUN --follow"]
    ),
    "cancel": Command(
        options=cancel_options, action=cancel, examples=["tundish cancel RUN", "tundish cancel --experiment-id 7"]
    ),
}
