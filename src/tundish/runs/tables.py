"""Records as HTML tables, for notebooks. Everything that comes from people is escaped."""

import html
from collections.abc import Iterable, Mapping
from datetime import datetime

# Notebooks align cells to the right, which is for numbers, and fold lines, which messages with several problems need.
CELL = 'style="text-align: left; vertical-align: top; white-space: pre-wrap"'
TITLE = 'style="text-align: left; vertical-align: top; white-space: nowrap"'
SHORT = 40
"""Characters of a value that stays in one line: names and models, which would be folded at their hyphens."""


def horizontal(items: Iterable[object], columns: Mapping[str, str]) -> str:
    """A row an item.

    Args:
        items: what is shown.
        columns: attribute name → title.
    """
    titles = "".join(f"<th {TITLE}>{html.escape(title)}</th>" for title in columns.values())
    rows = ("".join(f"<td {CELL}>{text(getattr(item, name))}</td>" for name in columns) for item in items)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table border="1" class="dataframe"><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>'


def vertical(values: Mapping[str, str]) -> str:
    """One item, a row an attribute: title → HTML."""
    rows = (f"<th {TITLE}>{html.escape(title)}</th><td {CELL}>{value}</td>" for title, value in values.items())
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table border="1" class="dataframe"><tbody>{body}</tbody></table>'


def text(value: object) -> str:
    """A value as HTML: times are local and without microseconds, what is not there is a dash."""
    if isinstance(value, datetime):
        return text(f"{value.astimezone():%Y-%m-%d %H:%M:%S}")
    if isinstance(value, list):
        return "<br>".join(text(one) for one in value) or "-"
    shown = html.escape(str(value)) if value or value == 0 else "-"
    return f"<nobr>{shown}</nobr>" if len(str(value)) <= SHORT and "\n" not in shown else shown
