"""Dataclass fields that users set: type, help text, group and placeholder are declared at the field itself."""

import ast
import dataclasses
import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """How the command line offers a field, as part of its annotation: `Annotated[int, Option(group="compute")]`."""

    group: str
    """Title of the section of `--help`."""
    metavar: str | None = None
    """What stands for the value in `--help`; None: the values that are allowed, or the field's name."""
    flag: str | None = None
    """None: the field's name, with dashes."""
    required: bool = False
    is_path: bool = False
    """A path or name that is resolved as one: in a YAML file, relative to the file's own folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentedField:
    """A field of a dataclass with its docstring."""

    name: str
    type: Any
    text: str
    """On one line."""
    option: Option | None
    """None: the command line has no option for it."""


def documented_fields(cls: type) -> list[DocumentedField]:
    """The fields of a dataclass, in order."""
    # Python keeps no docstrings of fields; only the source has them.
    body = cast(ast.ClassDef, ast.parse(inspect.getsource(cls)).body[0]).body
    texts = {
        ast.unparse(field.target): " ".join(str(text.value.value).split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    hints = get_type_hints(cls, include_extras=True)
    return [_documented(field.name, hints[field.name], texts.get(field.name, "")) for field in dataclasses.fields(cls)]


def _documented(name: str, hint: Any, text: str) -> DocumentedField:
    if get_origin(hint) is not Annotated:
        return DocumentedField(name=name, type=hint, text=text, option=None)
    kind, *extras = get_args(hint)
    option = next((extra for extra in extras if isinstance(extra, Option)), None)
    return DocumentedField(name=name, type=kind, text=text, option=option)
