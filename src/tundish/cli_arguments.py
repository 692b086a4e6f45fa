"""What the commands share: the arguments of `create()` from options, files and assignments, and JSON out of results."""

import argparse
import inspect
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from tundish import foundation_model as fm
from tundish.cli import CREATE_OPTIONS
from tundish.errors import SpecError

PATH_ARGUMENTS = ("train_data_path", "eval_data_path", "custom_weights_path")
CREATE_ARGUMENTS = [option.replace("-", "_") for option in CREATE_OPTIONS]


def create_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `create()` that the options mean."""
    values = {name: getattr(arguments, name) for name in CREATE_ARGUMENTS}
    values["compute"] = compute_arguments(arguments) or {}
    values["overrides"] = {key: value for text in arguments.set or () for key, value in assignment(text).items()}
    return values


def compute_arguments(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The `compute` argument that the options mean; None where none was given."""
    compute = {"devices_per_node": arguments.devices, "nodes": arguments.nodes, "device": arguments.device}
    compute |= {"launcher": arguments.launcher, "time_limit": arguments.time_limit}
    compute["sbatch"] = {key: value for text in arguments.sbatch or () for key, value in _option(text)} or None
    return {name: value for name, value in compute.items() if value is not None} or None


def _option(text: str) -> Iterator[tuple[str, str | bool]]:
    """`partition=gpu`, or `exclusive` alone."""
    key, sign, value = text.partition("=")
    yield key, value if sign else True


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
    check_names(str(file), content)
    return content | {name: _beside(file, content[name]) for name in PATH_ARGUMENTS if content.get(name)}


def check_names(where: str, arguments: Mapping[Any, Any]) -> None:
    """Refuse what is no argument of `create()`, with a SpecError that lists those that are."""
    known = inspect.signature(fm.create).parameters
    if unknown := sorted(str(key) for key in arguments if key not in known):
        raise SpecError(f"{where}: create() has no argument {', '.join(unknown)}; it has {', '.join(known)}.")


def _beside(file: Path, given: Any) -> Any:
    """A relative path is taken from the file's folder."""
    text = str(given)
    if ":" in text.split("/")[0] or text.startswith(("/", "~")):
        return given
    return str(file.parent / text)


def assignment(text: str) -> dict[str, Any]:
    """What `key=value` says, the value read as YAML.

    Raises:
        SpecError: it is none.
    """
    import yaml

    key, sign, value = text.partition("=")
    if not sign or not key:
        raise SpecError(f"found {text!r}; needed is key=value.")
    try:
        return {key: yaml.safe_load(value) if value else None}
    except yaml.YAMLError as error:
        raise SpecError(f"found {text!r}; the value is not YAML. Quote it.") from error


def print_json(content: Any) -> int:
    """Print one JSON document; returns exit code 0."""
    print(json.dumps(content, indent=2, default=plain, ensure_ascii=False))
    return 0


def plain(value: Any) -> Any:
    """What JSON can say of a value."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value
