"""What `databricks_genai` 1.1.8 offers by name, tundish offers too; compared where that package is installed.

Its source files are read, not imported: what it needs may be missing.
"""

import ast
import dataclasses
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tundish import errors
from tundish import foundation_model as fm
from tundish.foundation_model import TrainingRun
from tundish.runs.records import ObjectList, RunStatus, TrainingEvent, TrainingModelConstants

VERBS = ("create", "get", "list", "cancel", "get_events", "get_checkpoints", "get_models")
RECORDS = (TrainingRun, TrainingEvent, TrainingModelConstants)
NOT_FOR_CALLERS = {"from_mapi_response"}
"""How records come out of the service's answers."""
OF_THE_SERVICE = {"MAPIException", "MultiMAPIException", "RunConfigException"}
"""Raised when a request to the service went wrong; there is none any more."""


@pytest.fixture(scope="module")
def tree() -> Callable[[str], ast.Module]:
    """Reads a module of the original client: `tree("types/common.py")`."""
    if importlib.util.find_spec("databricks") is None or not (
        spec := importlib.util.find_spec("databricks.model_training")
    ):
        pytest.skip("databricks_genai is not installed")
    (folder,) = spec.submodule_search_locations or [""]
    return lambda file: ast.parse((Path(folder) / file).read_text())


def _class(module: ast.Module, name: str) -> ast.ClassDef:
    (found,) = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name]
    return found


def _is_public(name: str) -> bool:
    """Whether callers or Python itself use the name."""
    return not name.startswith("_") or name == "_repr_html_" or name.startswith("__")


def _methods(cls: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    functions = {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef)}
    return {
        name: node
        for name, node in functions.items()
        if _is_public(name) and name != "__init__" and name not in NOT_FOR_CALLERS
    }


def _value(node: ast.expr | None, module: ast.Module) -> Any:
    """A default: a literal, or a constant of the module."""
    if isinstance(node, ast.Name):
        assigned = [one for one in module.body if isinstance(one, ast.Assign)]
        (node,) = [one.value for one in assigned if ast.unparse(one.targets[0]) == node.id]
    return inspect.Parameter.empty if node is None else ast.literal_eval(node)


def _parameters(function: ast.FunctionDef, module: ast.Module) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of each parameter but `self` and `cls`."""
    given = function.args
    assert not given.posonlyargs and given.vararg is None and given.kwarg is None
    missing: list[ast.expr | None] = [None] * (len(given.args) - len(given.defaults))
    plain = zip(given.args, [*missing, *given.defaults], strict=True)
    named = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    kinds = inspect.Parameter
    found = [(arg.arg, kinds.POSITIONAL_OR_KEYWORD, _value(default, module)) for arg, default in plain]
    found += [(arg.arg, kinds.KEYWORD_ONLY, _value(default, module)) for arg, default in named]
    return [one for one in found if one[0] not in ("self", "cls")]


def _ours(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    found = [(name, one.kind, one.default) for name, one in inspect.signature(function).parameters.items()]
    return [one for one in found if one[0] != "self"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_takes_what_the_original_took(verb: str, tree: Callable[[str], ast.Module]) -> None:
    """A notebook's call would raise TypeError, or mean something else; what we add can only be given by its name."""
    module = tree(f"api/foundation_model/{verb}.py")
    (function,) = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == verb]
    original, ours = _parameters(function, module), _ours(getattr(fm, verb))
    assert ours[: len(original)] == original
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in ours[len(original) :])


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_a_record_has_the_original_s_fields(record: type, tree: Callable[[str], ast.Module]) -> None:
    """A notebook's `run.<field>` would raise, or a default differ."""
    file = "training_constants" if record is TrainingModelConstants else "training_run"
    module = tree(f"types/{file}.py")
    nodes = [node for node in _class(module, record.__name__).body if isinstance(node, ast.AnnAssign)]
    fields = {ast.unparse(node.target): node.value for node in nodes}
    original = [(name, _value(default, module)) for name, default in fields.items() if _is_public(name)]
    missing = dataclasses.MISSING
    ours = [
        (one.name, inspect.Parameter.empty if one.default is missing else one.default)
        for one in dataclasses.fields(record)
    ]
    assert len(original) >= 3 and ours[: len(original)] == original
    assert all(default is not inspect.Parameter.empty for _, default in ours[len(original) :])


