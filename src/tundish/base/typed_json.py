"""JSON objects that tundish has written: read back and checked field by field, as a disk or a hand may damage them."""

import contextlib
import dataclasses
import json
import os
import stat
import types
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
RECORD_BYTES = 64 << 20
"""No record is as large; a file that is has been written by something else."""


class NewerError(ValueError):
    """A record in a format that only a newer tundish reads."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    return object_of(read_regular(path, RECORD_BYTES))


def object_of(data: str | bytes) -> dict[str, Any]:
    """The JSON object that a text is.

    Raises:
        ValueError: it is something else.
    """
    if not data.strip():
        raise ValueError("is empty")
    try:
        content = json.loads(data)
    except UnicodeDecodeError:
        raise ValueError("is not text") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON, or was cut off ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"holds {json.dumps(content)[:60]} instead of a JSON object")
    return cast(dict[str, Any], content)


def read_regular(path: Path, limit: int | None = None) -> bytes:
    """The bytes of a regular file; a pipe or a device would be read for ever.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no regular file, or larger than `limit`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise ValueError("is a folder")
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("is not a regular file")
        if limit is not None and found.st_size > limit:
            raise ValueError(f"has {found.st_size:,} bytes, more than tundish writes")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def moment(text: str) -> datetime:
    """A time that tundish has written.

    Raises:
        ValueError: it is none, has no zone, or is so far away that it has no local time.
    """
    time = datetime.fromisoformat(text)
    if time.tzinfo is None or not 1970 <= time.year <= 9998:
        raise ValueError(f"found {text!r} instead of a time with its zone, from 1970 to 9998")
    return time


def parse(cls: type[T], content: Mapping[str, Any]) -> T:
    """A dataclass from the fields that `dataclasses.asdict` has made of one.

    Raises:
        ValueError: fields are missing, unknown or of another type; all of them are named.
    """
    fields = _fields(cls)
    problems = [f"lacks {name!r}" for name, (_, required) in fields.items() if required and name not in content]
    if unknown := [name for name in content if name not in fields]:
        problems.append(f"has {', '.join(map(repr, unknown))}, which this version of tundish does not know")
    values: dict[str, Any] = {}
    for name, (hint, _) in fields.items():
        if name in content:
            try:
                values[name] = _value(hint, content[name])
            except ValueError as error:
                problems.append(f"{name!r}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return cls(**values)


@cache
def _fields(cls: type[Any]) -> dict[str, tuple[Any, bool]]:
    """Each field's type, and whether it must be given."""
    hints, missing = get_type_hints(cls), dataclasses.MISSING
    return {
        field.name: (hints[field.name], field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(cls)
    }


def _value(hint: Any, value: Any) -> Any:
    """`value` as a field of this type holds it.

    Raises:
        ValueError: it is of another type.
    """
    if hint is type(value):
        return value
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        *others, last = (option for option in inner if option is not type(None))
        for option in others:
            with contextlib.suppress(ValueError):
                return _value(option, value)
        return _value(last, value)
    if origin is Literal:
        return value if value in inner else _refuse(value, " or ".join(map(repr, inner)))
    if origin is tuple:
        if not isinstance(value, list):
            return _refuse(value, "a list")
        return tuple(_value(inner[0], one) for one in cast(list[Any], value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            return _refuse(value, "an object")
        return {key: _value(inner[1], one) for key, one in cast(dict[str, Any], value).items()}
    if dataclasses.is_dataclass(hint):
        return parse(cast(type[Any], hint), value) if isinstance(value, dict) else _refuse(value, "an object")
    if isinstance(value, bool) is not (hint is bool) or not isinstance(value, (int, float) if hint is float else hint):
        return _refuse(value, {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[hint])
    return value


def _refuse(value: Any, expected: str) -> Any:
    shown = json.dumps(value)
    raise ValueError(f"found {shown if len(shown) <= 60 else shown[:60] + '…'} instead of {expected}")
