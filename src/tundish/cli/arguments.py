"""The arguments of `create()` on a command line: its options, YAML files, and assignments.

An option's name, type and help text are those of the parameter of `create()`, or of the field of Compute.
"""

import argparse
import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import yaml

from tundish import foundation_model as fm
from tundish.base.text import INSTEAD_OF_SECRETS, names_secret
from tundish.cli.parsing import whole
from tundish.errors import SpecError, did_you_mean
from tundish.plan.address import Beside, local_path
from tundish.plan.compute import Compute
from tundish.plan.overrides import PATHS, flat

PATH_ARGUMENTS = ("model", "train_data_path", "eval_data_path", "custom_weights_path")
LARGEST_FILE = 1 << 20
MOST_VALUES = 100_000
"""In a YAML file, those that aliases stand for counted each time."""
SECTIONS = ("compute", "overrides")
"""Arguments of `create()` that are mappings: `SECTION.KEY` names one of their keys."""
GROUPS: Mapping[str, Mapping[str, str]] = {
    "data": {
        "train_data_path": "PATH",
        "eval_data_path": "PATH",
        "eval_prompts": "TEXT",
        "data_prep_cluster_id": "MASTER",
    },
    "training": {
        "model": "MODEL",
        "task_type": "TYPE",
        "training_duration": "N",
        "learning_rate": "X",
        "context_length": "N",
        "custom_weights_path": "PATH",
    },
    "output": {"register_to": "NAME", "run_name": "NAME", "experiment_path": "NAME"},
}
"""Where the help shows a parameter of `create()`, and what stands for its value."""
CREATE_ARGUMENTS = [name for group in GROUPS.values() for name in group]
COMPUTE: Mapping[str, tuple[str, str | None]] = {
    "device": ("--device", None),
    "devices_per_node": ("--devices", "N"),
    "nodes": ("--nodes", "N"),
    "launcher": ("--launcher", None),
    "time_limit": ("--time-limit", "T"),
    "sbatch": ("--sbatch", "OPTION=VALUE"),
}
"""Field of Compute → its option, and what stands for its value; the others are set by `--set compute.FIELD=VALUE`."""
REQUIRED = ("model", "train_data_path", "register_to")
USAGE = "--model MODEL --train-data-path PATH --register-to NAME\n       [options]"
DATA_USAGE = "--model MODEL --train-data-path PATH [options]"


NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+",
    "float": r"[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)",
}


class Loader(yaml.SafeLoader):
    """YAML with the numbers of its version 1.2: `1e-5` is one, and `12:00:00` is text."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag.rpartition(":")[2] not in NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _form in NUMBERS.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"({_form})$"), list("-+0123456789."))


def add_create_options(command: argparse.ArgumentParser, required: Iterable[str] = REQUIRED) -> None:
    """Give a command the arguments of `create()`, in groups."""
    parameters, texts = inspect.signature(fm.create).parameters, _parameter_texts()
    for title, names in GROUPS.items():
        group = command.add_argument_group(title)
        for name, metavar in names.items():
            kind = str(parameters[name].annotation)
            settings: dict[str, Any] = (
                {"nargs": "+"} if "Sequence" in kind else {"type": whole} if "int" in kind else {}
            )
            # Not required of the parser: create() tells all problems at once.
            text = f"(required) {texts[name]}" if name in required else texts[name]
            group.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=_help(text), **settings)
    add_compute_options(command)
    command.add_argument_group("other options").add_argument(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help="LLM-Foundry key to override, such as optimizer.betas=[0.9,0.95]; compute.KEY=VALUE sets a field of "
        "compute (repeatable)",
    )


def add_compute_options(command: argparse.ArgumentParser) -> None:
    """Give a command the fields of Compute."""
    group = command.add_argument_group("compute")
    for name, (option, metavar) in COMPUTE.items():
        kind, text = _compute_fields()[name]
        settings: dict[str, Any] = {"metavar": metavar} if metavar else {}
        if kind.startswith("Literal"):
            settings["choices"] = ast.literal_eval(kind.removeprefix("Literal"))
        elif kind.startswith("Mapping"):
            settings["action"], text = "append", f"{text} (repeatable)"
        elif kind == "int":
            settings["type"] = whole
        group.add_argument(option, dest=name, help=_help(text), **settings)


def _parameter_texts() -> dict[str, str]:
    """What the docstring of `create()` says of each parameter."""
    section = inspect.cleandoc(fm.create.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _compute_fields() -> dict[str, tuple[str, str]]:
    """Annotation and docstring of each field of Compute; only its source has the docstrings of fields."""
    body = cast(ast.ClassDef, ast.parse(inspect.getsource(Compute)).body[0]).body
    return {
        ast.unparse(field.target): (ast.unparse(field.annotation), str(text.value.value))
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _help(text: str) -> str:
    """A docstring's text as argparse takes it: begun small, without a full stop at its end."""
    small = text if text[:2].isupper() or text.startswith("`") else f"{text[0].lower()}{text[1:]}"
    return small.rstrip(".").replace("%", "%%").replace("`", "")


