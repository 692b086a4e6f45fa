"""The arguments of `create()` on a command line: its options, YAML files, and assignments.

An option is derived from the field of RunSpec or Compute that it sets: name, type, help text and group.
"""

import argparse
import inspect
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from tundish import foundation_model as fm
from tundish.base.text import INSTEAD_OF_SECRETS, names_secret
from tundish.cli.parsing import offer
from tundish.errors import SpecError, did_you_mean
from tundish.plan.address import Beside, local_path
from tundish.plan.compute import Compute
from tundish.plan.options import DocumentedField, Option, documented_fields
from tundish.plan.overrides import PATHS, flat
from tundish.plan.spec import RunSpec

LARGEST_FILE = 1 << 20
MOST_VALUES = 100_000
"""In a YAML file; what aliases stand for counts each time."""
SECTIONS = ("compute", "overrides")
"""Arguments of `create()` that are mappings: `SECTION.KEY` names one of their keys."""
GROUPS = ("data", "training", "output")
"""The sections of `--help` in which the arguments of `create()` are, in this order."""
USAGE = "--model MODEL --train-data-path PATH --register-to NAME\n       [options]"
DATA_USAGE = "--model MODEL --train-data-path PATH [options]"


NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+",
    "float": r"[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)",
}


class Loader(yaml.SafeLoader):
    """YAML with the numbers of YAML 1.2: `1e-5` is a number, and `12:00:00` is text."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag.rpartition(":")[2] not in NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _form in NUMBERS.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"({_form})$"), list("-+0123456789."))


def add_create_options(
    command: argparse.ArgumentParser, *, optional: Container[str] = (), leave_out: Container[str] = ()
) -> None:
    """Give a command the arguments of `create()`, in groups.

    Args:
        command: the command's parser.
        optional: arguments that `create()` requires, but the command does not.
        leave_out: arguments that mean nothing to the command.
    """
    fields = [(field, option) for field, option in _options(RunSpec) if field.name not in leave_out]
    for title in GROUPS:
        group = command.add_argument_group(title)
        for field, option in fields:
            if option.group == title:
                _add_option(group, field, option, required=option.required and field.name not in optional)
    add_compute_options(command)
    command.add_argument_group("other options").add_argument(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help="override an LLM Foundry key, such as optimizer.betas=[0.9,0.95]; compute.KEY=VALUE sets a field of "
        "compute (repeatable)",
    )


def add_compute_options(command: argparse.ArgumentParser) -> None:
    """Give a command the fields of Compute; those without an option are set by `--set compute.FIELD=VALUE`."""
    group = command.add_argument_group("compute")
    for field, option in _options(Compute):
        _add_option(group, field, option)


def _options(cls: type) -> Iterator[tuple[DocumentedField, Option]]:
    for field in documented_fields(cls):
        if field.option is not None:
            yield field, field.option


def _add_option(group: Any, field: DocumentedField, option: Option, *, required: bool = False) -> None:
    """Add an option to a group (argparse keeps the type of groups to itself)."""
    flag = option.flag or f"--{field.name.replace('_', '-')}"
    # The texts are those of a docstring; argparse begins small, has no full stop at the end, and formats with %.
    small = field.text if re.match(r"[A-Z]{2}|`", field.text) else f"{field.text[0].lower()}{field.text[1:]}"
    text = small.rstrip(".").replace("%", "%%").replace("`", "")
    settings: dict[str, Any] = {"dest": field.name, "metavar": option.metavar}
    kind = get_origin(field.type) or field.type
    choices = get_args(field.type) if kind is Literal else ()
    if kind is bool:
        settings = {"dest": field.name, "action": argparse.BooleanOptionalAction}
    elif kind is int:
        settings["type"] = _integer
    elif kind is tuple:
        settings["nargs"] = "+"
    elif kind is Mapping:
        settings["action"], text = "append", f"{text} (repeatable)"
    elif choices and option.metavar is None:
        settings["metavar"] = f"{{{','.join(choices)}}}"
    # Neither required nor restricted by the parser: create() reports all problems of a call at once.
    action = group.add_argument(flag, help=f"(required) {text}" if required else text, **settings)
    if choices:
        offer(action, lambda: choices)


def _integer(text: str) -> int | str:
    """An integer; anything else as it was given, for `create()` to report with all other problems."""
    return int(text) if re.fullmatch(r"-?\d{1,18}", text, re.ASCII) else text


def create_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `create()` that the options set."""
    values: dict[str, Any] = {field.name: getattr(arguments, field.name, None) for field, _ in _options(RunSpec)}
    values |= {"compute": compute_arguments(arguments) or {}, "overrides": {}}
    for text in arguments.set or ():
        _set_override(values, text)
    return values


def replaced(values: dict[str, Any], arguments: argparse.Namespace, assignments: Iterable[str]) -> None:
    """Replace arguments of `create()` by those of assignments and then of options.

    Raises:
        SpecError: an assignment is malformed, or names an argument that `create()` does not have.
    """
    for text in assignments:
        key, value = assignment(text)
        section, _, below = key.partition(".")
        if below and section in SECTIONS:
            _set_below(values, section, below, value)
        else:
            check_names("the command line", [key])
            values[key] = value
    options = {field.name: getattr(arguments, field.name) for field, _ in _options(RunSpec)}
    values |= {name: value for name, value in options.items() if value is not None}
    for name, value in (compute_arguments(arguments) or {}).items():
        _set_below(values, "compute", name, value)
    for text in arguments.set or ():
        _set_override(values, text)


