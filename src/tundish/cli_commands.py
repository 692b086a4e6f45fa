"""What each command does: call the verb, print what came back."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tundish import cli_checkpoints, cli_data, cli_doctor
from tundish import foundation_model as fm
from tundish.cli_arguments import (
    assignment,
    check_names,
    compute_arguments,
    create_arguments,
    plain,
    print_json,
    read_experiment,
)
from tundish.progress import bar, watch
from tundish.runs import creating
from tundish.runs.records import ObjectList, TrainingRun


def create(arguments: argparse.Namespace) -> int:
    """`tundish create`."""
    values = create_arguments(arguments)
    values["validate_inputs"] = not arguments.no_validate_inputs
    return _started(creating.create(values, bar), arguments.json, wait=arguments.wait)


def run(arguments: argparse.Namespace) -> int:
    """`tundish run FILE key=value …`."""
    values = read_experiment(Path(arguments.file))
    for text in arguments.arguments:
        given = assignment(text)
        check_names("the command line", given)
        values.update(given)
    return _started(creating.create(values, bar), arguments.json, wait=True)


def render(arguments: argparse.Namespace) -> int:
    """`tundish render`."""
    if arguments.launch:
        return _launch(arguments)
    print(creating.render_only(create_arguments(arguments)), end="")
    return 0


def _launch(arguments: argparse.Namespace) -> int:
    """Print what starts the run, or make a folder of it."""
    from tundish.runs import by_hand

    given, where = create_arguments(arguments), (arguments.master_addr, arguments.master_port)
    if arguments.out is None:
        print("\n".join(by_hand.scripts(given, *where).values()), end="")
        return 0
    for host, script in enumerate(by_hand.write(given, *where, Path(arguments.out))):
        print(f"On host {host}:  bash {script}")
    return 0


def get(arguments: argparse.Namespace) -> int:
    """`tundish get`."""
    run = fm.get(arguments.run)
    if arguments.json:
        return print_json(_record(run))
    shown = {name: value for name, value in _record(run).items() if value not in (None, [], "") and name != "events"}
    width = max(len(name) for name in shown)
    for name, value in shown.items():
        print(f"{name.replace('_', ' '):<{width}}  {value}")
    return 0


def list_runs(arguments: argparse.Namespace) -> int:
    """`tundish list`."""
    runs = fm.list(statuses=arguments.status, limit=arguments.limit)
    if arguments.json:
        return print_json([_record(run) for run in runs])
    _print_table(runs, {"name": "NAME", "run_progress": "STATUS", "model": "MODEL", "training_duration": "DURATION"})
    return 0


def cancel(arguments: argparse.Namespace) -> int:
    """`tundish cancel`."""
    from tundish.runs import control

    canceled, asked = control.cancel(arguments.runs, arguments.experiment_id)
    if arguments.json:
        return print_json({"canceled": canceled, "asked": asked})
    print(control.cancel_message(canceled, asked))
    return 0


def resume(arguments: argparse.Namespace) -> int:
    """`tundish resume`."""
    run = fm.resume(arguments.run, compute=compute_arguments(arguments))
    return _started(run, arguments.json, wait=arguments.wait, done="goes on")


def events(arguments: argparse.Namespace) -> int:
    """`tundish events [--follow]`."""
    if arguments.follow and not arguments.json:
        return 1 if watch(arguments.run).status.value == "FAILED" else 0
    found = fm.get_events(arguments.run)
    if arguments.json:
        return print_json([dataclasses.asdict(event) for event in found])
    for event in found:
        print(event)
    return 0


def models(arguments: argparse.Namespace) -> int:
    """`tundish models`."""
    found = fm.get_models()
    if arguments.json:
        return print_json([dataclasses.asdict(model) for model in found])
    _print_table(found, {"name": "NAME", "display_name": "MODEL", "max_context_length": "MAX CONTEXT"})
    return 0


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "create": create,
    "run": run,
    "render": render,
    "validate": cli_data.validate,
    "estimate": cli_data.estimate,
    "prepare": cli_data.prepare,
    "get": get,
    "list": list_runs,
    "cancel": cancel,
    "resume": resume,
    "events": events,
    "checkpoints": cli_checkpoints.checkpoints,
    "export": cli_checkpoints.export,
    "models": models,
    "doctor": cli_doctor.doctor,
}


def _started(run: TrainingRun, as_json: bool, *, wait: bool, done: str = "was created") -> int:
    if not as_json:
        print(f"Run {run.name} {done}.")
    if wait:
        run = run.wait() if as_json else watch(run.name)
    if as_json:
        print_json(_record(run))
    elif not wait:
        print(f"Follow it with:  tundish events {run.name} --follow")
    return 1 if run.status.value in ("FAILED", "STOPPED") else 0


def _record(run: TrainingRun) -> dict[str, Any]:
    record = {
        field.name: getattr(run, field.name) for field in dataclasses.fields(run) if field.name != "submitted_config"
    }
    record["events"] = [dataclasses.asdict(event) for event in run.events or ()]
    record["export_dir"] = run.export_dir
    return {name: plain(value) for name, value in record.items()}


def _print_table(items: ObjectList[Any], columns: Mapping[str, str]) -> None:
    rows = [tuple(columns.values()), *(tuple(str(getattr(item, name) or "-") for name in columns) for item in items)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
