"""Problems and warnings of samples, grouped by rule, with their places."""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, cast

from tundish.base.text import printable
from tundish.data.manifest import Prepared
from tundish.data.samples import Problem

SHOWN = 20
"""The most places in a message."""
SHOWN_CHARACTERS = 400
"""Of names in a message."""


@dataclass(slots=True)
class _Kind:
    text: str
    numbers: "array[int]" = field(default_factory=lambda: array("q"))


class Findings:
    """Samples by rule. A sample is identified by its number from 1: of its line, its row, or its file."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}

    def add(self, number: int, problem: Problem) -> None:
        """Record that sample `number` has `problem`."""
        self._kinds.setdefault(problem.rule, _Kind(problem.text)).numbers.append(number)

    def extend(self, other: "Findings", offset: int) -> None:
        """Add the findings of a later part of the data, which starts after `offset` samples."""
        for rule, kind in other._kinds.items():
            mine = self._kinds.setdefault(rule, _Kind(kind.text))
            mine.numbers.extend(number + offset for number in kind.numbers)

    def __bool__(self) -> bool:
        return bool(self._kinds)

    @property
    def count(self) -> int:
        """All findings; a sample with two counts twice."""
        return sum(len(kind.numbers) for kind in self._kinds.values())

    def findings(self, place: "Location", total: int) -> "list[Finding]":
        """One finding per rule, with the names of all its samples."""
        return [
            Finding(rule, self._message(kind, place, total), len(kind.numbers), place.names(kind.numbers))
            for rule, kind in self._kinds.items()
        ]

    def to_records(self) -> list[dict[str, Any]]:
        """All findings, for JSON."""
        return [{"rule": rule, "text": kind.text, "where": list(kind.numbers)} for rule, kind in self._kinds.items()]

    @classmethod
    def of(cls, records: list[dict[str, Any]]) -> "Findings":
        """The findings of which `to_records` made these records."""
        findings = cls()
        for record in records:
            findings._kinds[record["rule"]] = _Kind(record["text"], array("q", record["where"]))
        return findings

    def _message(self, kind: _Kind, place: "Location", total: int) -> str:
        text = f"{place.of(kind.numbers[0])}: {kind.text}"
        count = len(kind.numbers)
        if count > 1:
            names = list(_fitting(map(str, place.names(kind.numbers[:SHOWN]))))
            # The name of a row in one of several files contains a comma.
            comma = "; " if any(", " in name for name in names) else ", "
            shown = comma.join([*names, *["…"] * (count > len(names))])
            text += f" {count:,} of {total:,} {place.unit}s are like this ({shown})."
        return printable(text)


def _fitting(names: Iterable[str]) -> Iterator[str]:
    """The first names, about SHOWN_CHARACTERS long in all; at least one."""
    length = 0
    for name in names:
        if length > SHOWN_CHARACTERS:
            return
        length += len(name)
        yield name


@dataclass(frozen=True, slots=True)
class Finding:
    """All samples that one rule applies to."""

    rule: str
    message: str
    """Where the first one is, what is wrong, what is expected, and what to do; others by number."""
    count: int
    where: list[int] | list[str]
    """All samples: numbers of lines or rows from 1, or names of files."""

    def to_dict(self, most: int) -> dict[str, Any]:
        """The finding for JSON, with as many of its first places as fit into about `most` bytes."""
        where = list[Any]()
        for place in _ranges(self.where):
            most -= len(json.dumps(place, ensure_ascii=False).encode()) + 2
            if most < 0:
                break
            where.append(place)
        shown = sum(1 if not isinstance(place, list) else place[1] - place[0] + 1 for place in where)
        return {"rule": self.rule, "message": self.message, "count": self.count, "shown": shown, "where": where}


def _ranges(where: list[int] | list[str]) -> Iterator[int | str | list[int]]:
    """Names or numbers; consecutive numbers as `[first, last]`."""
    for _, group in groupby(enumerate(where), lambda pair: pair[1] - pair[0] if isinstance(pair[1], int) else pair):
        places = [place for _, place in group]
        yield places[0] if len(places) == 1 else [cast(int, places[0]), cast(int, places[-1])]


@dataclass(frozen=True, slots=True)
class Location:
    """How messages name the samples of a source."""

    source: str
    unit: str
    """`line`, `row` or `file`."""
    file_of: Callable[[int], str] | None = None
    """For a folder: the name of its n-th file."""

    def of(self, number: int) -> str:
        """The place of one sample, for a message."""
        if self.file_of is not None:
            return self.file_of(number)
        return f"{self.source}, {self.unit} {number:,}"

    def names(self, numbers: "array[int]") -> list[int] | list[str]:
        """Short names of samples: their numbers, or the names of their files."""
        return [self.file_of(number) for number in numbers] if self.file_of else list(numbers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of preparation: the prepared data, or problems."""

    prepared: Prepared | None
    """None if there are problems."""
    total: int
    """Lines, rows or files that were read."""
    samples: int
    problems: list[Finding]
    warnings: list[Finding]
