"""The commands that show runs, or stop them: list, get, events, cancel."""

import argparse
import dataclasses
from collections.abc import Sequence
from datetime import datetime

from tundish import foundation_model as fm
from tundish.base.home import runs_dir
from tundish.base.text import printable
from tundish.cli.output import RUN_HELP, add_json, add_run, complete_runs, print_json, print_table, record
from tundish.cli.parsing import Command, positive
from tundish.errors import Interrupted
from tundish.runs import control, following, reading, selecting


def get_options(command: argparse.ArgumentParser) -> None:
    """What `tundish get` takes."""
    add_json(command)
    add_run(command)


def get(arguments: argparse.Namespace) -> int:
    """`tundish get`."""
    run = reading.read_run(selecting.named(arguments.run))
    if arguments.json:
        return print_json(record(run))
    texts = {name: _text(getattr(run, name)) for name in record(run) if name != "events"}
    width = max(len(name) for name, text in texts.items() if text)
    for name, text in texts.items():
        if text:
            print(f"{name.replace('_', ' '):<{width}}  {text}")
    return 0


def _text(value: object) -> str:
    """A value of a record; times are local."""
    if isinstance(value, datetime):
        return f"{value.astimezone():%Y-%m-%d %H:%M:%S}"
    if isinstance(value, list):
        return " | ".join(map(str, value))
    return "" if value is None else printable(str(value))


def list_options(command: argparse.ArgumentParser) -> None:
    """What `tundish list` takes."""
    add_json(command)
    command.add_argument(
        "--status",
        action="append",
        metavar="STATUS",
        help="only runs with this status, such as RUNNING or FAILED (repeatable)",
    )
    command.add_argument("--limit", type=positive, default=100, metavar="N", help="at most N runs (default 100)")


def list_runs(arguments: argparse.Namespace) -> int:
    """`tundish list`."""
    runs = fm.list(statuses=arguments.status, limit=arguments.limit)
    if arguments.json:
        return print_json([record(run) for run in runs])
    if not len(runs):
        print(_no_runs(arguments.status))
        return 0
    columns = {
        "NAME": [run.name for run in runs],
        "STATUS": [run.run_progress for run in runs],
        "CREATED": [_moment(run.created_at) for run in runs],
        "DURATION": [run.training_duration for run in runs],
        "LOSS": [_loss(run.train_loss) for run in runs],
        "EVAL LOSS": [_loss(run.eval_loss) for run in runs],
        "VERSION": [run.registered_version for run in runs],
        "MODEL": [run.model for run in runs],
    }
    # A column that is empty for all runs is left out.
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    print_table(list(shown), list(zip(*shown.values(), strict=True)))
    for run in runs:
        if run.damaged_file is not None:
            print(f"{run.name}: {run.details}")
    return 0


def _no_runs(statuses: Sequence[str] | None) -> str:
    """Why the list is empty, and what to do."""
    if statuses and any(reading.run_names()):
        return f"No run is {' or '.join(statuses).upper()}. `tundish list` shows all runs."
    return f"No runs yet in {runs_dir()}. `tundish create --help` and `tundish run --help` show how to start one."


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _moment(time: datetime | None) -> str:
    return f"{time.astimezone():%Y-%m-%d %H:%M}" if time else ""


def cancel_options(command: argparse.ArgumentParser) -> None:
    """What `tundish cancel` takes."""
    add_json(command)
    complete_runs(command.add_argument("runs", nargs="*", metavar="RUN", help=RUN_HELP))
    command.add_argument("--experiment-id", metavar="ID", help="all runs of this MLflow experiment")


def cancel(arguments: argparse.Namespace) -> int:
    """`tundish cancel`."""
    names = selecting.all_named(arguments.runs)
    canceled, asked = control.cancel(names, arguments.experiment_id)
    if arguments.json:
        return print_json({"canceled": canceled, "asked": asked})
    print(control.cancel_message(canceled, asked))
    return 0


def events_options(command: argparse.ArgumentParser) -> None:
    """What `tundish events` takes."""
    add_json(command)
    add_run(command)
    command.add_argument("--follow", action="store_true", help="show new events until the run ends")


def events(arguments: argparse.Namespace) -> int:
    """`tundish events [--follow]`."""
    name = selecting.named(arguments.run)
    run = reading.read_run(name)
    if arguments.follow:
        try:
            run = reading.wait(name) if arguments.json else following.follow(name)
        except KeyboardInterrupt:
            raise Interrupted(name) from None
    if arguments.json:
        print_json([dataclasses.asdict(event) for event in fm.get_events(name)])
    elif not arguments.follow:
        for event in fm.get_events(name):
            print(event)
    return 1 if arguments.follow and run.status.value == "FAILED" else 0


COMMANDS = {
    "list": Command(
        options=list_options, action=list_runs, examples=["tundish list", "tundish list --status RUNNING --json"]
    ),
    "get": Command(options=get_options, action=get, examples=["tundish get RUN", "tundish get RUN --json"]),
    "events": Command(
        options=events_options, action=events, examples=["tundish events RUN", "tundish events RUN --follow"]
    ),
    "cancel": Command(
        options=cancel_options,
        action=cancel,
        interrupted="`tundish list` shows which runs were canceled.",
        examples=["tundish cancel RUN", "tundish cancel --experiment-id 7"],
    ),
}