def create_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `create()` that the options mean."""
    values: dict[str, Any] = {name: getattr(arguments, name) for name in CREATE_ARGUMENTS}
    values |= {"compute": compute_arguments(arguments) or {}, "overrides": {}}
    for text in arguments.set or ():
        _set_override(values, text)
    return values


def replaced(values: dict[str, Any], arguments: argparse.Namespace, assignments: Iterable[str]) -> None:
    """Replace arguments of `create()` by those that assignments and options mean, the options last.

    Raises:
        SpecError: an assignment is none, or of an argument that `create()` does not have.
    """
    for text in assignments:
        key, value = assignment(text)
        section, _, below = key.partition(".")
        if below and section in SECTIONS:
            _set_below(values, section, below, value)
        else:
            check_names("the command line", [key])
            values[key] = value
    values |= {name: getattr(arguments, name) for name in CREATE_ARGUMENTS if getattr(arguments, name) is not None}
    for name, value in (compute_arguments(arguments) or {}).items():
        _set_below(values, "compute", name, value)
    for text in arguments.set or ():
        _set_override(values, text)


def _set_override(values: dict[str, Any], text: str) -> None:
    """What `--set` means: an LLM-Foundry key, or one below `compute.` or `overrides.`."""
    key, value = assignment(text)
    section, _, below = key.partition(".")
    _set_below(values, *((section, below) if below and section in SECTIONS else ("overrides", key)), value)


def _set_below(values: dict[str, Any], section: str, key: str, value: Any) -> None:
    """Set a key of `compute` or `overrides`, after all others: of two ways to write a key, the later one counts."""
    given: Any = values.get(section) or {}
    if not isinstance(given, Mapping):
        raise SpecError(f"{section}: found {given!r}; allowed is a mapping. Write {section}.{key} below it.")
    if section == "compute" and "." in key:  # sbatch's options; LLM-Foundry keys are dotted themselves
        name, _, below = key.partition(".")
        values[section] = inner = dict(given)
        _set_below(inner, name, below, value)
        return
    values[section] = {name: old for name, old in given.items() if name != key} | {key: value}


def compute_arguments(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The `compute` argument that the options mean; None where none was given."""
    compute = {name: getattr(arguments, name) for name in COMPUTE}
    compute["sbatch"] = {key: value for text in arguments.sbatch or () for key, value in _option(text)} or None
    return {name: value for name, value in compute.items() if value is not None} or None


def _option(text: str) -> Iterator[tuple[str, str | bool]]:
    """`partition=gpu`, or `exclusive` alone."""
    key, sign, value = text.partition("=")
    yield key, value if sign else True


def read_experiment(given: str | Path) -> dict[str, Any]:
    """The arguments of `create()` in a YAML file; relative paths in it start from the file's own folder.

    Raises:
        SpecError: the file cannot be read or is no mapping, or names an argument that `create()` does not have.
    """
    file = local_path(given, "FILE")
    content = _read_yaml(file)
    if not isinstance(content, dict):
        raise SpecError(f"{file}: found no mapping. Write one argument of create() a line, like 'model: …'.")
    check_names(str(file), content)
    beside: dict[str, Any] = {
        name: Beside(text, file.parent) for name in PATH_ARGUMENTS if isinstance(text := content.get(name), str)
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
    """What YAML says.

    Raises:
        yaml.YAMLError, RecursionError, ValueError: it is none, or would not end.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        # Ten aliases of ten of ten … are a line each, and a billion values for whoever walks over them.
        if node is not None and _values(node, {}) > MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_VALUES:,} values")
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _values(node: yaml.Node, counted: dict[int, int]) -> int:
    """How many values a node comes to, those of aliases each time; `counted`: those of nodes seen before."""
    if id(node) not in counted:
        counted[id(node)] = MOST_VALUES + 1  # of one that holds itself
        value: Any = node.value
        below = [one for pair in value for one in pair] if isinstance(node, yaml.MappingNode) else value
        counted[id(node)] = 1 + (
            0 if isinstance(node, yaml.ScalarNode) else sum(_values(one, counted) for one in below)
        )
    return counted[id(node)]


def check_names(where: str, arguments: Iterable[Any]) -> None:
    """Refuse what is no argument of `create()`, with a SpecError that lists those that are."""
    known = inspect.signature(fm.create).parameters
    if unknown := sorted(str(key) for key in arguments if key not in known):
        near = "".join(did_you_mean(key, known) for key in unknown[:1])
        if "." in unknown[0]:
            near = f" An LLM-Foundry key is written overrides.{unknown[0]}."
        near += f" {INSTEAD_OF_SECRETS}" if any(map(names_secret, unknown)) else ""
        raise SpecError(f"{where}: create() has no argument {', '.join(unknown)}; it has {', '.join(known)}.{near}")


def assignment(text: str) -> tuple[str, Any]:
    """Key and value of `key=value`, the value read as YAML.

    Raises:
        SpecError: it is none.
    """
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise SpecError(f"found {text!r}; needed is key=value.")
    try:
        return key, _load(value) if value else None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise SpecError(f"found {text!r}; the value is not YAML. Quote it.") from error
