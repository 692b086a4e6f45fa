"""Records as HTML tables, for notebooks. All text is escaped."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

# Notebooks align cells to the right and join lines; messages may have several lines.
CELL = 'style="text-align: left; vertical-align: top; white-space: pre-wrap"'
TITLE = 'style="text-align: left; vertical-align: top; white-space: nowrap"'
NOTHING = "-"
SHORT = 40
"""Values up to this many characters are not wrapped: names would be wrapped at their hyphens."""


def horizontal(items: Sequence[object], columns: Mapping[str, str], more: Mapping[str, str] = {}) -> str:
    """A table with one row per item.

    Args:
        items: what to show.
        columns: attribute name → title.
        more: further columns, each left out if no item has a value for it.

    An item may have `links`: attribute name → URL, or None.
    """
    filled = {name: title for name, title in more.items() if any(_is_given(getattr(item, name)) for item in items)}
    columns = {**columns, **filled}
    if not items:
        return "<p>None yet.</p>"
    titles = "".join(f"<th {TITLE}>{html.escape(title)}</th>" for title in columns.values())
    rows = ("".join(f"<td {CELL}>{_cell(item, name)}</td>" for name in columns) for item in items)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table border="1" class="dataframe"><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>'


def _cell(item: object, name: str) -> str:
    value, address = getattr(item, name), getattr(item, "links", {}).get(name)
    return text(Link(str(value), address)) if address and _is_given(value) else text(value)


def vertical(values: Mapping[str, str]) -> str:
    """A table of one item, with a row for each attribute that has a value: title → HTML."""
    values = {title: value for title, value in values.items() if value != NOTHING}
    rows = (f"<th {TITLE}>{html.escape(title)}</th><td {CELL}>{value}</td>" for title, value in values.items())
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table border="1" class="dataframe"><tbody>{body}</tbody></table>'


@dataclass(frozen=True, slots=True)
class Link:
    """A text, linked if its URL is known."""

    label: str
    address: str | None

    def __bool__(self) -> bool:
        return bool(self.label)


def _is_given(value: object) -> bool:
    return bool(value) or value == 0


def duration(value: timedelta) -> str:
    """`0:01:25`."""
    return str(timedelta(seconds=int(value.total_seconds())))


def text(value: object) -> str:
    """A value as HTML: times are local and without fractions of seconds, a missing value is a dash."""
    if isinstance(value, Link):
        shown = text(value.label)
        if value.address is None or not value:
            return shown
        return f'<a href="{html.escape(value.address)}" target="_blank">{shown}</a>'
    if isinstance(value, float):
        return text(f"{value:.4g}")
    if isinstance(value, timedelta):
        return text(duration(value))
    if isinstance(value, datetime):
        return text(f"{value.astimezone():%Y-%m-%d %H:%M:%S}")
    if isinstance(value, list):
        return "<br>".join(text(item) for item in value) or NOTHING
    if not _is_given(value):
        return NOTHING
    shown = html.escape(str(value))
    return f"<nobr>{shown}</nobr>" if len(str(value)) <= SHORT and "\n" not in shown else shown
