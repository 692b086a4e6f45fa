"""YAML text with comments: reads the comment above each key of a layer and writes it above that key in the result.

PyYAML drops comments, but it knows the line of every key, which is all that is needed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

Path = tuple[str, ...]


def comments_of(text: str, below: str | None = None) -> dict[Path, list[str]]:
    """The comment lines (without indentation) above each key of `text`, by the key's path.

    `below`: take the paths from after the first key of that name, wherever it stands.
    """
    lines = text.splitlines()
    found: dict[Path, list[str]] = {}
    for path, line in _keys(yaml.compose(text)):
        if below is not None:
            if below not in path[:-1]:
                continue
            path = path[path.index(below) + 1 :]
        above: list[str] = []
        while line > 0 and lines[line - 1].lstrip().startswith("#"):
            line -= 1
            above.insert(0, lines[line].strip())
        if above:
            found[path] = above
    return found


def dump(content: Mapping[str, Any], comments: Mapping[Path, list[str]]) -> str:
    """`content` as YAML, each key with its comment above it and an empty line between sections."""
    text = yaml.safe_dump(dict(content), sort_keys=False, width=10_000, allow_unicode=True)
    places = {line: path for path, line in _keys(yaml.compose(text))}
    written: list[str] = []
    for number, line in enumerate(text.splitlines()):
        path = places.get(number, ())
        nested = isinstance(content.get(path[0]), Mapping) if len(path) == 1 else False
        if written and len(path) == 1 and (nested or path in comments):
            written.append("")
        indent = " " * (len(line) - len(line.lstrip()))
        written.extend(indent + comment for comment in comments.get(path, ()))
        written.append(line)
    return "\n".join(written) + "\n"


def _keys(node: yaml.Node | None, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Path and line (from 0) of every mapping key below `node`."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _keys(item, path)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, key.value), key.start_mark.line
            yield from _keys(value, (*path, key.value))
