"""What each command does: call the verb, print what came back."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from tundish import foundation_model as fm
from tundish.cli import CREATE_OPTIONS
from tundish.errors import SpecError
from tundish.progress import watch
from tundish.runs import creating
from tundish.runs.records import ObjectList, TrainingRun

PATH_ARGUMENTS = ("train_data_path", "eval_data_path", "custom_weights_path")
CREATE_ARGUMENTS = [option.replace("-", "_") for option in CREATE_OPTIONS]


def create(arguments: argparse.Namespace) -> int:
    """`tundish create`."""
    values = create_arguments(arguments)
    values["validate_inputs"] = not arguments.no_validate_inputs
    return _started(creating.create(values), arguments.json, wait=arguments.wait)


def run(arguments: argparse.Namespace) -> int:
    """`tundish run FILE key=value …`."""
    values = read_experiment(Path(arguments.file))
    for assignment in arguments.arguments:
        given = _assignment(assignment)
        _check_names("the command line", given)
        values.update(given)
    return _started(creating.create(values), arguments.json, wait=True)


def render(arguments: argparse.Namespace) -> int:
    """`tundish render`."""
    print(creating.render_only(create_arguments(arguments)), end="")
    return 0


def get(arguments: argparse.Namespace) -> int:
    """`tundish get`."""
    run = fm.get(arguments.run)
    if arguments.json:
        return _print_json(_record(run))
    shown = {name: value for name, value in _record(run).items() if value not in (None, [], "") and name != "events"}
    width = max(len(name) for name in shown)
    for name, value in shown.items():
        print(f"{name.replace('_', ' '):<{width}}  {value}")
    return 0


def list_runs(arguments: argparse.Namespace) -> int:
    """`tundish list`."""
    runs = fm.list(statuses=arguments.status, limit=arguments.limit)
    if arguments.json:
        return _print_json([_record(run) for run in runs])
    _print_table(runs, {"name": "NAME", "run_progress": "STATUS", "model": "MODEL", "training_duration": "DURATION"})
    return 0


def cancel(arguments: argparse.Namespace) -> int:
    """`tundish cancel`."""
    from tundish.runs import control

    canceled, asked = control.cancel(arguments.runs, arguments.experiment_id)
    if arguments.json:
        return _print_json({"canceled": canceled, "asked": asked})
    print(control.cancel_message(canceled, asked))
    return 0


def events(arguments: argparse.Namespace) -> int:
    """`tundish events [--follow]`."""
    if arguments.follow and not arguments.json:
        return 1 if watch(arguments.run).status.value == "FAILED" else 0
    found = fm.get_events(arguments.run)
    if arguments.json:
        return _print_json([dataclasses.asdict(event) for event in found])
    for event in found:
        print(event)
    return 0


def checkpoints(arguments: argparse.Namespace) -> int:
    """`tundish checkpoints`."""
    from tundish.runs.selecting import checkpoints as find

    paths = find(arguments.run)
    if arguments.json:
        return _print_json(paths)
    print("\n".join(paths) or "No checkpoints created yet for this run. Please try again later.")
    return 0


def models(arguments: argparse.Namespace) -> int:
    """`tundish models`."""
    found = fm.get_models()
    if arguments.json:
        return _print_json([dataclasses.asdict(model) for model in found])
    _print_table(found, {"name": "NAME", "display_name": "MODEL", "max_context_length": "MAX CONTEXT"})
    return 0


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "create": create,
    "run": run,
    "render": render,
    "get": get,
    "list": list_runs,
    "cancel": cancel,
    "events": events,
    "checkpoints": checkpoints,
    "models": models,
}


def create_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `create()` that the options mean."""
    values = {name: getattr(arguments, name) for name in CREATE_ARGUMENTS}
    compute = {"devices_per_node": arguments.devices, "nodes": arguments.nodes, "device": arguments.device}
    values["compute"] = {name: value for name, value in compute.items() if value is not None}
    values["overrides"] = {key: value for text in arguments.set or () for key, value in _assignment(text).items()}
    return values


def read_experiment(file: Path) -> dict[str, Any]:
    """The arguments of `create()` in a YAML file; relative data paths are taken from the file's own folder.

    Raises:
        SpecError: the file cannot be read or is no mapping, or names an argument that `create()` does not have.
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(
            f"{file}: cannot be read ({error}). Give a YAML file with the arguments of create()."
        ) from error
    if not isinstance(content, dict):
        raise SpecError(f"{file}: found no mapping. Write one argument of create() a line, like 'model: …'.")
    _check_names(str(file), content)
    return content | {name: _beside(file, content[name]) for name in PATH_ARGUMENTS if content.get(name)}


def _check_names(where: str, arguments: Mapping[Any, Any]) -> None:
    import inspect

    known = inspect.signature(fm.create).parameters
    if unknown := sorted(str(key) for key in arguments if key not in known):
        raise SpecError(f"{where}: create() has no argument {', '.join(unknown)}; it has {', '.join(known)}.")


def _beside(file: Path, given: Any) -> Any:
    """A relative path is taken from the file's folder."""
    text = str(given)
    if ":" in text.split("/")[0] or text.startswith(("/", "~")):
        return given
    return str(file.parent / text)


def _assignment(text: str) -> dict[str, Any]:
    import yaml

    key, sign, value = text.partition("=")
    if not sign or not key:
        raise SpecError(f"found {text!r}; needed is key=value.")
    try:
        return {key: yaml.safe_load(value) if value else None}
    except yaml.YAMLError as error:
        raise SpecError(f"found {text!r}; the value is not YAML. Quote it.") from error


def _started(run: TrainingRun, as_json: bool, *, wait: bool) -> int:
    if not as_json:
        print(f"Run {run.name} was created.")
    if wait:
        run = run.wait() if as_json else watch(run.name)
    if as_json:
        _print_json(_record(run))
    elif not wait:
        print(f"Follow it with:  tundish events {run.name} --follow")
    return 1 if run.status.value in ("FAILED", "STOPPED") else 0


def _record(run: TrainingRun) -> dict[str, Any]:
    record = {
        field.name: getattr(run, field.name) for field in dataclasses.fields(run) if field.name != "submitted_config"
    }
    record["events"] = [dataclasses.asdict(event) for event in run.events or ()]
    record["export_dir"] = run.export_dir
    return {name: _plain(value) for name, value in record.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value


def _print_json(content: Any) -> int:
    print(json.dumps(content, indent=2, default=_plain, ensure_ascii=False))
    return 0


def _print_table(items: ObjectList[Any], columns: Mapping[str, str]) -> None:
    rows = [tuple(columns.values()), *(tuple(str(getattr(item, name) or "-") for name in columns) for item in items)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
