"""runs/tables.py: what notebooks show can be read, and is text."""

from datetime import datetime, timedelta

import pytest

from tundish.runs.html_tables import SHORT, Link, horizontal, text, vertical
from tundish.runs.records import TrainingModelConstants


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        ("", "-"),
        (0, "<nobr>0</nobr>"),
        (5e-7, "<nobr>5e-07</nobr>"),
        ("a < b", "<nobr>a &lt; b</nobr>"),
        ("two\nlines", "two\nlines"),
        ("x" * (SHORT + 1), "x" * (SHORT + 1)),
        (["What?", "<b>"], "<nobr>What?</nobr><br><nobr>&lt;b&gt;</nobr>"),
        ([], "-"),
        (timedelta(hours=25, seconds=61.5), "<nobr>1 day, 1:01:01</nobr>"),
        (1.23456789, "<nobr>1.235</nobr>"),
        (Link("a&b", None), "<nobr>a&amp;b</nobr>"),
        (Link("a", 'http://x/"><b>'), '<a href="http://x/&quot;&gt;&lt;b&gt;" target="_blank"><nobr>a</nobr></a>'),
        (Link("", "http://x"), "-"),
        (datetime(2026, 11, 21, 10, 0, 1, 999).astimezone(), "<nobr>2026-11-21 10:00:01</nobr>"),
    ],
)
def test_values_are_shown_as_people_write_them(value: object, shown: str) -> None:
    """Names would be folded at their hyphens, long messages not at all, and markup in them run in the notebook."""
    assert text(value) == shown


def test_titles_are_escaped_and_values_of_a_record_stand_beside_them() -> None:
    """A table would lack a column, or titles be markup."""
    model = TrainingModelConstants("org/model", "A & B", 8192)
    table = horizontal([model] * 2, TrainingModelConstants.COLUMNS)
    assert table.count("<tr>") == 3 and table.count("<td") == 6 and table.count("A &amp; B") == 2
    assert ">Maximum Context Length</th>" in table and ">Maximum Context Length</th>" in model._repr_html_()
    assert "<b>" not in vertical({"<b>": ""}) and "&lt;b&gt;" in vertical({"<b>": ""})