@pytest.mark.parametrize("record", [*RECORDS, RunStatus, ObjectList], ids=lambda record: record.__name__)
def test_a_record_has_the_original_s_methods(record: type, tree: Callable[[str], ast.Module]) -> None:
    """A notebook's `run.refresh()` or `runs.append(run)` would raise."""
    files = {TrainingModelConstants: "training_constants", RunStatus: "run_status", ObjectList: "common"}
    module = tree(f"types/{files.get(record, 'training_run')}.py")
    methods = _methods(_class(module, record.__name__))
    assert len(methods) >= 1
    if record is ObjectList:
        del methods["display_columns"]  # ours is a field
        assert ObjectList([], {"name": "Name"}).display_columns == {"name": "Name"}
    for name, method in methods.items():
        ours = inspect.getattr_static(record, name)
        is_property = any(ast.unparse(one) == "property" for one in method.decorator_list)
        assert isinstance(ours, property) == is_property, name
        if not is_property and not name.startswith("__"):
            assert _ours(getattr(record, name)) == _parameters(method, module), name


def test_statuses_are_the_original_s(tree: Callable[[str], ast.Module]) -> None:
    """A loop over the statuses, or over `RunStatus.order`, would give others, or in another order."""
    module = tree("types/run_status.py")
    assigned = [node for node in _class(module, "RunStatus").body if isinstance(node, ast.Assign)]
    members = [(ast.unparse(node.targets[0]), ast.literal_eval(node.value)) for node in assigned]
    assert len(members) == 9 and [(status.name, status.value) for status in RunStatus] == members
    (order,) = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and node.name == "order"]
    (listed,) = [node for node in ast.walk(order) if isinstance(node, ast.List)]
    assert [f"RunStatus.{status.name}" for status in RunStatus.order] == [ast.unparse(one) for one in listed.elts]


def test_the_columns_of_tables_are_the_original_s(tree: Callable[[str], ast.Module]) -> None:
    """`fm.list().to_pandas()["model"]` would raise."""
    (function,) = [
        node
        for node in ast.walk(tree("types/common.py"))
        if isinstance(node, ast.FunctionDef) and node.name == "_get_display_columns"
    ]
    original = [
        columns for node in ast.walk(function) if isinstance(node, ast.Dict) if (columns := ast.literal_eval(node))
    ]
    ours = [dict(record.COLUMNS) for record in RECORDS]
    # Theirs is a link, by a private name.
    changed = {"_get_mlflow_path_html_with_link": "experiment_path"}
    assert [[changed.get(name, name) for name in columns] for columns in original] == [list(one) for one in ours]
    titles = [list(columns.values()) for columns in original]
    assert [[title.replace("MLflow Experiment", "MLflow Run") for title in one.values()] for one in ours] == titles


def _errors(module: ast.Module) -> Iterator[tuple[str, str]]:
    """Name and base of each error that callers may catch."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name not in OF_THE_SERVICE:
            (base,) = node.bases
            yield node.name, ast.unparse(base)


def test_errors_are_caught_as_the_original_s_were(tree: Callable[[str], ast.Module]) -> None:
    """An `except` clause would raise NameError, or no longer catch what it caught."""
    found = dict(_errors(tree("api/exceptions.py")))
    assert len(found) >= 5 and found.pop("DatabricksGenAIError") == "Exception"
    assert issubclass(errors.DatabricksGenAIError, Exception)
    for name, base in found.items():
        assert issubclass(getattr(errors, name), getattr(errors, base)), name
        assert "message" in vars(getattr(errors, name)("x"))
