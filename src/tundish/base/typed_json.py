"""JSON objects that tundish wrote: read back and checked field by field, since disks and people may damage them."""

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
"""No record is this large: a larger file was written by another program."""


class NewerError(ValueError):
    """A record in a format that only a newer version of tundish can read."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it contains something else.
    """
    return object_of(read_regular(path, RECORD_BYTES))


def object_of(data: str | bytes) -> dict[str, Any]:
    """The JSON object in a text.

    Raises:
        ValueError: it contains something else.
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
        raise ValueError(f"must contain a JSON object, not {_shown(content)}")
    return cast(dict[str, Any], content)


def read_regular(path: Path, limit: int | None = None) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular file, or is larger than `limit`.
    """
    # Not open(), which would wait forever for the writer of a named pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise ValueError("is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a regular file")
        if limit is not None and status.st_size > limit:
            raise ValueError(f"has {status.st_size:,} bytes, more than tundish writes")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def moment(text: str) -> datetime:
    """A time that tundish wrote.

    Raises:
        ValueError: it is not a time, has no time zone, or is too far away to be shown in local time.
    """
    time = datetime.fromisoformat(text)
    if time.tzinfo is None or not 1970 <= time.year <= 9998:
        raise ValueError(f"must be a time with a time zone, from 1970 to 9998, not {text!r}")
    return time


def parse(cls: type[T], content: Mapping[str, Any]) -> T:
    """The dataclass of which `dataclasses.asdict` made these fields.

    Raises:
        ValueError: fields are missing, unknown or of another type; it names all of them.
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
    """Each field's type, and whether it is required."""
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
        # If no option fits, the error is that of the last one.
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
        return tuple(_value(inner[0], item) for item in cast(list[Any], value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            return _refuse(value, "an object")
        return {key: _value(inner[1], item) for key, item in cast(dict[str, Any], value).items()}
    if dataclasses.is_dataclass(hint):
        return parse(cast(type[Any], hint), value) if isinstance(value, dict) else _refuse(value, "an object")
    # In Python, a bool is an int too, and an int is accepted as a float.
    if isinstance(value, bool) is not (hint is bool) or not isinstance(value, (int, float) if hint is float else hint):
        return _refuse(value, {str: "text", int: "an integer", float: "a number", bool: "true or false"}[hint])
    return value


def _refuse(value: Any, expected: str) -> Any:
    raise ValueError(f"must be {expected}, not {_shown(value)}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "…"