def _set_override(values: dict[str, Any], text: str) -> None:
    """What `--set` means: an LLM Foundry key, or one below `compute.` or `overrides.`."""
    key, value = assignment(text)
    section, _, below = key.partition(".")
    _set_below(values, *((section, below) if below and section in SECTIONS else ("overrides", key)), value)


def _set_below(values: dict[str, Any], section: str, key: str, value: Any) -> None:
    """Set a key of `compute` or `overrides`, after all others: of two ways to write a key, the later one counts."""
    given: Any = values.get(section) or {}
    if not isinstance(given, Mapping):
        raise SpecError(f"{section} must be a mapping to set {section}.{key}, not {given!r}.")
    if section == "compute" and "." in key:  # sbatch's options; LLM Foundry keys are dotted themselves
        name, _, below = key.partition(".")
        values[section] = inner = dict(given)
        _set_below(inner, name, below, value)
        return
    values[section] = {name: old for name, old in given.items() if name != key} | {key: value}


def compute_arguments(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The `compute` argument that the options set; None if there are none."""
    compute = {field.name: getattr(arguments, field.name) for field, _ in _options(Compute)}
    compute["sbatch"] = {key: value for text in arguments.sbatch or () for key, value in _sbatch_option(text)} or None
    return {name: value for name, value in compute.items() if value is not None} or None


def _sbatch_option(text: str) -> Iterator[tuple[str, str | bool]]:
    """`partition=gpu`, or `exclusive` alone."""
    key, sign, value = text.partition("=")
    yield key, value if sign else True


def read_experiment(given: str | Path) -> dict[str, Any]:
    """The arguments of `create()` in a YAML file; relative paths in it start from the file's own folder.

    Raises:
        SpecError: the file cannot be read, is not a mapping, or names an argument that `create()` does not have.
    """
    file = local_path(given, "FILE")
    content = _read_yaml(file)
    if not isinstance(content, dict):
        raise SpecError(f"{file}: must be a mapping. Write one argument of create() per line, like 'model: …'.")
    check_names(str(file), content)
    beside: dict[str, Any] = {
        field.name: Beside(text, file.parent)
        for field, option in _options(RunSpec)
        if option.is_path and isinstance(text := content.get(field.name), str)
    }
    if isinstance(overrides := content.get("overrides"), dict):
        beside["overrides"] = {
            key: Beside(value, file.parent) if key in PATHS and isinstance(value, str) else value
            for key, value in flat(overrides).items()
        }
    return content | beside


def _read_yaml(file: Path) -> Any:
    try:
        with open(file, "rb") as stream:  # may be a pipe
            data = stream.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE:,} bytes")
        return _load(data.decode())
    except OSError as error:
        reason = error.strerror
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        reason = f"{line}{error.problem}"
    except RecursionError:
        reason = "it is nested too deeply"
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
    raise SpecError(f"{file}: cannot be read ({reason}). Give a YAML file with the arguments of create().")


def _load(text: str) -> Any:
    """Parse YAML.

    Raises:
        yaml.YAMLError, RecursionError, ValueError: it is not valid YAML, or too large.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        # A "billion laughs" file: nested aliases, one line each, that stand for billions of values.
        if node is not None and _values(node, {}) > MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_VALUES:,} values")
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _values(node: yaml.Node, counted: dict[int, int]) -> int:
    """The number of values in a node, with aliases counted each time; `counted` holds nodes seen before."""
    if id(node) not in counted:
        counted[id(node)] = MOST_VALUES + 1  # of one that holds itself
        value: Any = node.value
        below = [one for pair in value for one in pair] if isinstance(node, yaml.MappingNode) else value
        counted[id(node)] = 1 + (
            0 if isinstance(node, yaml.ScalarNode) else sum(_values(one, counted) for one in below)
        )
    return counted[id(node)]


def check_names(where: str, arguments: Iterable[Any]) -> None:
    """Raise a SpecError for names that are not arguments of `create()`, with those that are."""
    known = inspect.signature(fm.create).parameters
    if unknown := sorted(str(key) for key in arguments if key not in known):
        near = "".join(did_you_mean(key, known) for key in unknown[:1])
        if "." in unknown[0]:
            near = f" LLM Foundry keys are written overrides.{unknown[0]}."
        near += f" {INSTEAD_OF_SECRETS}" if any(map(names_secret, unknown)) else ""
        raise SpecError(f"{where}: create() has no argument {', '.join(unknown)}; it has {', '.join(known)}.{near}")


def assignment(text: str) -> tuple[str, Any]:
    """Key and value of `key=value`, the value read as YAML.

    Raises:
        SpecError: it is malformed.
    """
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise SpecError(f"{text!r} must have the form key=value.")
    try:
        return key, _load(value) if value else None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise SpecError(f"{text!r}: the value is not valid YAML. Quote it.") from error
